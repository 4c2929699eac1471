"""Progress: bars on a terminal, lines elsewhere, and an estimate from the first encoded slices."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from fake_encoder import PatchMeans, affine

from dinoreg import slices
from dinoreg.config import EncoderConfig
from dinoreg.progress import shown
from dinoreg.slices import volume_tokens
from dinoreg.stages import advance, stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run() -> None:
    with stage("read", {}):
        pass
    with stage("encode", {}):
        for done in (1, 2):
            advance(done, 2)


def test_a_terminal_sees_a_bar_a_stage_and_no_line(caplog: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    with caplog.at_level(logging.INFO, "dinoreg"), shown(terminal):
        run()
    bars = terminal.getvalue().rstrip("\n").split("\n")
    assert [bar.split("\r")[-1].split()[0] for bar in bars] == ["read", "encode"]  # one line each, in the end
    assert all("#" * 30 in bar for bar in bars) and not caplog.messages


def test_elsewhere_there_is_a_line_a_stage_and_no_bar(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    with caplog.at_level(logging.INFO, "dinoreg"), shown(stream):
        run()
    assert stream.getvalue() == "" and [line.split(":")[0] for line in caplog.messages] == ["read", "encode"]


def test_encoding_tells_its_slices_and_estimates_from_the_first(caplog: pytest.LogCaptureFixture,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "TOKENS_A_BATCH", {"cpu": 1})
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(slices.time, "monotonic", lambda: next(clock))  # 3 s a slice
    seen: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO, "dinoreg"):
        volume_tokens(torch.ones(16, 16, 9), torch.ones(16, 16, 9, dtype=torch.bool), affine((2.0, 2.0, 2.0)), PatchMeans(),
                      EncoderConfig(gap_mm=4, long_side_tokens=4), progress=lambda *step: seen.append(step))
    assert seen == [(n, 5) for n in range(1, 6)]
    assert caplog.messages == ["encoding 5 slices will take about 15 s (the first 1 took 3.0 s)"]
