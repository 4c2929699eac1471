"""The container check's own judgement, and the field that it expects. The check itself is `./test.sh --container`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from container.cases import FIELD, write_learn2reg, write_single
from container.check import without_times
from container.fields import QUANTUM, STEP, Field, compare, load_field, save_expected

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = ROOT / "test" / "expected" / "learn2reg.npz"


def expected_field() -> Field:
    """A full field that agrees with the expected one at the voxels that are kept."""
    with np.load(EXPECTED) as stored:
        full = stored["disp"].astype(np.float32) * np.float32(QUANTUM)
        shape = tuple(stored["shape"])
    for axis in (1, 2, 3):
        full = np.repeat(full, STEP, axis=axis)
    return full[:, : shape[1], : shape[2], : shape[3]]


def test_field_as_expected_passes() -> None:
    problems, found = compare(expected_field(), EXPECTED)
    assert problems == []
    assert found["max"] == 0


def test_rounding_passes() -> None:
    noise = np.random.default_rng(0).normal(0, 0.002, expected_field().shape).astype(np.float32)  # tenfold what threads change
    assert compare(expected_field() + noise, EXPECTED)[0] == []


@pytest.mark.parametrize("fault", [
    lambda disp: -disp,
    lambda disp: disp[[1, 0, 2]],
    lambda disp: disp + np.float32(0.5),
    lambda disp: np.zeros_like(disp),
    lambda disp: np.roll(disp, 3, axis=1),
    lambda disp: np.where(np.arange(disp.shape[1])[None, :, None, None] == 3 * STEP, disp + 1, disp),
    lambda disp: disp * np.float32(np.nan),
    lambda disp: disp[:, :-1],
])
def test_broken_field_fails(fault) -> None:
    assert compare(fault(expected_field()), EXPECTED)[0]


def test_broken_expected_file_fails(tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    save_expected(broken, expected_field()[::-1])
    problems, _ = compare(expected_field(), broken)
    assert any("differs from broken.npz" in problem for problem in problems)


def test_reports_are_compared_but_for_times() -> None:
    report = {"seconds": 3, "config": {"rate": 1}, "pairs": [{"stages": {"read": {"seconds": 1, "peak_rss_mb": 2}}}]}
    assert without_times(report) == {"config": {"rate": 1}, "pairs": [{"stages": {"read": {}}}]}


def test_single_pair_is_the_same_pair(tmp_path: Path) -> None:
    import nibabel
    import SimpleITK

    write_learn2reg(tmp_path / "learn2reg")
    write_single(tmp_path / "single", tmp_path / "learn2reg")
    (nifti,) = (tmp_path / "learn2reg" / "imagesTr").glob("*_0001.nii.gz")
    image = SimpleITK.ReadImage(str(tmp_path / "single" / "images" / "fixed" / "a1b2.mha"))
    np.testing.assert_array_equal(np.asarray(nibabel.load(nifti).dataobj), SimpleITK.GetArrayFromImage(image).T)


def test_expected_field_is_what_comes_out(tmp_path: Path) -> None:
    """So that a change of the engine is noticed here and not first in the container; tools/make_expected.py renews it."""
    write_learn2reg(tmp_path / "input")
    (tmp_path / "output").mkdir()
    subprocess.run([sys.executable, str(ROOT / "process.py"), "--input", str(tmp_path / "input"), "--output",
                    str(tmp_path / "output"), "--features", "mind", "--threads", "1"], check=True, capture_output=True,
                   env={**os.environ, "DINOREG_PRESET": ""})
    problems, _ = compare(load_field(tmp_path / "output" / FIELD), EXPECTED)
    assert problems == []
