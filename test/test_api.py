"""The Python interface: kinds of images in and out, points, the change of volume, files, progress, a light import."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from small_pair import QUICK, SHIFT_MM, UNMOVED, small_pair

import dinoreg
from dinoreg import registration
from dinoreg.convert import to_volume
from dinoreg.errors import ConfigError, InputError
from dinoreg.io import from_itk, read_volume, to_itk, write_volume
from dinoreg.result import FILES, OF_MOVING, Registration
from dinoreg.transforms import read_transform
from dinoreg.volume import Volume


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "align", lambda *_: UNMOVED)  # a second less


@cache
def result() -> Registration:
    return dinoreg.register(*small_pair(), preset=QUICK, initial=None)


def as_kind(volume: Volume, kind: str, folder: Path) -> Any:
    if kind == "nibabel":
        return nib.Nifti1Image(volume.array, volume.affine)
    if kind == "SimpleITK":
        return to_itk(volume)
    if kind == "path":
        write_volume(folder / "image.mha", volume)
        return str(folder / "image.mha")
    return volume


def test_anatomy_is_found_where_it_is() -> None:
    fixed, _ = small_pair()
    centre = (fixed.affine @ [*(np.array(fixed.shape) - 1) / 2, 1])[:3]
    points = centre + np.random.default_rng(0).uniform(-12, 12, (50, 3))
    # voxels of 2 mm, blobs of 4 mm: a fifth of a voxel for the median, half of one for all
    error = np.linalg.norm(result().map_points(points) - points - SHIFT_MM, axis=1)
    assert np.median(error) < 0.4 and error.max() < 1.0


@pytest.mark.parametrize("kind", ["nibabel", "SimpleITK", "path", "volume"])
def test_smooth_labels_are_those_of_the_largest_share_and_come_back_as_they_were_given(kind: str, tmp_path: Path) -> None:
    moving = small_pair()[1]
    labels = Volume(np.digitize(moving.array, (300, 450, 600)).astype(np.uint8) * 50, moving.affine)
    warped = result().warp_labels(as_kind(labels, kind, tmp_path))
    assert kind in ("path", "volume") or type(warped) is type(as_kind(labels, kind, tmp_path))
    found = to_volume(warped)
    assert found.array.dtype == np.uint8 and set(np.unique(found.array)) <= {0, 50, 100, 150}
    names = np.unique(labels.array)
    shares = np.stack([result().warp(Volume((labels.array == name).astype(np.float64), labels.affine)).array for name in names])
    second, first = np.sort(shares, axis=0)[-2:]
    clear = first - second > 1e-6  # what two ways of adding eight numbers leave open
    assert clear.mean() > 0.95 and np.array_equal(found.array[clear], names[shares.argmax(0)][clear])


def test_smooth_labels_are_smoother_than_the_nearest_ones_and_nothing_beyond_the_image() -> None:
    moving = small_pair()[1]
    grid = np.indices(moving.shape)
    ball = Volume((sum((g - n / 2) ** 2 for g, n in zip(grid, moving.shape, strict=True)) < 64).astype(np.int16), moving.affine)
    smooth, nearest = result().warp_labels(ball).array, result().warp(ball, order=0).array

    def surface(labels: np.ndarray) -> int:
        return sum(int((np.diff(labels, axis=axis) != 0).sum()) for axis in range(3))

    assert 0 < surface(smooth) < surface(nearest)
    away = result().fixed_affine.copy()
    away[0, 3] += 500
    assert not Registration(result().disp, away).warp_labels(Volume(np.ones(moving.shape, bool), moving.affine)).array.any()


def test_points_at_voxels_follow_the_field() -> None:
    fixed, _ = small_pair()
    index = np.array([[5, 6, 7], [12, 13, 11], [20, 3, 15]])
    found = result().map_points((fixed.affine @ np.c_[index, np.ones(3)].T).T[:, :3])
    voxels = index + np.stack([result().disp[(slice(None), *at)] for at in index])
    np.testing.assert_allclose(found, (fixed.affine @ np.c_[voxels, np.ones(3)].T).T[:, :3], rtol=0, atol=1e-4)  # float32 voxels


@pytest.mark.parametrize("kind", ["nibabel", "SimpleITK", "path"])
def test_images_of_any_kind_mean_the_same(kind: str, tmp_path: Path) -> None:
    fixed, moving = small_pair()
    (tmp_path / "m").mkdir()
    pair = as_kind(fixed, kind, tmp_path), as_kind(moving, kind, tmp_path / "m")
    found = dinoreg.register(*pair, preset=QUICK)
    # headers pass through other representations of the same numbers: a thousandth of a voxel
    np.testing.assert_allclose(found.disp, result().disp, rtol=0, atol=1e-3)
    warped = result().warp(pair[1])
    assert type(warped) is (Volume if kind == "path" else type(pair[1]))
    back = to_volume(warped)
    assert back.array.dtype == np.int16 and back.same_grid(fixed)
    # rounding to whole numbers of grey, of a thousand
    assert np.abs(back.array.astype(int) - result().warp(moving).array).max() <= 1


def test_an_array_is_a_grid_of_one_millimetre() -> None:
    fixed, _ = small_pair()
    moving = np.roll(fixed.array, 2, axis=0)
    found = dinoreg.register(fixed.array, moving, preset=QUICK)
    np.testing.assert_allclose(np.median(found.disp[:, 6:-6, 6:-6, 6:-6], axis=(1, 2, 3)), (2, 0, 0), rtol=0, atol=0.15)
    warped = found.warp(moving)
    assert isinstance(warped, np.ndarray) and warped.dtype == moving.dtype
    assert np.array_equal(found.fixed_affine, np.eye(4))


def test_simpleitk_images_come_back_as_they_were() -> None:
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((-5.0, 6.0, 7.0))
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    array, header = from_itk(image)
    back = to_itk(Volume(array, header))
    assert np.array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(back, get)(), getattr(image, get)(), atol=1e-12)


@pytest.mark.parametrize(("image", "message"), [
    (np.zeros((4, 5)), "expected a 3D image"), (np.zeros((4, 5, 6, 3)), "expected a 3D image"),
    (np.zeros((4, 5, 6), complex), "one number a voxel"), ([[1, 2]], "got list"),
    (None, "fixed: expected .*; got NoneType"),
    (sitk.Image([4, 5], sitk.sitkInt16), "expected a 3D image"), ("gone.nii.gz", r"gone\.nii\.gz: no such file")])
def test_what_is_no_image_is_refused_by_its_role(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dinoreg.register(image, small_pair()[1], preset=QUICK)


def test_masks_of_true_and_false_are_taken() -> None:
    fixed, moving = small_pair()
    found = dinoreg.register(fixed, moving, preset=QUICK, fixed_mask=Volume(fixed.array > -1, fixed.affine))
    np.testing.assert_allclose(found.disp, result().disp, rtol=0, atol=1e-6)  # everything counts, as without


def test_images_that_do_not_overlap_are_refused_unless_they_are_moved_first() -> None:
    fixed, moving = small_pair()
    away = np.eye(4)
    away[:3, 3] = (300, 0, 0)
    far = Volume(moving.array, away @ moving.affine)
    with pytest.raises(InputError, match="no-overlap"):
        dinoreg.register(fixed, far, preset=QUICK, initial=None)
    found = dinoreg.register(fixed, far, preset=QUICK, initial=away)
    expected = result().disp + np.array([150, 0, 0], np.float32)[:, None, None, None]  # voxels
    np.testing.assert_allclose(found.disp, expected, rtol=0, atol=1e-3)  # float32 of 150, and grids that agree to as much


def test_jacobian_is_that_of_the_field() -> None:
    fixed, _ = small_pair()
    disp = np.zeros((3, *fixed.shape), np.float32)
    disp[0] = 0.25 * np.arange(fixed.shape[0])[:, None, None]  # x + disp = 1.25 x
    jacobian = Registration(disp, fixed.affine).jacobian()
    assert jacobian.same_grid(fixed) and jacobian.array.dtype == np.float32
    np.testing.assert_allclose(jacobian.array, 1.25, rtol=1e-5)


def test_save_writes_all_files_and_they_are_read_again(tmp_path: Path) -> None:
    fixed, moving = small_pair()
    written = result().save(tmp_path / "new", moving)
    assert [path.name for path in written] == list(FILES) and {path.name for path in (tmp_path / "new").iterdir()} == set(FILES)
    assert np.array_equal(read_volume(tmp_path / "new/warped.nii.gz").array, result().warp(moving).array)
    assert nib.load(tmp_path / "new/disp_voxels.nii.gz").shape == (*fixed.shape, 3)
    alone = result().save(tmp_path / "other")
    assert {path.name for path in alone} == {path.name for path in (tmp_path / "other").iterdir()} == set(FILES) - set(OF_MOVING)


@pytest.mark.parametrize("name", ["displacement.nii.gz", "transform.h5", "disp_voxels.nii.gz"])
@pytest.mark.parametrize("turned", [False, True])
def test_every_written_transform_maps_points_as_the_result_does(name: str, turned: bool, tmp_path: Path) -> None:
    fixed, moving = small_pair()
    initial = np.array([[0.8, 0.6, 0, 5], [-0.6, 0.8, 0, -2], [0, 0, 1, 3], [0, 0, 0, 1.0]])  # a rotation: no shear in the header
    found = result()
    if turned:
        found = dinoreg.register(fixed, Volume(moving.array, initial @ moving.affine), preset=QUICK, initial=initial)
    found.save(tmp_path)
    points = np.random.default_rng(2).uniform(-18, 18, (100, 3))  # RAS mm, all within the fixed grid
    # float32 of some ten millimetres, and nothing else
    np.testing.assert_allclose(read_transform(tmp_path / name).points(points), found.map_points(points), rtol=0, atol=1e-4)


def test_inverse_leads_back() -> None:
    fixed, moving = small_pair()
    back = result().inverse(moving)
    points = np.random.default_rng(2).uniform(-12, 12, (100, 3))
    # 0.01 voxel of 2 mm where the inverse is solved, and linear interpolation of a smooth field between its voxels
    np.testing.assert_allclose(back.map_points(result().map_points(points)), points, rtol=0, atol=0.2)
    assert back.warp(fixed).same_grid(moving) and np.median(back.info["residual_mm"]) < 0.04


def test_progress_is_told_and_may_end_the_run() -> None:
    seen: list[tuple[str, int, int]] = []
    dinoreg.register(*small_pair(), preset=QUICK, progress=lambda *step: seen.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["align", "prepare", "discrete", "refine", "finish"]
    assert [step[1:] for step in seen if step[0] == "refine"] == [(0, 1), *((n, 40) for n in range(1, 41)), (40, 40)]

    class StopError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "refine" and done == 3:
            raise StopError

    with pytest.raises(StopError):
        dinoreg.register(*small_pair(), preset=QUICK, progress=stop)


@pytest.mark.parametrize(("options", "message"), [
    ({"preset": "brian"}, "unknown preset"), ({"modalities": ("PET", "CT")}, "modalities"),
    ({"features": "sift"}, "features must be one of"), ({"device": "tpu"}, "device")])
def test_options_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dinoreg.register(*small_pair(), **{"features": "mind", **options})


def test_importing_the_package_loads_nothing_and_takes_no_time() -> None:
    code = "import sys, dinoreg; print([name for name in ('torch', 'numpy', 'SimpleITK', 'nibabel') if name in sys.modules])"
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[]" and time.monotonic() - began < 10  # an interpreter's start, on a loaded machine
