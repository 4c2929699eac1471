"""Grey values to [0, 1], where an image says anything, and one grid for both images."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from fake_encoder import affine
from scipy import ndimage

from dinoreg.config import IntensityConfig
from dinoreg.errors import ConfigError, InputError
from dinoreg.preprocess import body_mask, grown, on_grid, to_unit_range, valid_region
from dinoreg.volume import Volume

WINDOWS = IntensityConfig(ct_window=(-100.0, 300.0), cbct_window=(-500.0, 500.0), percentiles=(5.0, 90.0))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- windows


@pytest.mark.parametrize(("modality", "low", "high"), [("CT", -100, 300), ("CBCT", -500, 500)])
def test_ct_windows_map_their_ends_to_0_and_1(modality: str, low: float, high: float) -> None:
    values = np.array([-1000, low - 1, low, (low + high) / 2, high, high + 1000], dtype=np.float32).reshape(1, 2, 3)
    found = to_unit_range(values, modality, WINDOWS)
    np.testing.assert_allclose(found.ravel(), [0, 0, 0, 0.5, 1, 1], atol=1e-6)
    assert found.dtype == np.float32 and found.shape == (1, 2, 3)


@pytest.mark.parametrize("modality", ["CT", "CBCT", "MR", ""])
def test_percentiles_are_used_where_values_cannot_be_hu(modality: str) -> None:
    values = np.linspace(-150, 850, 1001, dtype=np.float32).reshape(7, 11, 13)
    low, high = np.percentile(values[values > -150], (5, 90))
    expected = np.clip((values - low) / (high - low), 0, 1)
    np.testing.assert_allclose(to_unit_range(values, modality, WINDOWS), expected, atol=1e-5)


def test_unknown_modalities_use_percentiles_even_of_values_that_could_be_hu() -> None:
    values = np.linspace(-1000, 1000, 1001, dtype=np.float32).reshape(7, 11, 13)
    found = to_unit_range(values, "MR", WINDOWS)
    np.testing.assert_allclose(found, to_unit_range(values + 1000, "CT", WINDOWS), atol=1e-5)  # 0..2000 cannot be HU
    assert not np.allclose(found, to_unit_range(values, "CT", WINDOWS), atol=0.01)


def test_percentiles_do_not_depend_on_how_much_background_there_is() -> None:
    tissue = np.random.default_rng(0).uniform(100, 900, (6, 7, 8)).astype(np.float32)
    little, much = (to_unit_range(np.pad(tissue, ((n, 0), (0, 0), (0, 0))), "MR", WINDOWS)[n:] for n in (1, 40))
    assert np.array_equal(little, much)
    published = to_unit_range(np.pad(tissue, ((40, 0), (0, 0), (0, 0))), "MR", WINDOWS, background=True)[40:]
    assert not np.array_equal(published, much)


def test_a_zeroth_percentile_means_the_smallest_value_of_all() -> None:
    values = np.zeros((4, 5, 6), dtype=np.float32)
    values[2:] = np.linspace(10, 20, 60, dtype=np.float32).reshape(2, 5, 6)
    found = to_unit_range(values, "MR", IntensityConfig(percentiles=(0.0, 100.0)))
    np.testing.assert_allclose(found, values / 20, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.999])
@pytest.mark.parametrize("background", [False, True])
def test_an_image_of_two_values_keeps_its_contrast(share: float, background: bool) -> None:
    """A label map, or a thresholded image: all voxels above the smallest have one value, and so do both percentiles."""
    values = np.where(np.random.default_rng(0).random((10, 11, 12)) < share, 3, 7).astype(np.float32)
    found = to_unit_range(values, "", IntensityConfig(), background)
    assert np.array_equal(found, (values == 7).astype(np.float32))


def test_missing_values_become_zero_and_do_not_count() -> None:
    values = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    missing = values.copy()
    missing[2] = np.nan
    found = to_unit_range(missing, "MR", WINDOWS)
    assert not found[2].any() and np.array_equal(found[:2], to_unit_range(values[:2], "MR", WINDOWS))


@pytest.mark.parametrize("modality", ["CT", "CBCT", "MR", ""])
@pytest.mark.parametrize("value", [0.0, -1000.0, 400.0])
def test_an_image_of_one_value_is_refused_whatever_the_modality(modality: str, value: float) -> None:
    values = np.full((4, 5, 6), value, dtype=np.float32)
    values[0] = np.nan
    with pytest.raises(InputError, match="one value everywhere"):
        to_unit_range(values, modality, WINDOWS)


def test_an_unknown_modality_is_refused() -> None:
    with pytest.raises(ConfigError, match="'ct'"):
        to_unit_range(random(3, 4, 5), "ct", WINDOWS)


# ---- valid region


def cylinder(shape: tuple[int, int, int], radius: float) -> np.ndarray:
    i, j = np.ogrid[: shape[0], : shape[1]]
    inside = (i - (shape[0] - 1) / 2) ** 2 + (j - (shape[1] - 1) / 2) ** 2 <= radius**2
    return np.broadcast_to(inside[..., None], shape)


@pytest.mark.parametrize("fill", [-1000.0, np.nan])
def test_the_outside_of_a_cylindrical_field_of_view_is_not_valid(fill: float) -> None:
    inside = cylinder((31, 35, 11), 12)
    values = np.where(inside, random(31, 35, 11), np.float32(fill))
    # everything within two voxels (along axes and diagonals) of data, nothing else
    expected = ndimage.binary_dilation(inside, np.ones((3, 3, 3)), iterations=2)
    assert np.array_equal(valid_region(values), expected)
    assert np.array_equal(valid_region(values, margin=1), ndimage.binary_dilation(inside, np.ones((3, 3, 3))))


def test_noise_is_valid_everywhere() -> None:
    assert valid_region(random(13, 14, 15)).all()


def test_constant_holes_that_do_not_reach_the_border_are_valid() -> None:
    values = random(20, 21, 22)
    values[6:14, 6:14, 6:14] = -50.0
    assert valid_region(values).all()


def test_a_thin_rim_of_fill_and_single_minima_at_the_border_are_valid() -> None:
    values = random(12, 13, 14) + 10
    values[0], values[5, 5, -1] = 0, 0
    assert valid_region(values).all()


def test_valid_region_follows_flips_and_permutations() -> None:
    values = np.where(cylinder((23, 25, 9), 9), random(23, 25, 9), np.float32(-7))
    expected = valid_region(values)
    assert np.array_equal(valid_region(values[::-1, :, ::-1]), expected[::-1, :, ::-1])
    assert np.array_equal(valid_region(values.transpose(2, 0, 1)), expected.transpose(2, 0, 1))


# ---- body


def test_the_body_is_the_largest_part_with_its_lungs_and_without_the_couch() -> None:
    body = cylinder((41, 39, 21), 15)
    unit = np.where(body, np.float32(0.6), np.float32(0.0))
    unit[12:18, 15:25, 4:17] = 0.0  # a lung
    unit[38:40] = 0.5  # the couch
    found = body_mask(unit, np.ones(unit.shape, dtype=bool))
    smooth = ndimage.binary_opening(body, np.ones((3, 3, 3)))
    assert np.array_equal(found, smooth)


def test_without_anything_bright_the_body_is_all_that_is_valid() -> None:
    valid = cylinder((12, 13, 5), 5)
    assert np.array_equal(body_mask(np.zeros((12, 13, 5), dtype=np.float32), valid), valid)


def test_a_grown_mask_reaches_three_voxels_farther() -> None:
    mask = np.zeros((9, 10, 11), dtype=bool)
    mask[4, 5, 5] = True
    expected = np.zeros_like(mask)
    expected[1:8, 2:9, 2:9] = True
    assert np.array_equal(grown(mask), expected)


# ---- one grid


def to_sitk(volume: Volume) -> sitk.Image:
    lps = np.diag([-1.0, -1, 1, 1]) @ volume.affine
    found = sitk.GetImageFromArray(volume.array.transpose(2, 1, 0))
    found.SetSpacing(volume.spacing)
    found.SetOrigin(lps[:3, 3].tolist())
    found.SetDirection((lps[:3, :3] / np.array(volume.spacing)).ravel().tolist())
    return found


def resampled(volume: Volume, reference: Volume, interpolator: int) -> np.ndarray:
    """SimpleITK's answer, NaN where the volume has no voxel."""
    image = sitk.Cast(to_sitk(volume), sitk.sitkFloat64)
    found = sitk.Resample(image, to_sitk(reference), sitk.Transform(), interpolator, float("nan"))
    return sitk.GetArrayFromImage(found).transpose(2, 1, 0)


