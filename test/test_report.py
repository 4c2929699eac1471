"""What the report says of files, fields, failures and the machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dinoreg.errors import InputError, OutputError
from dinoreg.report import environment, failure_record, field_metrics, file_record, run_record, summary_line

SHAPE = (8, 9, 10)


def test_file_is_named_relative_to_its_folder_and_hashed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"x" * 3_000_000)  # more than one block
    assert file_record(tmp_path / "a" / "x", tmp_path) == {"file": "a/x", "bytes": 3_000_000,
                                                            "sha256": hashlib.sha256(b"x" * 3_000_000).hexdigest()}
    with pytest.raises(InputError, match="missing"):
        file_record(tmp_path / "missing", tmp_path)


def test_field_metrics_of_a_uniform_scaling_are_its_own() -> None:
    # x -> 1.1 x, 0.9 y, z along the axes: determinant 0.99 everywhere
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(np.float32)
    disp = grid * np.array([0.1, -0.1, 0.0], np.float32)[:, None, None, None]
    values = field_metrics(disp, (2.0, 1.0, 3.0))
    assert values["jacobian_min"] == pytest.approx(0.99, abs=1e-5) and values["jacobian_max"] == pytest.approx(0.99, abs=1e-5)
    assert values["folds_percent"] == 0 and values["sdlogj"] == pytest.approx(0, abs=1e-6)
    assert values["displacement_max_mm"] == pytest.approx(np.hypot(0.7 * 2, 0.8 * 1), abs=1e-5)  # far corner: voxel (7, 8, .)


def test_value_that_does_not_exist_is_none_and_not_nan() -> None:
    disp = np.zeros((3, 3, 3, 3), np.float32)  # nothing is left of 3^3 once two voxels a side are cropped
    assert field_metrics(disp, (1, 1, 1))["sdlogj_official"] is None
    json.dumps(field_metrics(disp, (1, 1, 1)), allow_nan=False)


def test_summary_leaves_out_what_is_not_known_and_counts_warnings() -> None:
    field = field_metrics(np.ones((3, 3, 3, 3), np.float32), (1, 2, 2)) | {"sdlogj": None}
    assert summary_line(field, 1) == "whole field: mean displacement 3.0 mm, largest 3.0 mm, folds 0.000 %; 1 warning"


def test_failures_carry_their_exit_code_in_one_line() -> None:
    assert failure_record(OutputError("a\n b")) == {"kind": "OutputError", "exit_code": 5, "message": "a b"}
    unknown = failure_record(KeyError("x"))
    assert unknown["exit_code"] == 1 and "KeyError" in unknown["message"]


def test_environment_names_versions() -> None:
    values = environment()
    assert values["packages"]["numpy"] == np.__version__ and values["cpus"] >= 1


def test_run_takes_the_first_failure() -> None:
    failed = [{"name": str(code), "error": {"exit_code": code}} for code in (5, 3)]
    report = run_record({"preset": "generic"}, [{"name": "a"}, *failed], 1.23456)
    assert (report["status"], report["exit_code"], report["pairs_registered"], report["pairs_failed"]) == ("failed", 5, 1, 2)
    assert report["preset"] == "generic" and report["seconds"] == 1.235 and report["peak_rss_mb"] > 1
    assert run_record({}, [{"name": "a"}], 1)["status"] == "complete"
