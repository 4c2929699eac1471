"""process.py from folder to folder: both contracts, failures of one pair and of the run, signals, the OncoReg scripts."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

import process
from dinoreg import qc
from dinoreg.config import Config, DiscreteConfig, RefineConfig
from dinoreg.errors import RegistrationError, WeightsError
from dinoreg.io import write_text, write_volume
from dinoreg.registration import Registrar
from dinoreg.result import Registration
from dinoreg.volume import Volume

ROOT = Path(__file__).resolve().parent.parent
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 3.0, -50], [0, 0, 0, 1]])  # LPS
SHAPE = (10, 12, 8)
SHIFT = np.array([1.0, -2.0, 1.5], dtype=np.float32)
DRAW = qc.write_qc


@dataclasses.dataclass(frozen=True, eq=False)
class StubRegistration(Registration):
    """A constant shift as the result."""

    fixed_affine: np.ndarray = dataclasses.field(default_factory=lambda: AFFINE)
    stages: dict[str, dict[str, float]] = dataclasses.field(default_factory=lambda: {"solve": {"seconds": 0.5}})
    info: dict[str, Any] = dataclasses.field(default_factory=lambda: {"features": "stub"})

    def warp(self, volume: Volume, order: str = "linear") -> Volume:
        return volume


class StubRegistrar:
    """In place of the engine: notes what it is asked, returns a shift, or fails where a test says so."""

    def __init__(self, fail: dict[int, BaseException] | None = None) -> None:
        self.fail = fail or {}
        self.calls: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {}
        self.engine = {"device": "stub"}

    def __call__(self, config: Any, **options: Any) -> StubRegistrar:  # the factory returns itself
        self.options = {"config": config, **options}
        return self

    def register(self, fixed: Volume, moving: Volume, **options: Any) -> StubRegistration:
        self.calls.append({"fixed": fixed, "moving": moving, **options})
        if len(self.calls) - 1 in self.fail:
            raise self.fail[len(self.calls) - 1]
        return StubRegistration(np.broadcast_to(SHIFT[:, None, None, None], (3, *fixed.shape)).copy())


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith(("DINOREG_", "ONCOREG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(qc, "write_qc", lambda path, *_, title, summary: write_text(path, f"{title}\n{summary}"))  # a second less
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    logging.captureWarnings(False)


def _volume(seed: int, shape: tuple[int, int, int] = SHAPE) -> Volume:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return Volume((1000 * noise / noise.std() / 3).astype(np.int16), AFFINE)


def _dataset(folder: Path, pairs: int = 1, shape: tuple[int, int, int] = SHAPE, name: str = "Task") -> Path:
    entries = []
    for n in range(1, pairs + 1):
        entry = {"fixed": f"./imagesTr/{name}_{n:04d}_0001.nii.gz", "moving": f"./imagesTr/{name}_{n:04d}_0000.nii.gz"}
        for seed, path in enumerate(entry.values()):
            write_volume(folder / path, _volume(10 * n + seed, shape))
        entries.append(entry)
    _write_json(folder, entries, name)
    return folder


def _write_json(folder: Path, entries: list[dict[str, str]], name: str = "Task") -> None:
    content = {"name": name, "modality": {"0": "CT (FBCT)", "1": "CBCT (simulated)"}, "registration_val": entries,
               "registration_test": []}
    (folder / f"{name}_dataset.json").write_text(json.dumps(content))


def _single(folder: Path, *, masks: bool = False) -> Path:
    write_volume(folder / "images/fixed/f.mha", _volume(1))
    write_volume(folder / "images/moving/m.mha", _volume(2))
    if masks:
        for n, role in enumerate(("fixed-mask", "moving-mask")):
            write_volume(folder / f"images/{role}/x.mha", Volume((_volume(n).array > 0).astype(np.uint8), AFFINE))
    return folder


def _run(source: Path, output: Path, *options: str, registrar: StubRegistrar | None = None) -> int:
    arguments = ["--input", str(source), "--output", str(output), *options]
    return process.main(arguments, registrar_factory=registrar or StubRegistrar())


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


# --- the two contracts --------------------------------------------------------------------------------------------------------


def test_learn2reg_folder_gives_a_field_a_pair_and_the_report(tmp_path: Path) -> None:
    registrar = StubRegistrar()
    assert _run(_dataset(tmp_path / "in", 2), tmp_path / "out", registrar=registrar) == 0
    assert _files(tmp_path / "out") == ["disp_0001_0001_0001_0000.nii.gz", "disp_0002_0001_0002_0000.nii.gz",
                                        "qc/0001_0001_0001_0000.png", "qc/0002_0001_0002_0000.png",
                                        "records/0001_0001_0001_0000.json", "records/0002_0001_0002_0000.json", "report.json",
                                        "warped/warped_0001_0001_0001_0000.nii.gz", "warped/warped_0002_0001_0002_0000.nii.gz"]
    image = nib.load(tmp_path / "out" / "disp_0001_0001_0001_0000.nii.gz")
    assert image.shape == (*SHAPE, 3) and image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(image.dataobj)[3, 4, 5], SHIFT)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)  # float32 header
    assert registrar.calls[0]["modalities"] == ["CBCT", "CT"] and registrar.calls[0]["colours"] is True  # for the picture
    np.testing.assert_array_equal(registrar.calls[0]["fixed"].array, _volume(10).array)  # file 0 of pair 1 is the fixed one
    np.testing.assert_array_equal(registrar.calls[1]["moving"].array, _volume(21).array)


def test_single_pair_gives_exactly_one_scalar_field(tmp_path: Path) -> None:
    registrar = StubRegistrar()
    assert _run(_single(tmp_path / "in", masks=True), tmp_path / "out", registrar=registrar) == 0
    assert _files(tmp_path / "out") == ["images/displacement-field/displacement-field.mha", "report.json"]
    image = sitk.ReadImage(str(tmp_path / "out/images/displacement-field/displacement-field.mha"))
    assert image.GetSize() == (*SHAPE, 3) and image.GetPixelID() == sitk.sitkFloat32  # a scalar type, not a vector's
    np.testing.assert_array_equal([image[3, 4, 5, c] for c in range(3)], SHIFT)
    assert registrar.calls[0]["fixed_mask"].array.any() and registrar.calls[0]["moving_mask"].array.any()


def test_vector_field_and_sockets_can_be_chosen_by_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_single(tmp_path / "in") / "images/fixed").rename(tmp_path / "in/images/cbct")
    (tmp_path / "in/inputs.json").write_text("[]")
    monkeypatch.setenv("DINOREG_SOCKETS", "fixed=cbct,displacement-field=motion")
    monkeypatch.setenv("DINOREG_VECTOR_FIELD", "1")
    monkeypatch.setenv("DINOREG_INPUT", str(tmp_path / "in"))
    monkeypatch.setenv("DINOREG_OUTPUT", str(tmp_path / "out"))
    assert process.main([], registrar_factory=StubRegistrar()) == 0
    image = sitk.ReadImage(str(tmp_path / "out/images/motion/motion.mha"))
    assert image.GetSize() == SHAPE and image.GetNumberOfComponentsPerPixel() == 3
    np.testing.assert_array_equal(image[3, 4, 5], SHIFT)


def test_input_may_be_a_symbolic_link(tmp_path: Path) -> None:
    _dataset(tmp_path / "real")
    (tmp_path / "in").symlink_to(tmp_path / "real")
    assert _run(tmp_path / "in", tmp_path / "out") == 0


def test_short_name_holds_the_same_bytes(tmp_path: Path) -> None:
    for n in (0, 1):
        write_volume(tmp_path / f"in/imagesTr/NLST_0001_{n:04d}.nii.gz", _volume(n))
    _write_json(tmp_path / "in", [{"fixed": "imagesTr/NLST_0001_0000.nii.gz", "moving": "imagesTr/NLST_0001_0001.nii.gz"}])
    assert _run(tmp_path / "in", tmp_path / "out") == 0
    names = ("disp_0001_0000_0001_0001.nii.gz", "disp_0001_0001.nii.gz")
    assert len({hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() for name in names}) == 1


def test_pair_of_one_shape_with_two_headers_is_taken_voxel_by_voxel(tmp_path: Path) -> None:
    source = _dataset(tmp_path / "in")
    other = AFFINE.copy()
    other[:3, 3] += 100
    write_volume(source / "imagesTr/Task_0001_0000.nii.gz", Volume(_volume(3).array, other))
    registrar = StubRegistrar()
    assert _run(source, tmp_path / "out", registrar=registrar) == 0
    assert registrar.calls[0]["moving"].same_grid(registrar.calls[0]["fixed"])
    assert "affine-mismatch" in _report(tmp_path / "out")["pairs"][0]["warnings"][0]


def test_masks_beside_the_images_reach_the_engine(tmp_path: Path) -> None:
    source = _dataset(tmp_path / "in")
    write_volume(source / "masksTr/Task_0001_0000.nii.gz", Volume(np.ones(SHAPE, np.uint8), AFFINE))
    registrar = StubRegistrar()
    assert _run(source, tmp_path / "out", registrar=registrar) == 0
    assert registrar.calls[0]["fixed_mask"] is None and registrar.calls[0]["moving_mask"].array.all()


def test_options_reach_the_engine(tmp_path: Path) -> None:
    registrar = StubRegistrar()
    options = ["--preset", "generic", "--features", "mind", "--weights", "w", "--device", "cpu", "--threads", "2",
               "--time-limit", "60", "--max-memory", "8G"]
    assert _run(_dataset(tmp_path / "in"), tmp_path / "out", *options, registrar=registrar) == 0
    assert registrar.options.pop("config").features == "mind"
    assert "features mind in place of the preset's" in _report(tmp_path / "out")["warnings"][0]
    assert registrar.options == {"weights": Path("w"), "device": "cpu", "threads": 2, "time_limit": 60.0, "max_memory": 2**33}


def test_preset_follows_the_data_set_unless_it_is_chosen(tmp_path: Path) -> None:
    assert _run(_dataset(tmp_path / "in", name="ThoraxCBCT"), tmp_path / "out") == 0
    assert _report(tmp_path / "out")["preset"] == "thorax-cbct"
    assert _run(tmp_path / "in", tmp_path / "out", "--preset", "generic") == 0
    assert _report(tmp_path / "out")["preset"] == "generic"


# --- the report ---------------------------------------------------------------------------------------------------------------


def test_report_says_what_is_needed_to_repeat_and_to_judge_a_run(tmp_path: Path) -> None:
    assert _run(_dataset(tmp_path / "in"), tmp_path / "out") == 0
    report = _report(tmp_path / "out")
    assert (report["status"], report["exit_code"], report["contract"], report["dataset"], report["split"]) == (
        "complete", 0, "learn2reg", "Task", "val")
    assert report["config"]["features"] and report["environment"]["packages"]["torch"]
    (pair,) = report["pairs"]
    for group, folder in (("inputs", tmp_path / "in"), ("outputs", tmp_path / "out")):
        for record in pair[group].values() if group == "inputs" else pair[group]:
            assert hashlib.sha256((folder / record["file"]).read_bytes()).hexdigest() == record["sha256"]
    assert list(pair["stages"]) == ["read", "solve", "write", "metrics", "picture"]
    # a constant shift of (1, -2, 1.5) voxels at 2, 2 and 3 mm: sqrt(4 + 16 + 20.25) mm everywhere, no change of volume
    assert pair["field"]["displacement_mean_mm"] == pytest.approx(40.25**0.5, abs=1e-5)
    assert pair["field"]["folds_percent"] == 0 and pair["field"]["sdlogj"] == 0 and pair["field"]["jacobian_min"] == 1


def test_picture_carries_pair_preset_and_what_is_known_of_the_field(tmp_path: Path) -> None:
    assert _run(_dataset(tmp_path / "in"), tmp_path / "out") == 0
    title, summary = (tmp_path / "out/qc/0001_0001_0001_0000.png").read_text().splitlines()
    assert title == "0001_0001_0001_0000, preset thorax-cbct, features dinov2+mind"
    # the shift of the report's test: 6.34 mm everywhere
    assert summary == "whole field: mean displacement 6.3 mm, largest 6.3 mm, folds 0.000 %, SDlogJ 0.000; no warnings"


def test_picture_that_cannot_be_drawn_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no fonts")

    monkeypatch.setattr(qc, "write_qc", fail)
    assert _run(_dataset(tmp_path / "in"), tmp_path / "out") == 0
    (pair,) = _report(tmp_path / "out")["pairs"]
    assert pair["warnings"] == ["qc/0001_0001_0001_0000.png could not be drawn (no fonts)"]
    assert [record["file"] for record in pair["outputs"]] == ["warped/warped_0001_0001_0001_0000.nii.gz",
                                                              "disp_0001_0001_0001_0000.nii.gz"]


def test_drawing_is_loaded_when_it_is_needed() -> None:
    code = "import sys, process; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_report_of_an_earlier_run_is_removed_before_work_starts(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text("{}")
    assert _run(tmp_path / "nothing", tmp_path / "out") == 3
    assert _files(tmp_path / "out") == []


# --- failures -----------------------------------------------------------------------------------------------------------------


def test_failing_pairs_do_not_stop_the_others_and_the_first_sets_the_exit_code(tmp_path: Path,
                                                                               capsys: pytest.CaptureFixture[str]) -> None:
    source = _dataset(tmp_path / "in", 4)
    registrar = StubRegistrar({0: RegistrationError("no match"), 2: ValueError("defect")})
    (source / "imagesTr/Task_0004_0000.nii.gz").unlink()
    assert _run(source, tmp_path / "out", registrar=registrar) == 6
    assert [name for name in _files(tmp_path / "out") if name.startswith("disp")] == ["disp_0002_0001_0002_0000.nii.gz"]
    report = _report(tmp_path / "out")
    assert [pair.get("error", {}).get("exit_code") for pair in report["pairs"]] == [6, None, 1, 3]
    assert (report["status"], report["exit_code"], report["pairs_failed"]) == ("failed", 6, 3)
    captured = capsys.readouterr()
    assert captured.err == "dinoreg: 3 of 4 pairs failed; 0001_0001_0001_0000: no match\n"
    assert "Traceback" in captured.out  # of the defect, in the log


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _replace(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: nib.Nifti1Image(array, AFFINE).to_filename(path)


def _zero_spacing(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[80:84] = bytes(4)  # pixdim[1]
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.parametrize(("spoil", "message"), [
    (Path.unlink, "no such file"),
    (_truncate, "truncated"),
    (_replace(np.full(SHAPE, np.nan, np.float32)), "NaN"),
    (_replace(np.full(SHAPE, 7, np.int16)), "the value 7 everywhere"),
    (_replace(np.ones((10, 12), np.int16)), "expected a 3D image"),
    (_replace(np.ones((10, 12, 8, 2), np.int16)), "expected a 3D image"),
    (_replace(np.arange(10 * 12, dtype=np.int16).reshape(10, 12, 1)), "not a slice"),
    (_replace(_volume(0, (9, 12, 8)).array), "images of one shape"),
    (_zero_spacing, "positive spacing"),
], ids=["missing", "truncated", "NaN", "constant", "2D", "4D", "slice", "shape", "zero spacing"])
def test_bad_image_fails_its_pair_with_one_line_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                              spoil: Callable[[Path], None], message: str) -> None:
    source = _dataset(tmp_path / "in", 2)
    spoil(source / "imagesTr/Task_0001_0001.nii.gz")
    assert _run(source, tmp_path / "out") == 3
    assert [name for name in _files(tmp_path / "out") if "disp" in name] == ["disp_0002_0001_0002_0000.nii.gz"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert "0001_0001" in lines[0]


def test_all_that_is_wrong_with_a_pair_is_told_at_once(tmp_path: Path) -> None:
    source = _dataset(tmp_path / "in")
    _truncate(source / "imagesTr/Task_0001_0001.nii.gz")
    _replace(np.full(SHAPE, np.inf, np.float32))(source / "imagesTr/Task_0001_0000.nii.gz")
    write_volume(source / "masksTr/Task_0001_0000.nii.gz", Volume(np.zeros(SHAPE, np.uint8), AFFINE))
    assert _run(source, tmp_path / "out") == 3
    message = _report(tmp_path / "out")["pairs"][0]["error"]["message"]
    assert "truncated" in message and "[non-finite]" in message and "[mask-empty]" in message


def test_pair_listed_twice_is_done_once_and_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _dataset(tmp_path / "in")
    entries = json.loads((source / "Task_dataset.json").read_text())["registration_val"]
    _write_json(source, entries * 2)
    registrar = StubRegistrar()
    assert _run(source, tmp_path / "out", registrar=registrar) == 3
    assert len(registrar.calls) == 1 and (tmp_path / "out/disp_0001_0001_0001_0000.nii.gz").is_file()
    assert "registration_val[0] and again as registration_val[1]" in capsys.readouterr().err


def test_field_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    class Broken(StubRegistrar):
        def register(self, fixed: Volume, moving: Volume, **options: Any) -> StubRegistration:
            return StubRegistration(np.full((3, *fixed.shape), np.nan, np.float32))

    assert _run(_single(tmp_path / "in"), tmp_path / "out", registrar=Broken()) == 6
    assert _files(tmp_path / "out") == ["report.json"]


@pytest.mark.parametrize(("options", "code", "message"), [
    (["--preset", "none-such"], 2, "none-such"), (["--mode", "both"], 2, "mode 'both'"), (["--split", "all"], 2, "split 'all'"),
    (["--split", "test"], 3, "registration_test"), (["--mode", "single"], 3, "images/fixed"),
    (["--sockets", "x"], 2, "ROLE=SLUG"), (["--features", "sift"], 2, "sift"), (["--threads", "many"], 2, "--threads"),
    (["--colour", "2"], 2, "--colour"),
])
def test_wrong_options_end_the_run_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str],
                                                 code: int, message: str) -> None:
    assert _run(_dataset(tmp_path / "in"), tmp_path / "out", *options) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert _files(tmp_path / "out") == []


@pytest.mark.parametrize(("options", "code", "message"), [
    (["--device", "tpu"], 2, "device must be auto, cpu or cuda"), (["--threads", "0"], 2, "at least 1"),
    (["--features", "dinov2", "--weights", "no-such-folder"], 4, "no-such-folder (no such folder)"),
])
def test_what_the_engine_refuses_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int,
                                              message: str) -> None:
    arguments = ["--input", str(_dataset(tmp_path / "in")), "--output", str(tmp_path / "out"), "--features", "mind", *options]
    assert process.main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert _files(tmp_path / "out") == []


@pytest.mark.parametrize(("content", "message"), [
    (None, "nothing of this name"), ("", "a file"), ({}, "got neither"),
    ({"Task_dataset.json": "{"}, "expected JSON"), ({"Task_dataset.json": "{}"}, "no other split has any"),
    ({"A_dataset.json": "{}", "B_dataset.json": "{}"}, "got A_dataset.json, B_dataset.json"),
    ({"A_dataset.json": "{}", "inputs.json": "[]"}, "got A_dataset.json, inputs.json"),
], ids=["missing", "file", "empty", "no JSON", "no pairs", "two data sets", "two contracts"])
def test_folder_that_asks_for_nothing_clear_ends_the_run_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                       content: Any, message: str) -> None:
    if isinstance(content, dict):
        (tmp_path / "in").mkdir()
        for name, text in content.items():
            (tmp_path / "in" / name).write_text(text)
    elif content is not None:
        (tmp_path / "in").write_text(content)
    assert _run(tmp_path / "in", tmp_path / "out") == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and str(tmp_path / "in") in lines[0]
    assert _files(tmp_path / "out") == []


def test_missing_weights_end_the_run_before_any_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def factory(config: Any, **options: Any) -> Any:
        raise WeightsError("x.pth: no such file; fetch it with ...")

    arguments = ["--input", str(_dataset(tmp_path / "in")), "--output", str(tmp_path / "out")]
    assert process.main(arguments, registrar_factory=factory) == 4
    assert capsys.readouterr().err == "dinoreg: x.pth: no such file; fetch it with ...\n"
    assert _files(tmp_path / "out") == []


def test_output_that_cannot_be_written_ends_the_run_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    registrar = StubRegistrar()
    assert _run(_dataset(tmp_path / "in"), tmp_path / "out", registrar=registrar) == 5
    assert registrar.calls == [] and len(capsys.readouterr().err.splitlines()) == 1
    assert _run(tmp_path / "in", tmp_path / "out2", "--log", str(tmp_path / "out/x.log")) == 5


def test_output_lost_on_the_way_fails_the_pair_and_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/warped").write_text("in the way")
    assert _run(_dataset(tmp_path / "in"), tmp_path / "out") == 5
    assert _files(tmp_path / "out") == ["records/0001_0001_0001_0000.json", "report.json", "warped"]


def test_disk_that_fills_up_fails_the_pair_and_leaves_no_half_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _single(tmp_path / "in")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))  # the field takes 11520 bytes, the report about 5000
    try:
        assert _run(source, tmp_path / "out") == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _files(tmp_path / "out") == ["report.json"]
    assert "displacement-field.mha: cannot be written" in capsys.readouterr().err.splitlines()[-1]


# --- with the real engine -----------------------------------------------------------------------------------------------------

ENGINE = ("--features", "mind", "--device", "cpu", "--threads", "1")


def _moved_pairs(folder: Path, affine: np.ndarray, shift: tuple[int, int, int] = (1, -2, 1), pairs: int = 1,
                 shape: tuple[int, int, int] = (16, 15, 14)) -> Path:
    """Pairs whose true field is ``shift`` voxels everywhere: fixed(x) = moving(x + shift)."""
    entries = []
    for n in range(1, pairs + 1):
        scene = ndimage.gaussian_filter(np.random.default_rng(n).normal(size=[size + 16 for size in shape]), 2.0)
        scene = (1000 * scene / np.abs(scene).max()).astype(np.int16)
        entries.append({})
        for role, modality, by in (("moving", 0, (0, 0, 0)), ("fixed", 1, shift)):
            crop = tuple(slice(8 + s, 8 + s + size) for s, size in zip(by, shape, strict=True))
            entries[-1][role] = f"./imagesTr/Task_{n:04d}_{modality:04d}.nii.gz"
            write_volume(folder / entries[-1][role], Volume(scene[crop], affine))
    _write_json(folder, entries)
    return folder


def _quick(config: Config, **options: Any) -> Registrar:
    """The engine with a coarser search and fewer iterations: enough for a whole image that moves as one."""
    search = DiscreteConfig(levels=((14, 1, 3),))
    return Registrar(dataclasses.replace(config, discrete=search, refine=RefineConfig(levels=((2, 20), (1, 20)))), **options)


@pytest.mark.parametrize("header", ["RAS", "LAS", "LPS", "oblique"])
def test_known_shift_comes_back_in_the_scorers_convention(tmp_path: Path, header: str) -> None:
    directions = {"RAS": np.eye(3), "LAS": np.diag([-1, 1, 1]), "LPS": np.diag([-1, -1, 1]),
                  "oblique": np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])}
    affine = np.eye(4)
    affine[:3, :3] = directions[header] * 2.0
    source = _moved_pairs(tmp_path / "in", affine, shift=(2, -3, 1), shape=(26, 24, 22))
    assert process.main(["--input", str(source), "--output", str(tmp_path / "out"), *ENGINE], registrar_factory=_quick) == 0
    disp = np.asarray(nib.load(tmp_path / "out/disp_0001_0001_0001_0000.nii.gz").dataobj)
    inner = (slice(6, -6),) * 3  # 6 voxels from the edge, where both images show the same: the shift is 3 at most
    # a swapped axis or a wrong sign is off by 1 to 6 voxels; 0.2 leaves room for the solver's own error, which is about 0.01
    np.testing.assert_allclose(np.median(disp[inner].reshape(-1, 3), axis=0), (2, -3, 1), atol=0.2)
    fixed, moving, warped = (np.asarray(nib.load(path).dataobj) for path in (
        source / "imagesTr/Task_0001_0001.nii.gz", source / "imagesTr/Task_0001_0000.nii.gz",
        tmp_path / "out/warped/warped_0001_0001_0001_0000.nii.gz"))
    assert warped.dtype == moving.dtype
    before, after = (np.corrcoef(image[inner].ravel(), fixed[inner].ravel())[0, 1] for image in (moving, warped))
    assert after > 0.98 > before


def test_second_run_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qc, "write_qc", DRAW)
    source = _moved_pairs(tmp_path / "in", AFFINE)
    for out in ("a", "b"):
        assert process.main(["--input", str(source), "--output", str(tmp_path / out), *ENGINE]) == 0
    names = [name for name in _files(tmp_path / "a") if not name.endswith(".json")]  # reports hold seconds
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_sigterm_ends_the_run_within_seconds_and_keeps_whole_files(tmp_path: Path) -> None:
    source = _moved_pairs(tmp_path / "in", AFFINE, pairs=30)
    output = tmp_path / "out"
    command = [sys.executable, str(ROOT / "process.py"), "--input", str(source), "--output", str(output), *ENGINE]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        try:
            deadline = time.monotonic() + 120
            while not list(output.glob("disp_*")) and running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            running.send_signal(signal.SIGTERM)
            _, errors = running.communicate(timeout=10)  # as long as a container engine waits before it kills
        finally:
            running.kill()
    assert running.returncode == 143, errors
    assert errors.splitlines()[-1] == "dinoreg: ended by SIGTERM; finished pairs are kept"
    finished = [name for name in _files(output) if not name.startswith(("warped/", "qc/"))]
    assert finished and "report.json" not in finished
    for path in output.rglob("*.nii.gz"):  # whole, every one; and no temporary file besides
        gzip.decompress(path.read_bytes())
    assert all(path.suffix in (".gz", ".png") and not path.name.startswith(".") for path in output.rglob("*") if path.is_file())


# --- the OncoReg scripts ------------------------------------------------------------------------------------------------------


def _script(folder: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    places = {f"ONCOREG_{place.upper()}": str(folder / place) for place in ("data", "model", "results")}
    return subprocess.run([f"./{name}", *arguments], cwd=ROOT / "oncoreg", env={**os.environ, "PYTHON": sys.executable, **places,
                          **variables}, capture_output=True, text=True, timeout=120, check=False)


def test_oncoreg_test_script_writes_fields_and_log_to_results(tmp_path: Path) -> None:
    _moved_pairs(tmp_path / "data/Task", AFFINE)
    done = _script(tmp_path, "test.sh", "Task", "Val", DINOREG_FEATURES="mind", DINOREG_THREADS="1", DINOREG_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    assert {"disp_0001_0001_0001_0000.nii.gz", "report.json", "debug.log"} <= set(_files(tmp_path / "results"))
    assert "0001_0001_0001_0000" in (tmp_path / "results/debug.log").read_text()


@pytest.mark.parametrize(("name", "arguments"), [("test.sh", ["Task"]), ("train.sh", [])])
def test_oncoreg_scripts_say_how_they_are_called(tmp_path: Path, name: str, arguments: list[str]) -> None:
    done = _script(tmp_path, name, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"usage: ./{name} TASK")


def test_oncoreg_train_script_fails_without_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    done = _script(tmp_path, "train.sh", "OncoReg")
    assert done.returncode == 4, done.stderr
    assert done.stderr.splitlines()[-1].removeprefix("dinoreg: ") in (tmp_path / "results/debug.log").read_text()


def test_oncoreg_train_script_says_that_the_weights_are_ready(tmp_path: Path) -> None:
    """With the loading replaced: the checkpoint itself is not at hand in a test."""
    (tmp_path / "sitecustomize.py").write_text("import dinoreg.registration\n"
                                               "dinoreg.registration.load_encoder = lambda *arguments, **options: object()\n")
    done = _script(tmp_path, "train.sh", "OncoReg", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr
    assert "nothing to train; the weights for preset thorax-cbct are ready" in (tmp_path / "results/debug.log").read_text()


def test_input_folder_that_may_not_be_read_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "in"))  # root may read everything

    monkeypatch.setattr(process, "find_job", refuse)
    (tmp_path / "in").mkdir()
    assert process.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--features", "mind"]) == 3
    assert f"{tmp_path / 'in'}: expected an input that can be read; got: Permission denied" in capsys.readouterr().err
