"""The script for the day on which weights are at hand: its rows, its table, and that nothing is measured twice."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoder import affine
from small_pair import QUICK, SHIFT_MM, scan
from test_truth import halves

from dinoreg.config import PRESETS, EncoderConfig, PublishedConfig
from dinoreg.io import write_volume
from dinoreg.registration import Registrar

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import reproduce

RANDOM = ["--random-encoder", "vits14_reg4:0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Presets for a second a pair with a real ViT-S."""
    small = EncoderConfig(long_side_tokens=12, gap_mm=12.0)
    for name, preset in PRESETS.items():
        quick = dataclasses.replace(QUICK, preset=name, encoder=small)
        if preset.solver == "published":
            quirks = dataclasses.replace(preset.quirks, token_grid=(8, 8), gap_slices=6)
            quick = dataclasses.replace(preset, encoder=dataclasses.replace(preset.encoder, long_side_tokens=8), quirks=quirks,
                                        published=PublishedConfig(pool=3, half_width=2, iterations=5))
        monkeypatch.setitem(PRESETS, name, quick)
    monkeypatch.setattr(reproduce, "GAPS_MM", (24.0,))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """AbdomenMRCT with two small pairs, labels and landmarks."""
    root, entries = tmp_path / "data", []
    header = affine((2.0, 2.0, 2.0))
    for n in (1, 2):
        fixed, moving = scan(header, (24, 26, 22)), scan(header, (24, 26, 22), moved_mm=SHIFT_MM * n / 2)
        points = np.random.default_rng(n).uniform(6, 16, (10, 3))
        for kind, image, shift in (("0", fixed, 0.0), ("1", moving, SHIFT_MM * n / 4)):
            name = f"AbdomenMRCT_000{n}_000{kind}"
            write_volume(root / f"imagesTr/{name}.nii.gz", image)
            write_volume(root / f"labelsTr/{name}.nii.gz", halves(fixed, float(np.broadcast_to(2 * shift, 3)[0])))
            (root / "landmarksTr").mkdir(exist_ok=True)
            np.savetxt(root / f"landmarksTr/{name}.csv", points + shift, delimiter=",")
        entries.append({role: f"./imagesTr/AbdomenMRCT_000{n}_000{kind}.nii.gz" for role, kind in (("fixed", 0), ("moving", 1))})
    content = {"name": "AbdomenMRCT", "modality": {"0": "MR", "1": "CT"}, "registration_val": entries}
    (root / "AbdomenMRCT_dataset.json").write_text(json.dumps(content))
    return root


def printed(text: str) -> dict[tuple[str, str], list[str]]:
    """(method, pairs) -> the cells of its row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}


def test_rows_are_measured_once_and_stand_beside_the_quoted_ones(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(data), "--rows", "MIND;DINOv2 + MIND", "--scores", str(tmp_path / "scores.json"), *RANDOM]
    assert reproduce.main(arguments) == 0
    first = capsys.readouterr().out
    assert "preset abdomen-mrct" in first and "vits14_reg4:0: NOT DINOv2" in first
    table = printed(first)
    assert list(table)[:3] == [("no registration", "2"), ("MIND", "2"), ("DINOv2 + MIND", "2")]
    tre = [float(table[name, "2"][2]) for name in ("no registration", "MIND", "DINOv2 + MIND")]
    assert 3.5 < tre[0] < 4.5 and max(tre[1:]) < 1.5  # shifts of 2.7 and 5.4 mm; a voxel is 2 mm
    assert table["quoted: DINO-Reg", "8 public pairs"][:2] == ["0.782", "23.35"]
    monkeypatch.setattr(Registrar, "register", lambda *_, **__: pytest.fail("measured again"))
    assert reproduce.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_what_has_no_weights_is_named_and_the_rest_is_done(data: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    status = reproduce.main([str(data), "--pairs", "1", "--rows", "MIND;DINOv2", "--weights", str(tmp_path), "--device", "cpu"])
    captured = capsys.readouterr()
    assert status == 1 and "AbdomenMRCT, DINOv2: no weights" in captured.err
    assert ("MIND", "1") in printed(captured.out) and ("DINOv2", "0") in printed(captured.out)


@pytest.mark.slow  # 20 s of a core
def test_every_ablation_runs(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main([str(data), "--pairs", "1", "--ablations", *RANDOM]) == 1  # random weights are of one size
    captured = capsys.readouterr()
    table = printed(captured.out)
    names = [variant.name for variant in reproduce.variants(PRESETS["abdomen-mrct"], ablations=True)]
    unmeasured = {f"DINOv2, {arch}" for arch in reproduce.SIZES if arch != "vits14_reg4"}
    assert [name for name, _ in table][1:1 + len(names)] == names
    for name in names:
        assert (name, "0" if name in unmeasured else "1") in table, name
    assert captured.err.count("random weights are of vits14_reg4 alone") == len(unmeasured)


def test_each_ablation_is_one_change() -> None:
    rows = reproduce.variants(PRESETS["generic"], ablations=True)
    plain = {dataclasses.replace(row.config, encoder=EncoderConfig()) for row in rows[:4]}
    assert len({row.name for row in rows}) == len(rows) and len({row.config for row in rows[:4]}) == 4 == len(plain)
    for row in rows[4:]:
        ways = [[part for part in dataclasses.asdict(row.config) if getattr(row.config, part) != getattr(base.config, part)]
                for base in rows[:4]]
        assert min(map(len, ways)) <= 1, row.name  # none where the preset has that value itself


@pytest.mark.parametrize("arguments", [["--sets", "None"], ["--rows", "none"], ["--random-encoder", "vits14"]])
def test_what_does_not_exist_is_refused(data: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main([str(data), *arguments]) in (2, 3)
    assert capsys.readouterr().err.startswith("error: ")
