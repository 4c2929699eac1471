"""dinoreg check: all findings of all pairs, and nothing registered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dinoreg.__main__ import main
from dinoreg.validate import CODES

EXAMPLE = Path(__file__).parent / "input"


def dataset(folder: Path, arrays: dict[str, np.ndarray], pairs: list[tuple[str, str]]) -> Path:
    (folder / "imagesTr").mkdir(parents=True)
    for name, array in arrays.items():
        nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), folder / "imagesTr" / f"T_{name}.nii.gz")
    listed = [{"fixed": f"./imagesTr/T_{f}.nii.gz", "moving": f"./imagesTr/T_{m}.nii.gz"} for f, m in pairs]
    (folder / "T_dataset.json").write_text(json.dumps({"name": "T", "modality": {"0": "CT"}, "registration_val": listed}))
    return folder


def test_a_good_folder_is_ok(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(EXAMPLE)]) == 0
    assert "can be registered" in capsys.readouterr().out


def test_all_pairs_and_all_findings_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = np.random.default_rng(0).normal(size=(8, 9, 10))
    bad = good.copy()
    bad[0, 0, 0] = np.nan
    folder = dataset(tmp_path, {"0001_0000": good, "0002_0000": bad, "0003_0000": np.ones((8, 9, 10)), "0004_0000": good[:7]},
                     [("0001_0000", "0002_0000"), ("0003_0000", "0002_0000"), ("0001_0000", "0004_0000"),
                      ("0001_0000", "0001_0000")])
    before = sorted(tmp_path.rglob("*"))
    assert main(["check", str(folder)]) == 3
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert sum("[non-finite]" in line for line in lines) == 2 and sum("[constant]" in line for line in lines) == 1
    assert sum("[shape-mismatch]" in line for line in lines) == 1
    assert "of 4 pairs" in captured.err and sorted(tmp_path.rglob("*")) == before


def test_a_truncated_image_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "in")
    image = next((tmp_path / "in").rglob("*_0000.nii.gz"))
    image.write_bytes(image.read_bytes()[:2000])
    assert main(["check", str(tmp_path / "in")]) == 3
    assert image.name in capsys.readouterr().out


def test_what_readers_and_checks_find_is_said_at_once_with_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = np.random.default_rng(0).normal(size=(8, 9, 10))
    folder = dataset(tmp_path, {"0001_0000": good, "0002_0000": np.ones((8, 9, 10))}, [("0001_0000", "0002_0000")])
    image = folder / "imagesTr" / "T_0001_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:500])
    assert main(["check", str(folder)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "error: " in lines[0] and "[unreadable]" in lines[0] and "[constant]" in lines[1]


def test_modalities_are_those_of_the_data_set_and_then_of_the_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = np.random.default_rng(0).normal(size=(8, 9, 10)) + 9
    folder = dataset(tmp_path, {"0001_0000": good, "0001_0001": good}, [("0001_0000", "0001_0001")])  # _0000 is a CT
    assert main(["check", str(folder)]) == 0
    assert capsys.readouterr().out.count("[not-hu]") == 1
    assert main(["check", str(folder), "--preset", "abdomen-mrct"]) == 0
    assert capsys.readouterr().out.count("[not-hu]") == 2
    assert main(["check", str(folder), "--preset", "none"]) == 2


DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside the checkout")
@pytest.mark.parametrize("name", [name if name != "OASISx" else pytest.param(name, marks=pytest.mark.slow) for name in (
    "ThoraxCBCTsim", "AbdomenMRCTx", "AbdomenMRCTsim", "BrainMNIColin", "HippocampusMR", "BrainT1T2sim", "OASISx")])
def test_sound_data_raise_no_alarm(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(DATA / name)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1 and lines[-1].endswith("0 warnings") and all(line.endswith(": ok") for line in lines[:-1])


def test_every_code_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "checks.md").read_text()
    listed = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(listed) == set(CODES)
    for code, meaning in CODES.items():
        assert meaning.removeprefix("warning: ") in listed[code]
        assert ("| warning |" in listed[code]) == meaning.startswith("warning")