GRIDS = [((1.5, 2.0, 2.5), "LAS", 0.0), ((2.0, 2.0, 2.0), "LPS", 0.0), ((2.5, 1.5, 2.0), "PIR", 0.0),
         ((1.5, 2.0, 2.5), "RAS", 20.0), ((2.0, 3.0, 1.0), "SLA", -35.0)]


@pytest.mark.parametrize(("spacing", "codes", "tilt"), GRIDS)
@pytest.mark.parametrize("order", [0, 1])
def test_on_grid_is_simpleitk_resample(spacing: tuple[float, float, float], codes: str, tilt: float, order: int) -> None:
    reference = Volume(np.zeros((17, 19, 15), dtype=np.float32), affine((2.0, 2.0, 2.5)))
    header = affine(spacing, codes, tilt)
    # centres a little apart, so that parts of the reference lie outside and no voxel half-way between two
    centre = reference.affine @ [8.3, 9.7, 6.9, 1]
    header[:3, 3] += (centre - header @ [9, 7.5, 8, 1])[:3]
    volume = Volume(random(19, 16, 17), header)
    found = on_grid(volume, reference, order)
    expected = resampled(volume, reference, sitk.sitkLinear if order else sitk.sitkNearestNeighbor)
    missing = np.isnan(expected)
    assert 0.02 < missing.mean() < 0.9
    if order:
        assert np.array_equal(np.isnan(found), missing)
        # scipy and ITK both interpolate in double precision; coordinates differ by 1e-13, values are rounded to float32
        np.testing.assert_allclose(found[~missing], expected[~missing], rtol=0, atol=1e-5)
    else:
        assert np.array_equal(found, np.where(missing, 0, expected))


