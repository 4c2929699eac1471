"""docs/example.md: its code runs as it stands, and what it says of the result is so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoreg.config import PRESETS, DiscreteConfig, RefineConfig
from dinoreg.result import FILES

ROOT = Path(__file__).resolve().parent.parent


def test_the_walk_through_runs_and_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    # a coarser search and few steps, all on coarse lattices: seconds in place of a minute, at half the accuracy
    quick = dataclasses.replace(PRESETS["thorax-cbct"], discrete=DiscreteConfig(levels=((24, 2, 3),)),
                                refine=RefineConfig(levels=((4, 20),), lncc=1.0, features=0.0, regularity=2.0))
    monkeypatch.setitem(PRESETS, "thorax-cbct", quick)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").symlink_to(ROOT / "test")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/example.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, "docs/example.md", "exec"), names)
    assert names["before"].mean() > 6 and names["after"].mean() < 0.5 * names["before"].mean()
    assert {path.name for path in (tmp_path / "example-output").iterdir()} == set(FILES)
    # the inverse is solved to 0.01 voxel of 3 mm; the rest is interpolation between its voxels
    assert np.linalg.norm(names["there_and_back"] - names["landmarks"][0], axis=1).max() < 1
    assert np.median(names["difference"]) <= 1  # both round to whole HU
    printed = capsys.readouterr().out
    assert "refine: 20 of 20" in printed and "example-output/transform.h5" in printed
