"""``dinoreg register``: files in, a folder out; lists of pairs; failures; nothing left of an earlier run."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from fake_encoder import affine
from matplotlib.image import imread
from small_pair import QUICK, SHIFT_MM, UNMOVED, scan, small_pair
from test_dicom import write_series
from test_truth import FIXED, MOVING, POINTS, halves, write

from dinoreg import htmlreport, qc, registration
from dinoreg.__main__ import main
from dinoreg.align import Alignment
from dinoreg.config import PRESETS, Config, EncoderConfig
from dinoreg.errors import ConfigError
from dinoreg.io import read_volume, write_text, write_volume
from dinoreg.registration import Registrar
from dinoreg.result import CONFIDENCE, FILES, Registration
from dinoreg.transforms import read_transform
from dinoreg.volume import Volume
from dinoreg.weights import random_encoder

PAGE, PICTURE = htmlreport.write_html_report, qc.write_qc
WRITTEN = {*FILES, "qc.png", "report.html", "report.json"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registration, "align", lambda *_: UNMOVED)  # a second less
    monkeypatch.setitem(PRESETS, "generic", QUICK)
    monkeypatch.setattr(qc, "write_qc", lambda path, *_, **__: write_text(path, "picture"))  # seconds less
    monkeypatch.setattr(htmlreport, "write_html_report", lambda path, *_, **__: write_text(path, "page"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    fixed, moving = small_pair()
    write_volume(tmp_path / "fixed.nii.gz", fixed)
    write_volume(tmp_path / "moving.mha", moving)
    return str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.mha")


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def test_two_files_on_different_grids_become_a_folder_of_results(pair: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["register", *pair, "-o", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN
    fixed, moving = read_volume(Path(pair[0])), read_volume(Path(pair[1]))
    warped = read_volume(out / "warped.nii.gz")
    assert warped.array.dtype == moving.array.dtype and warped.same_grid(fixed)
    inner = (slice(4, -4),) * 3
    # grey values of 0 to 1000 whose anatomy was 5 mm apart: what is left is linear interpolation of blobs of 4 mm
    assert np.abs(warped.array[inner].astype(int) - fixed.array[inner]).mean() < 25
    content = report(out)
    assert content["status"] == "complete" and content["contract"] == "register" and content["preset"] == "generic"
    assert Config.from_dict(content["config"]) == QUICK
    (record,) = content["pairs"]
    assert record["inputs"]["fixed"]["file"] == pair[0]
    assert {item["file"] for item in record["outputs"]} == WRITTEN - {"report.json"}


def test_confidence_is_written_on_request_alone(pair: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["register", *pair, "-o", str(out), "--confidence"]) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN | {CONFIDENCE}
    found = read_volume(out / CONFIDENCE)
    assert found.same_grid(read_volume(Path(pair[0]))) and found.array.dtype == np.float32
    assert found.array.min() >= 0 and found.array.max() < 1 and found.array.std() > 0
    assert CONFIDENCE in {item["file"] for item in report(out)["pairs"][0]["outputs"]}
    assert main(["register", *pair, "-o", str(out)]) == 0  # nothing of the earlier run is left
    assert {path.name for path in out.iterdir()} == WRITTEN


def test_confidence_of_a_solver_that_has_none_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    assert main(["register", *pair, "-o", str(tmp_path / "out"), "--preset", "published", "--confidence"]) == 2
    result = Registration(np.zeros((3, 4, 4, 4), np.float32), np.eye(4))
    with pytest.raises(ConfigError, match="published"):
        result.save(tmp_path, confidence=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / CONFIDENCE).exists()


def test_masks_and_modalities_reach_the_engine(pair: tuple[str, str], tmp_path: Path) -> None:
    fixed = read_volume(Path(pair[0]))
    mask = np.zeros(fixed.shape, np.uint8)
    mask[4:20, 4:20, 4:20] = 1
    write_volume(tmp_path / "mask.nii.gz", Volume(mask, fixed.affine))
    status = main(["register", *pair, "-o", str(tmp_path / "out"), "--fixed-mask", str(tmp_path / "mask.nii.gz"), "--preset",
                   "generic", "--modalities", "CT,"])
    assert status == 0
    (record,) = report(tmp_path / "out")["pairs"]
    assert record["modalities"] == ["CT", ""] and record["inputs"]["fixed_mask"]["file"].endswith("mask.nii.gz")


@pytest.mark.parametrize("name", ["start.txt", "start.tfm", "start.h5"])
def test_an_initial_transform_brings_images_together_that_do_not_overlap(tmp_path: Path, name: str) -> None:
    fixed, moving = small_pair()
    away = np.eye(4)
    away[:3, 3] = (300, -20, 10)
    write_volume(tmp_path / "fixed.nii.gz", fixed)
    write_volume(tmp_path / "moving.nii.gz", Volume(moving.array, away @ moving.affine))
    if name == "start.txt":
        np.savetxt(tmp_path / name, away)
    else:
        sitk.WriteTransform(sitk.TranslationTransform(3, (-300.0, 20.0, 10.0)), str(tmp_path / name))  # LPS
    arguments = ["register", str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.nii.gz"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--initial-transform", "none"]) == 3
    assert main([*arguments, "--initial-transform", str(tmp_path / name)]) == 0
    moved = read_transform(tmp_path / "out/transform.h5").points([[0.0, 0.0, 0.0]])[0]
    np.testing.assert_allclose(moved, away[:3, 3] + SHIFT_MM, rtol=0, atol=1.0)  # half a voxel


def test_where_images_lie_is_found_and_said_unless_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, moving = small_pair()
    away = np.eye(4)
    away[:3, 3] = (300, -20, 10)
    monkeypatch.setattr(registration, "align", lambda *_: Alignment(away, 0.0, 0.8, 301.0, needed=True))
    write_volume(tmp_path / "fixed.nii.gz", fixed)
    write_volume(tmp_path / "moving.nii.gz", Volume(moving.array, away @ moving.affine))
    arguments = ["register", str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.nii.gz"), "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    moved = read_transform(tmp_path / "out/transform.h5").points([[0.0, 0.0, 0.0]])[0]
    np.testing.assert_allclose(moved, away[:3, 3] + SHIFT_MM, rtol=0, atol=1.0)  # half a voxel
    (record,) = report(tmp_path / "out")["pairs"]
    assert any("[apart]" in text for text in record["warnings"]) and any("by 301 mm" in text for text in record["warnings"])
    assert record["info"]["alignment"]["matrix"] == away.tolist()
    assert main([*arguments, "--initial-transform", "none"]) == 3


def test_an_initial_transform_that_bends_is_refused_by_name(pair: tuple[str, str], tmp_path: Path) -> None:
    assert main(["register", *pair, "-o", str(tmp_path / "first")]) == 0
    field = tmp_path / "first/displacement.nii.gz"
    before = field.read_bytes()
    assert main(["register", *pair, "-o", str(tmp_path / "out"), "--initial-transform", str(field)]) == 3
    assert main(["register", *pair, "-o", str(tmp_path / "first"), "--initial-transform", str(field)]) == 3
    assert field.read_bytes() == before


def test_a_dicom_folder_is_an_image(pair: tuple[str, str], tmp_path: Path) -> None:
    array = np.kron(np.random.default_rng(1).integers(0, 900, (5, 6, 4)), np.ones((2, 2, 2))).astype(np.int16)
    series = write_series(tmp_path / "series", array=array)
    assert main(["register", str(series), str(series), "-o", str(tmp_path / "out")]) == 0
    (record,) = report(tmp_path / "out")["pairs"]
    assert record["inputs"]["fixed"]["bytes"] == sum(path.stat().st_size for path in series.iterdir())
    warped = read_volume(tmp_path / "out/warped.nii.gz")
    assert warped.same_grid(read_volume(series))
    assert record["field"]["displacement_mean_mm"] < 0.03  # with itself: a twentieth of the smallest voxel is rounding


@pytest.mark.parametrize(("arguments", "status"), [
    (["gone.nii.gz", "M"], 3), (["F", "gone.nii.gz"], 3), (["--pairs", "x.csv"], 3), (["F"], 2),
    (["F", "M", "--pairs", "x.csv"], 2),
    (["F", "M", "--preset", "none"], 2), (["F", "M", "--modalities", "CT"], 2), (["F", "M", "--device", "tpu"], 2),
    (["F", "M", "--features", "dinov2", "--weights", "."], 4)])
def test_what_cannot_be_done_ends_with_its_status_in_one_line(pair: tuple[str, str], tmp_path: Path, arguments: list[str],
                                                              status: int, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"F": pair[0], "M": pair[1]}
    assert main(["register", *(paths.get(word, word) for word in arguments), "-o", str(tmp_path / "out")]) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    if status == 3 and "--pairs" not in arguments:
        assert report(tmp_path / "out")["exit_code"] == 3


def test_nothing_of_an_earlier_run_is_left_when_a_run_fails(pair: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in WRITTEN:
        (out / name).write_text("old")
    (out / "notes.txt").write_text("mine")
    assert main(["register", pair[0], "gone.mha", "-o", str(out)]) == 3
    assert {path.name for path in out.iterdir()} == {"report.json", "notes.txt"} and report(out)["status"] == "failed"


def test_an_input_is_never_taken_for_an_old_result(pair: tuple[str, str], tmp_path: Path) -> None:
    assert main(["register", *pair, "-o", str(tmp_path / "out")]) == 0
    warped = tmp_path / "out/warped.nii.gz"
    before = warped.read_bytes()
    assert main(["register", pair[0], str(warped), "-o", str(tmp_path / "out")]) == 2
    assert warped.read_bytes() == before


def test_quiet_says_nothing(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                            caplog: pytest.LogCaptureFixture) -> None:
    assert main(["register", *pair, "-o", str(tmp_path / "out"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "" and not caplog.messages


def test_threads_that_wait_sleep_and_torch_is_not_loaded_before_that_is_said() -> None:
    code = "import sys, os, dinoreg.__main__ as m; assert 'torch' not in sys.modules; m.main(['check', 'gone'])"
    code += "; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert found.stdout.splitlines()[-1] == "PASSIVE"


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_for_users_of_the_package_too_unless_they_say_otherwise(given: str | None, expected: str) -> None:
    code = "import os, sys, dinoreg; before = os.environ.get('OMP_WAIT_POLICY'); assert 'torch' not in sys.modules"
    code += "; dinoreg.Volume; print(before, os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == [str(given), expected]


def test_labels_and_points_are_compared_and_do_not_change_the_result(pair: tuple[str, str], tmp_path: Path) -> None:
    assert main(["register", *pair, "-o", str(tmp_path / "without")]) == 0
    files = write(tmp_path, halves(FIXED, 0.0), halves(MOVING, SHIFT_MM[0]), (POINTS, POINTS + SHIFT_MM))
    options = [word for role, path in files.items() for word in (f"--{role.replace('_', '-')}", str(path))]
    assert main(["register", *pair, "-o", str(tmp_path / "with"), *options]) == 0
    fields = [(tmp_path / folder / "disp_voxels.nii.gz").read_bytes() for folder in ("without", "with")]
    assert fields[0] == fields[1]
    (record,) = report(tmp_path / "with")["pairs"]
    scores = record["scores"]
    assert scores["tre_mm"]["before"] > 5 and scores["tre_mm"]["after"] < 1  # half a voxel; the shift is 5.4 mm
    assert scores["dice"]["after"] > scores["dice"]["before"] + 0.05
    assert record["inputs"]["fixed_points"]["file"] == str(files["fixed_points"])
    assert "scores" in report(tmp_path / "without")["pairs"][0] and not report(tmp_path / "without")["pairs"][0]["scores"]


def test_the_page_warns_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of an odd spacing, of little overlap, of another orientation, of motion at the edge of the search, of labels made worse."""
    monkeypatch.setattr(htmlreport, "write_html_report", PAGE)
    monkeypatch.setattr(htmlreport, "_DPI", 30)
    far = np.array([14.0, 0.0, 0.0])  # the search reaches a sixth of 52 mm
    fixed = scan(affine((2.0, 2.0, 2.0)), (24, 26, 22))
    moving = scan(affine((2.0, 2.0, 2.0), "LPS"), fixed.shape, moved_mm=far)
    moving = Volume(moving.array[:5], moving.affine)
    for name, image in (("fixed", fixed), ("moving", moving)):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(image.array, np.diag([0.01, 0.01, 0.01, 1]) @ image.affine))
    arguments = ["register", str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.nii.gz"), "-o", str(tmp_path / "out")]
    wrong = write(tmp_path, points=(POINTS / 100, POINTS / 100))  # that nothing moved is not so
    options = [word for role, path in wrong.items() for word in (f"--{role.replace('_', '-')}", str(path))]
    with caplog.at_level(logging.WARNING, "dinoreg"):
        assert main([*arguments, *options]) == 0
    page = (tmp_path / "out/report.html").read_text()
    warnings = [html.unescape(text) for text in re.findall(r'<li class="warning"><b>Warning</b> (.*?)</li>', page)]
    for text in ("expected a spacing of", " % of the fixed one", "the edge of the search range", "further apart after"):
        assert any(text in warning for warning in warnings), (text, warnings)
        assert any(text in message for message in caplog.messages), text
    assert "axes to RAS; moving 5 x 26 x 22 voxels of 0.02 x 0.02 x 0.02 mm, axes to LPS" in page


@pytest.mark.slow  # 8 s of a core: a real ViT-S, and a page and a picture
def test_page_and_picture_show_what_the_encoder_saw(pair: tuple[str, str], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(htmlreport, "write_html_report", PAGE)
    monkeypatch.setattr(qc, "write_qc", PICTURE)
    monkeypatch.setattr(registration, "load_encoder", lambda *_, **__: random_encoder("vits14_reg4", 0))
    monkeypatch.setitem(PRESETS, "generic", dataclasses.replace(QUICK, features="dinov2+mind", encoder=EncoderConfig(
        long_side_tokens=24, gap_mm=4.0)))
    assert main(["register", *pair, "-o", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "The encoder is vits14_reg4, random weights, seed 0." in page and page.count("<img ") == 3 * (4 + 3 + 2)
    picture = imread(tmp_path / "out/qc.png")[..., :3]
    colour = picture.max(axis=2) - picture.min(axis=2)  # 0 in grey
    seen = [colour[100:, round(a * picture.shape[1]) : round(b * picture.shape[1])] for a, b in ((6 / 8, 7 / 8), (7 / 8, 1.0))]
    assert all((part > 0.2).mean() > 0.1 for part in seen)
    assert report(tmp_path / "out")["pairs"][0]["info"]["encoder"] == "vits14_reg4, random weights, seed 0"


def test_labels_that_do_not_fit_are_refused_before_the_work(pair: tuple[str, str], tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registrar, "register", lambda *_, **__: pytest.fail("it registered"))
    files = write(tmp_path, halves(MOVING, 0.0), halves(MOVING, 0.0))
    options = [word for role, path in files.items() for word in (f"--{role.replace('_', '-')}", str(path))]
    status = main(["register", *pair, "-o", str(tmp_path / "out"), *options])
    assert status == 3 and "fixed_labels.nii.gz" in report(tmp_path / "out")["pairs"][0]["error"]["message"]


# ---- lists of pairs


def write_list(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_pair_that_fails_does_not_stop_the_others_and_the_table_has_all(pair: tuple[str, str], tmp_path: Path) -> None:
    pairs = write_list(tmp_path / "pairs.csv", "fixed,moving,name", "fixed.nii.gz,gone.mha,", "fixed.nii.gz,moving.mha,a b")
    out = tmp_path / "out"
    assert main(["register", "--pairs", str(pairs), "-o", str(out)]) == 3
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["name"], row["status"]) for row in rows] == [("001", "failed"), ("a b", "complete")]
    assert "no such file" in rows[0]["message"] and float(rows[1]["displacement_mean_mm"]) > 1
    assert {path.name for path in (out / "a b").iterdir()} == WRITTEN and report(out / "001")["exit_code"] == 3
    page = (out / "results.html").read_text()
    assert '<a href="a b/report.html">a b<img src="a b/qc.png" alt="" loading="lazy"></a>' in page
    assert "2 pairs, 1 failed" in page and '<a href="001' not in page


def test_the_table_of_an_earlier_run_is_gone_when_a_run_begins(pair: tuple[str, str], tmp_path: Path) -> None:
    pairs = write_list(tmp_path / "pairs.csv", "fixed,moving", "fixed.nii.gz,moving.mha")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.csv").write_text("old")
    no_weights = ["--features", "dinov2", "--weights", str(tmp_path)]
    assert main(["register", "--pairs", str(pairs), "-o", str(tmp_path / "out"), *no_weights]) == 4
    assert not (tmp_path / "out/results.csv").exists()


def test_the_table_tells_scores_where_they_are_known(pair: tuple[str, str], tmp_path: Path) -> None:
    write(tmp_path, halves(FIXED, 0.0), halves(MOVING, SHIFT_MM[0]), (POINTS, POINTS + SHIFT_MM))
    pairs = write_list(tmp_path / "pairs.csv", "fixed,moving,fixed_labels,moving_labels,fixed_points,moving_points",
                       "fixed.nii.gz,moving.mha,fixed_labels.nii.gz,moving_labels.nii.gz,,",
                       "fixed.nii.gz,moving.mha,,,fixed_points.csv,moving_points.csv")
    assert main(["register", "--pairs", str(pairs), "-o", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert float(rows[0]["dice_after"]) > float(rows[0]["dice_before"]) and rows[0]["tre_after_mm"] == ""
    assert float(rows[1]["tre_after_mm"]) < 1 < float(rows[1]["tre_before_mm"]) and rows[1]["dice_after"] == ""
    page = (tmp_path / "out/results.html").read_text()
    assert "Mean TRE of 1: " in page and "<th>dice before</th>" in page and "<th>message</th>" not in page


@pytest.mark.parametrize("rows", [
    (), ("fixed,moving",), ("fixed,mask", "a,b"), ("fixed,moving,colour", "a,b,red"), ("fixed,moving", "a,"),
    ("fixed,moving", "a,b,c"), ("fixed,moving,name", "a,b,x", "a,c,X"), ("fixed,moving,name", "a,b,../x"),
    ("fixed,moving,name", "a,b,results.csv"), ("fixed,moving,name", "a,b,.")])
def test_lists_that_are_none_are_refused(tmp_path: Path, rows: tuple[str, ...]) -> None:
    pairs = write_list(tmp_path / "pairs.csv", *rows)
    assert main(["register", "--pairs", str(pairs), "-o", str(tmp_path / "out"), "--features", "mind"]) == 3
    assert not (tmp_path / "out").exists()
