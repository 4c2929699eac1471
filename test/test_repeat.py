"""The same answer: to the bit on a CPU, for any number of threads and any order of pairs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_process import AFFINE, _moved_pairs, _quick

import process
from dinoreg import qc
from dinoreg.commands.info import differences
from dinoreg.config import Config, EncoderConfig, PcaConfig
from dinoreg.io import write_text
from dinoreg.weights import random_encoder


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(qc, "write_qc", lambda path, *_, **__: write_text(path, "picture"))  # has a test of its own
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    logging.captureWarnings(False)


def _fields(source: Path, output: Path, threads: int, factory: Any, features: str = "mind") -> dict[str, bytes]:
    """Run, and give every image that was written."""
    arguments = ["--input", str(source), "--output", str(output), "--features", features, "--device", "cpu"]
    assert process.main([*arguments, "--threads", str(threads)], registrar_factory=factory) == 0
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*.nii.gz")}


def _reorder(source: Path, order: list[int]) -> None:
    path = source / "Task_dataset.json"
    content = json.loads(path.read_text())
    content["registration_val"] = [content["registration_val"][n] for n in order]
    path.write_text(json.dumps(content))


def test_the_order_and_the_company_of_pairs_change_no_bit(tmp_path: Path) -> None:
    source = _moved_pairs(tmp_path / "in", AFFINE, pairs=2)
    whole = _fields(source, tmp_path / "whole", 1, _quick)
    assert len(whole) == 4
    _reorder(source, [1, 0])
    assert _fields(source, tmp_path / "reordered", 1, _quick) == whole
    _reorder(source, [0])
    alone = _fields(source, tmp_path / "alone", 2, _quick)
    assert len(alone) == 2 and alone.items() <= whole.items()


def _with_random_encoder(config: Config, **options: Any) -> Any:
    small = {"encoder": EncoderConfig(long_side_tokens=8, gap_mm=12.0), "pca": PcaConfig(components=8)}
    settings = config.to_dict() | {name: value.__dict__ for name, value in small.items()}
    options.pop("weights")
    return _quick(Config.from_dict(settings), encoder=random_encoder("vits14_reg4", 0), **options)


@pytest.mark.slow
def test_the_path_of_dinov2_is_the_same_to_the_bit_on_any_number_of_threads_and_in_any_order(tmp_path: Path) -> None:
    source = _moved_pairs(tmp_path / "in", AFFINE, pairs=2)
    whole = _fields(source, tmp_path / "1", 1, _with_random_encoder, "dinov2+mind")
    assert len(whole) == 4
    _reorder(source, [1, 0])
    assert _fields(source, tmp_path / "3", 3, _with_random_encoder, "dinov2+mind") == whole


def test_a_report_and_a_record_say_all_that_is_needed_to_repeat_the_run(tmp_path: Path) -> None:
    source = _moved_pairs(tmp_path / "in", AFFINE)
    _fields(source, tmp_path / "out", 1, _quick)
    torch.set_num_threads(1)
    for name in ("report.json", "records/0001_0001_0001_0000.json"):
        report = json.loads((tmp_path / "out" / name).read_text())
        assert differences(tmp_path / "out" / name) == []
        assert set(report["pairs"][0]["made_from"]) == {"inputs", "case", "configuration", "options", "program", "engine"}
        report["environment"] |= {"code": "0" * 64, "packages": report["environment"]["packages"] | {"h5py": "1", "numba": "1"}}
        (tmp_path / "other.json").write_text(json.dumps(report))
        assert {what for what, _, _ in differences(tmp_path / "other.json")} == {"code", "numba", "h5py"}
