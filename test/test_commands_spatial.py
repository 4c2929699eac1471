"""warp, points, jacobian, invert: from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dinoreg.__main__ import main
from dinoreg.io import read_volume, write_volume
from dinoreg.transforms import read_transform, write_field_mm
from dinoreg.volume import Volume

SHAPE = (18, 16, 14)
FIXED = np.array([[-1.5, 0, 0, 30], [0, 2.0, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1]])
MOVING = np.array([[1.0, 0, 0, 0], [0, 1.8, 0, -22], [0, 0, 2.0, 3], [0, 0, 0, 1]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """fixed.nii.gz, moving.mha with labels, field.nii.gz with a smooth field of up to 2 voxels."""
    noise = np.random.default_rng(0).normal(size=(3, *SHAPE))
    disp = np.stack([ndimage.gaussian_filter(part, 3.0) for part in noise])
    disp = (disp * (2 / np.abs(disp).max())).astype(np.float32)
    write_field_mm(tmp_path / "field.nii.gz", disp, FIXED)
    np.save(tmp_path / "disp.npy", disp)
    blob = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(28, 20, 20)), 2.0)
    write_volume(tmp_path / "fixed.nii.gz", Volume(np.zeros(SHAPE, dtype=np.float32), FIXED))
    write_volume(tmp_path / "moving.mha", Volume((1000 * blob).astype(np.int16), MOVING))
    write_volume(tmp_path / "labels.nii.gz", Volume(np.digitize(blob, [-0.05, 0.05]).astype(np.uint8), MOVING))
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    return main([str(folder / a) if (folder / a).exists() or a.startswith("out") else a for a in arguments])


def test_warp_keeps_grid_and_type(folder: Path) -> None:
    assert run(folder, "warp", "moving.mha", "--transform", "field.nii.gz", "--reference", "fixed.nii.gz", "-o",
               "out.nii.gz") == 0
    found, fixed = read_volume(folder / "out.nii.gz"), read_volume(folder / "fixed.nii.gz")
    assert found.same_grid(fixed) and found.array.dtype == np.int16
    moving = read_volume(folder / "moving.mha")
    at = np.indices(SHAPE) + np.load(folder / "disp.npy")
    matrix = np.linalg.solve(MOVING, FIXED)
    where = np.einsum("ab,bijk->aijk", matrix[:3, :3], at) + matrix[:3, 3, None, None, None]
    expected = ndimage.map_coordinates(moving.array.astype(float), where, order=1)
    inside = np.all([(w > 1) & (w < n - 2) for w, n in zip(where, moving.shape, strict=True)], axis=0)[1:-1, 1:-1, 1:-1]
    assert inside.mean() > 0.4
    # rounding to whole numbers, and a header in float32
    assert np.abs(found.array - expected)[1:-1, 1:-1, 1:-1][inside].max() < 0.51


@pytest.mark.parametrize(("line", "output"), [
    ("warp moving.mha --transform field.nii.gz --reference fixed.nii.gz", "moving.mha"),
    ("warp moving.mha --transform field.nii.gz --reference fixed.nii.gz", "field.nii.gz"),
    ("warp link.mha --transform field.nii.gz --reference fixed.nii.gz", "moving.mha"),
    ("jacobian field.nii.gz --reference fixed.nii.gz", "fixed.nii.gz"),
    ("invert field.nii.gz --fixed fixed.nii.gz --moving moving.mha", "moving.mha"),
    ("points points.csv --transform field.nii.gz", "points.csv"),
    ("points points.csv --transform field.nii.gz --compare truth.csv", "truth.csv"),
])
def test_no_result_replaces_its_source(folder: Path, capsys: pytest.CaptureFixture[str], line: str, output: str) -> None:
    (folder / "link.mha").symlink_to(folder / "moving.mha")
    for name in ("points.csv", "truth.csv"):
        (folder / name).write_text("x,y,z\n10,0,15\n")
    before = (folder / output).read_bytes()
    assert run(folder, *line.split(), "-o", output) == 2
    assert "is an input" in capsys.readouterr().err and (folder / output).read_bytes() == before


@pytest.mark.parametrize("mode", ["nearest", "labels"])
def test_labels_stay_labels(folder: Path, mode: str) -> None:
    assert run(folder, "warp", "labels.nii.gz", "--transform", "field.nii.gz", "--reference", "fixed.nii.gz", "-o", "out.nii.gz",
               "--interpolation", mode) == 0
    found = read_volume(folder / "out.nii.gz").array
    assert found.dtype == np.uint8 and set(np.unique(found)) == {0, 1, 2}


def test_both_ways_of_labels_agree_but_at_borders(folder: Path) -> None:
    maps = []
    for mode in ("nearest", "labels"):
        run(folder, "warp", "labels.nii.gz", "--transform", "field.nii.gz", "--reference", "fixed.nii.gz", "-o", "out.nii.gz",
            "--interpolation", mode)
        maps.append(read_volume(folder / "out.nii.gz").array)
    assert 0 < (maps[0] != maps[1]).mean() < 0.15


def test_points_go_there_and_back_in_every_space(folder: Path) -> None:
    voxels = np.array([[4.0, 5, 6], [9, 8, 7], [12.5, 6.25, 5]])
    (folder / "p.csv").write_text("x,y,z\n" + "\n".join(",".join(map(str, row)) for row in voxels) + "\n")
    images = ["--fixed", "fixed.nii.gz", "--moving", "moving.mha"]
    assert run(folder, "points", "p.csv", "--transform", "field.nii.gz", "-o", "out.csv", "--space", "voxel", *images) == 0
    found = np.loadtxt(folder / "out.csv", delimiter=",", skiprows=1)
    disp = np.load(folder / "disp.npy")
    moved = voxels + np.stack([ndimage.map_coordinates(part, voxels.T, order=1) for part in disp], axis=1)
    matrix = np.linalg.solve(MOVING, FIXED)
    np.testing.assert_allclose(found, moved @ matrix[:3, :3].T + matrix[:3, 3], rtol=0, atol=1e-4)  # float32 header and field
    assert run(folder, "points", "out.csv", "--transform", "field.nii.gz", "-o", "out2.csv", "--space", "voxel",
               "--direction", "moving-to-fixed", *images) == 0
    again = np.loadtxt(folder / "out2.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(again, voxels, rtol=0, atol=1e-3)  # Newton stops at .001 mm


def test_slicers_files_say_their_space(folder: Path) -> None:
    ras = np.array([[10.0, -5, 20], [14, -2, 25]])
    lps = ras * [-1, -1, 1]
    (folder / "p.csv").write_text("\n".join(",".join(map(str, row)) for row in ras))
    (folder / "p.fcsv").write_text("# Markups fiducial file\n# CoordinateSystem = LPS\n# columns = id,x,y,z,label\n"
                                   + "\n".join(f"v{n},{x},{y},{z},F-{n}" for n, (x, y, z) in enumerate(lps)) + "\n")
    markups = {"markups": [{"type": "Fiducial", "coordinateSystem": "LPS",
                            "controlPoints": [{"label": "a", "position": row} for row in lps.tolist()]}]}
    (folder / "p.mrk.json").write_text(json.dumps(markups))
    for name in ("p.csv", "p.fcsv", "p.mrk.json"):
        assert run(folder, "points", name, "--transform", "field.nii.gz", "-o", "out" + name[1:]) == 0
    expected = read_transform(folder / "field.nii.gz").points(ras)
    np.testing.assert_allclose(np.loadtxt(folder / "out.csv", delimiter=","), expected, rtol=0, atol=1e-5)  # six decimals
    lines = (folder / "out.fcsv").read_text().splitlines()
    found = np.array([[float(v) for v in line.split(",")[1:4]] for line in lines if not line.startswith("#")])
    np.testing.assert_allclose(found, expected * [-1, -1, 1], rtol=0, atol=1e-5)
    assert lines[1] == "# CoordinateSystem = LPS" and lines[-1].endswith("F-1")
    written = json.loads((folder / "out.mrk.json").read_text())["markups"][0]
    np.testing.assert_allclose([p["position"] for p in written["controlPoints"]], expected * [-1, -1, 1], rtol=0, atol=1e-5)
    assert written["controlPoints"][0]["label"] == "a"


def test_the_distance_to_given_points_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "p.csv").write_text("12,-6,20\n15,-3,22\n")
    truth = read_transform(folder / "field.nii.gz").points([[12, -6, 20], [15, -3, 22]]) + np.array([0, 3, 4])
    np.savetxt(folder / "q.csv", truth, delimiter=",")
    assert run(folder, "points", "p.csv", "--transform", "field.nii.gz", "-o", "out.csv", "--compare", "q.csv") == 0
    assert "2 points" in (text := capsys.readouterr().out) and "5.00 mm after" in text


@pytest.mark.parametrize(("name", "text", "message"), [
    ("p.csv", "x,y,z\n", "at least one"), ("p.csv", "1,2,3\n4,five,6\n", "line 2"), ("p.csv", "1,2\n", "x, y, z"),
    ("p.csv", "nan,1,2\n", "x, y, z"), ("p.fcsv", "a,1,2,3\n", "CoordinateSystem"),
    ("p.fcsv", "# CoordinateSystem\na,1,2,3\n", "CoordinateSystem"), ("p.mrk.json", "{}", "controlPoints"),
    ("p.txt", "1,2,3\n", "expected .csv"),
])
def test_what_are_no_points_is_named(folder: Path, name: str, text: str, message: str,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_text(text)
    assert run(folder, "points", name, "--transform", "field.nii.gz", "-o", "out.csv") == 3
    assert message in capsys.readouterr().err and not (folder / "out.csv").exists()


def test_voxels_need_both_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "p.csv").write_text("1,2,3\n")
    assert run(folder, "points", "p.csv", "--transform", "field.nii.gz", "-o", "out.csv", "--space", "voxel") == 2
    assert "--moving" in capsys.readouterr().err


def test_jacobian_is_that_of_the_field(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "m.txt").write_text("1.1 0 0 0\n0 1 0 0\n0 0 0.9 0\n0 0 0 1\n")
    assert run(folder, "jacobian", "m.txt", "--reference", "fixed.nii.gz", "-o", "out.nii.gz") == 0
    np.testing.assert_allclose(nib.load(folder / "out.nii.gz").get_fdata(), 0.99, rtol=0, atol=1e-4)  # displacements in float32
    assert "folds 0.000 %" in capsys.readouterr().out


def test_the_inverse_leads_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "invert", "field.nii.gz", "--fixed", "fixed.nii.gz", "--moving", "moving.mha", "-o", "out.mha") == 0
    assert "largest" in capsys.readouterr().out
    points = np.array([[12.0, -6, 20], [15, -3, 22]])
    moved = read_transform(folder / "field.nii.gz").points(points)
    # .01 voxel of 2.5 mm, and a curved field that is linear between voxels of 2 mm
    np.testing.assert_allclose(read_transform(folder / "out.mha").points(moved), points, rtol=0, atol=0.1)
    nothing = main(["invert", str(folder / "missing.h5"), "--fixed", str(folder / "fixed.nii.gz"), "--moving",
                    str(folder / "moving.mha"), "-o", str(folder / "out2.mha")])
    assert nothing == 3 and "missing.h5" in capsys.readouterr().err and not (folder / "out2.mha").exists()