@pytest.mark.parametrize("tilt", [0.0, 17.0])
@pytest.mark.parametrize("order", [0, 1])
def test_the_same_voxels_stored_in_another_order_come_back_whole(tilt: float, order: int) -> None:
    """Coordinates of border voxels may come out a rounding error outside; that is no reason to lose a face of the volume."""
    reference = Volume(random(11, 12, 13), affine((0.7, 1.3, 2.1), "RAS", tilt))
    for axes in ((0,), (1, 2), (0, 1, 2)):
        header = reference.affine.copy()
        for axis in axes:
            header[:, 3] += header[:, axis] * (reference.shape[axis] - 1)
            header[:, axis] *= -1
        stored = Volume(np.flip(reference.array, axes), header)
        np.testing.assert_allclose(on_grid(stored, reference, order), reference.array, rtol=0, atol=1e-5)


def test_half_a_voxel_around_the_outermost_centres_belongs_to_the_volume() -> None:
    """A volume of 2 mm voxels and one of 1 mm voxels over the same extent cover one another."""
    coarse = Volume(random(6, 7, 8), affine((2.0, 2.0, 2.0)))
    header = affine((1.0, 1.0, 1.0))
    header[:3, 3] -= 0.5
    fine = Volume(np.zeros((12, 14, 16), dtype=np.float32), header)
    found = on_grid(coarse, fine)
    assert np.isfinite(found).all() and found[0, 0, 0] == coarse.array[0, 0, 0]


def test_one_grid_needs_no_resampling() -> None:
    labels = Volume(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), affine((1.0, 2.0, 3.0)))
    assert on_grid(labels, labels, order=0) is labels.array
    assert on_grid(labels, labels).dtype == np.float32


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, bool])
def test_nearest_keeps_the_type(dtype: type) -> None:
    volume = Volume((random(6, 7, 8) > 0).astype(dtype), affine((1.0, 1.0, 1.0)))
    reference = Volume(np.zeros((5, 5, 5), dtype=np.float32), affine((1.5, 1.5, 1.5)))
    found = on_grid(volume, reference, order=0)
    assert found.dtype == dtype and found.any()


def test_a_volume_elsewhere_has_no_value_at_all() -> None:
    reference = Volume(random(5, 6, 7), affine((1.0, 1.0, 1.0)))
    header = affine((1.0, 1.0, 1.0))
    header[0, 3] += 100
    assert np.isnan(on_grid(Volume(random(5, 6, 7), header), reference)).all()
    assert not on_grid(Volume(random(5, 6, 7), header), reference, order=0).any()
