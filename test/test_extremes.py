"""Strange but sound images are read and registered, and unsound ones are named, from the file on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from small_pair import QUICK

from dinoreg.errors import InputError
from dinoreg.io import write_volume
from dinoreg.jobs import Case, Images, load_case
from dinoreg.registration import Registrar
from dinoreg.volume import Volume


def loaded(folder: Path, shape: tuple[int, int, int], spacing: float, low: float, high: float, dtype: type,
           offset_mm: float = 0.0) -> Images:
    """Two images of blobs between two values, a voxel apart, through their files."""
    blobs = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(shape[0] + 1, *shape[1:])), 1.5)
    blobs = (blobs - blobs.min()) / np.ptp(blobs)
    array = (low * (1 - blobs) + high * blobs).astype(dtype)
    for name, part in (("fixed", array[1:]), ("moving", array[:-1])):
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[0, 3] = offset_mm * (name == "moving")
        write_volume(folder / f"{name}.nii.gz", Volume(part, affine))
    return load_case(Case("x", folder / "fixed.nii.gz", folder / "moving.nii.gz", None, None, modalities=("", ""), fields=(),
                          warped=None, picture=None, same_grid=False))


def shift(images: Images) -> float:
    """The displacement along the first axis, in voxels; the field is finite everywhere."""
    disp = Registrar(QUICK, device="cpu").register(images.fixed, images.moving).disp
    assert disp.shape == (3, *images.fixed.shape) and np.isfinite(disp).all()
    return float(np.median(disp[0][2:-2]))


@pytest.mark.parametrize(("low", "high", "dtype"), [
    (-32768, 32767, np.int16), (0, 65535, np.uint16), (-(2.0**31), 2.0**31 - 256, np.int32), (-1e30, 1e30, np.float32),
    (-9e36, 9e36, np.float64), (0, 1e-30, np.float32), (1e6, 1e6 + 64, np.float64)])
def test_extreme_values_are_registered_like_any_others(tmp_path: Path, low: float, high: float, dtype: type) -> None:
    images = loaded(tmp_path, (16, 16, 16), 1.0, low, high, dtype)
    assert images.warnings == ()
    assert abs(shift(images) - 1.0) < 0.25  # a quarter of a voxel: 16 voxels hold little to go by


@pytest.mark.parametrize(("low", "high", "dtype", "code"), [
    (-1e38, 1e38, np.float32, "out-of-range"), (0, 1e300, np.float64, "out-of-range"), (0, np.inf, np.float32, "non-finite"),
    (1e9, 1e9 + 8, np.float64, "constant")])
def test_values_that_cannot_be_calculated_with_are_named(tmp_path: Path, low: float, high: float, dtype: type, code: str) -> None:
    with pytest.raises(InputError, match=rf"fixed\.nii\.gz.*\[{code}\].*moving\.nii\.gz.*\[{code}\]"), np.errstate(all="ignore"):
        loaded(tmp_path, (8, 8, 8), 1.0, low, high, dtype)


@pytest.mark.parametrize(("shape", "spacing", "warnings"), [
    ((16, 16, 16), 1.0, 0), ((64, 64, 5), 1.0, 0), pytest.param((256, 256, 5), 1.0, 0, marks=pytest.mark.slow),
    ((16, 16, 16), 1000.0, 2), ((16, 16, 16), 1e-3, 2)])
def test_tiny_thin_and_strangely_spaced_images_are_registered(tmp_path: Path, shape: tuple[int, int, int], spacing: float,
                                                              warnings: int) -> None:
    images = loaded(tmp_path, shape, spacing, 0, 1000, np.int16)
    assert sum("[spacing]" in text for text in images.warnings) == warnings == len(images.warnings)
    assert abs(shift(images) - 1.0) < 0.25


@pytest.mark.parametrize(("offset", "code"), [(15.9, "small-overlap"), (16.1, "no-overlap"), (1e5, "no-overlap")])
def test_images_that_share_little_or_nothing_are_named(tmp_path: Path, offset: float, code: str) -> None:
    if code == "small-overlap":
        images = loaded(tmp_path, (16, 16, 16), 1.0, 0, 1000, np.int16, offset)
        assert [code in text for text in images.warnings] == [True]
        return
    with pytest.raises(InputError, match=rf"\[{code}\]"):
        loaded(tmp_path, (16, 16, 16), 1.0, 0, 1000, np.int16, offset)
