"""docs/tuning.md: its millimetres are those of the presets, its warnings those of the program, its code runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from small_pair import QUICK, small_pair

from dinoreg.config import PRESETS
from dinoreg.io import write_volume
from dinoreg.result import Registration

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs/tuning.md").read_text(encoding="utf-8")
SIDE_MM, VOXEL_MM = 384.0, 2.0


def rows(header: str) -> list[list[str]]:
    (found,) = re.findall(rf"^\| {header} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()]


def test_its_presets_are_those_of_the_package() -> None:
    assert {row[1].strip("`") for row in rows("data")} == set(PRESETS)


def test_its_millimetres_are_those_of_the_presets() -> None:
    told = {row[0].strip("`"): row[1:] for row in rows("preset")}
    composed = {name: preset for name, preset in PRESETS.items() if preset.solver == "composed"}
    assert set(told) == set(composed)
    for name, preset in composed.items():
        search = [f"{SIDE_MM / cells:g} mm, {reach * SIDE_MM / cells:g} mm" for cells, _, reach in preset.discrete.levels]
        refined = ", ".join(f"{factor * VOXEL_MM:g}" for factor, _ in preset.refine.levels)
        assert told[name] == ["; then ".join(search), f"{refined} mm"]


def test_its_other_numbers_are_those_of_the_configuration() -> None:
    generic = PRESETS["generic"]
    assert f"is {generic.encoder.long_side_tokens} tokens long" in GUIDE and f"are {generic.encoder.gap_mm:g} mm apart" in GUIDE
    assert f"stands for {350 / generic.encoder.long_side_tokens:.1f} mm" in GUIDE
    assert generic.refine.rate == 0.25 and "a quarter of a cell a step" in GUIDE


def test_its_warnings_are_those_of_the_program() -> None:
    program = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "dinoreg").glob("*.py")))
    program = re.sub(r'"\s*f?"', "", program)  # texts over several lines
    for row in rows("it says"):
        for text in row[0].split(", " if ", " in row[0] else "\n"):
            for part in text.split(" ... "):
                assert part in program, part


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PRESETS:
        monkeypatch.setitem(PRESETS, name, dataclasses.replace(QUICK, preset=name))
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("fixed", "moving"), small_pair(), strict=True):
        write_volume(tmp_path / f"{name}.nii.gz", image)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(compile(block, "docs/tuning.md", "exec"), names)
    assert isinstance(names["result"], Registration) and names["config"].refine.regularity == 2.0
    assert names["registrar"].encoder.arch == "mae_vitb16" and names["registrar"].encoder.patch == 16
