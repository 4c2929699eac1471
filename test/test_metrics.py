"""Each metric against something that shares no code with it: SimpleITK's filters, analytic fields, recorded reference numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from dinoreg import metrics
from dinoreg.errors import InputError

SPACING = (1.5, 1.0, 3.0)


def smooth_disp(shape: tuple[int, int, int], seed: int, amplitude: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    disp = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 3.0) for _ in range(3)])
    return (disp / np.abs(disp).max() * amplitude).astype(np.float32)


def blobs(shape: tuple[int, int, int], seed: int, labels: int = 3) -> np.ndarray:
    """A label map of smooth random regions."""
    fields = [ndimage.gaussian_filter(np.random.default_rng([seed, n]).standard_normal(shape), 2.5) for n in range(labels + 1)]
    return np.argmax(fields, axis=0).astype(np.uint8)


def to_sitk(array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(spacing)
    return image


def from_sitk(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0)


def disp_to_sitk(disp: np.ndarray) -> sitk.Image:
    return sitk.GetImageFromArray(np.ascontiguousarray(disp.transpose(3, 2, 1, 0).astype(np.float64)), isVector=True)


# ---- warping ----

def test_three_different_shifts_pull_from_the_right_voxels() -> None:
    moving = np.arange(7 * 8 * 9, dtype=np.int16).reshape(7, 8, 9) + 1
    disp = np.zeros((3, 7, 8, 9), dtype=np.float32)
    disp[0], disp[1], disp[2] = 1, -2, 3
    for order in (0, 1):
        warped = metrics.warp_array(moving, disp, order)
        assert np.array_equal(warped[:6, 2:, :6], moving[1:, :6, 3:])
        assert not warped[6].any() and not warped[:, :2].any() and not warped[:, :, 6:].any()


def test_linear_warp_agrees_with_itk() -> None:
    shape = (20, 18, 16)
    moving = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    disp = smooth_disp(shape, 2, 2.5)
    transform = sitk.DisplacementFieldTransform(disp_to_sitk(disp))
    expected = from_sitk(sitk.Resample(to_sitk(moving), to_sitk(moving), transform, sitk.sitkLinear, 0.0))
    inside = (slice(3, -3),) * 3  # ITK and scipy differ in the half voxel beyond the outermost centres
    # float32 result of values about 1
    assert np.abs(metrics.warp_array(moving, disp, 1) - expected)[inside].max() < 1e-5


# ---- overlap ----

def test_dice_agrees_with_itk() -> None:
    fixed, warped = blobs((20, 21, 22), 5), blobs((20, 21, 22), 6)
    measures = sitk.LabelOverlapMeasuresImageFilter()
    measures.Execute(to_sitk(fixed), to_sitk(warped))
    dice = metrics.dice_per_label(fixed, warped)
    assert sorted(dice) == [1, 2, 3]
    for label, value in dice.items():
        assert value == pytest.approx(measures.GetDiceCoefficient(label), abs=1e-12)  # both divide the same two counts


def test_labels_without_a_partner_are_named_and_not_averaged_away() -> None:
    fixed, moving = np.zeros((2, 4, 4, 4), dtype=np.int16)
    fixed[0], moving[0] = 5, 5
    fixed[1, 1], moving[2, 2] = 7, 9
    assert metrics.shared_labels(fixed, moving) == ([5], [7, 9])
    assert metrics.dice_per_label(fixed, moving) == {5: 1.0, 7: 0.0, 9: 0.0}
    assert metrics.dice_per_label(fixed, moving, [5]) == {5: 1.0}
    assert math.isnan(metrics.dice_per_label(fixed, moving, [40])[40])
    for hd95 in (metrics.hd95_mm(fixed, moving, SPACING, [5, 7, 40]), metrics.hd95_official(fixed, moving, [5, 7, 40])):
        assert hd95[5] == 0.0 and hd95[7] == math.inf and math.isnan(hd95[40])


@pytest.mark.parametrize("bad", [-1, 0.5, np.nan, 70000])
def test_labels_that_are_no_small_whole_numbers_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="whole numbers"):
        metrics.dice_per_label(np.full((2, 2, 2), bad), np.zeros((2, 2, 2), dtype=np.uint8))


def test_label_maps_of_two_grids_are_refused() -> None:
    with pytest.raises(InputError, match="one grid"):
        metrics.dice_per_label(np.zeros((2, 2, 2), dtype=np.uint8), np.zeros((2, 2, 3), dtype=np.uint8))


# ---- surface distance ----

def test_hd95_mm_agrees_with_itk_distance_maps() -> None:
    fixed, warped = blobs((24, 20, 18), 7), blobs((24, 20, 18), 8)
    for label, value in metrics.hd95_mm(fixed, warped, SPACING).items():
        contours, directed = [], []
        for labels in (fixed, warped):
            mask = np.pad((labels == label).astype(np.uint8), 1)  # so that the edge of the image is a surface
            contours.append(sitk.BinaryContour(to_sitk(mask, SPACING), fullyConnected=False))
        for source, target in (contours, contours[::-1]):
            distance = sitk.SignedMaurerDistanceMap(target, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
            directed.append(np.percentile(np.abs(from_sitk(distance))[from_sitk(source) > 0], 95))
        assert value == pytest.approx(max(directed), abs=1e-4)  # ITK's map is float32, distances are below 30 mm


def test_hd95_of_a_shifted_slab_is_the_shift_in_mm_and_in_voxels() -> None:
    fixed = np.zeros((30, 12, 12), dtype=np.uint8)
    warped = fixed.copy()
    fixed[5:15], warped[8:18] = 1, 1
    # the slab ends at the image's edge, so its sides are surface too and lie on the other's sides; the face turned away from the
    # other slab, a fifth of all surface voxels, is 3 voxels from it, and so is more than 5 % of the surface
    assert metrics.hd95_mm(fixed, warped, (2.0, 1.0, 1.0)) == {1: 6.0}
    assert metrics.hd95_official(fixed, warped) == {1: 3.0}


def xorshift_mask(shape: tuple[int, int, int], seed: int, density: float) -> np.ndarray:
    """A random mask from whole-number arithmetic alone: the same on every platform and in every numpy."""
    state, bits = seed, []
    for _ in range(int(np.prod(shape))):
        state ^= (state << 13) & 0xFFFFFFFF
        state ^= state >> 17
        state ^= (state << 5) & 0xFFFFFFFF
        bits.append(state < density * 2**32)
    return np.array(bits, dtype=np.uint8).reshape(shape)


def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
    grid = np.ogrid[0:24, 0:28, 0:32]
    return (sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) <= 1.0).astype(np.uint8)


OFFICIAL_CASES = {
    "ellipsoids": (ellipsoid((11.2, 13.1, 15.4), (8.3, 7.1, 11.7)), ellipsoid((13.0, 12.2, 17.9), (7.2, 9.6, 10.1))),
    "ball with a far speck": (ellipsoid((10, 12, 12), (5, 5, 5)),
                              ellipsoid((10, 12, 12), (5, 5, 5)) | ellipsoid((20, 24, 29), (2, 2, 2))),
    "at the edge": (ellipsoid((0, 0, 0), (9, 9, 9)), ellipsoid((23, 3, 2), (14, 9, 9))),
    "noise": (xorshift_mask((9, 10, 11), 12345, 0.1), xorshift_mask((9, 10, 11), 54321, 0.1)),
    "sparse noise": (xorshift_mask((20, 21, 22), 777, 0.01), xorshift_mask((20, 21, 22), 888, 0.003)),
}
# compute_robust_hausdorff(compute_surface_distances(a, b, (1, 1, 1)), 95) of DeepMind's surface-distance 0.1
OFFICIAL_HD95 = {"ellipsoids": 3.605551275463989,
                 "ball with a far speck": 18.027756377319946,
                 "at the edge": 16.15549442140351,
                 "noise": 1.7320508075688772,
                 "sparse noise": 6.164414002968976}


@pytest.mark.parametrize("name", OFFICIAL_CASES)
def test_official_hd95_equals_the_recorded_reference(name: str) -> None:
    first, second = OFFICIAL_CASES[name]
    assert metrics.hd95_official(first, second) == {1: OFFICIAL_HD95[name]}
    assert metrics.hd95_official(second, first) == {1: OFFICIAL_HD95[name]}


def test_surface_areas_fit_shapes_of_known_area() -> None:
    table = metrics._SURFACE_AREA
    codes = metrics._neighbour_codes(np.ones((6, 5, 4), dtype=bool))
    # a box of voxels: flat faces between the bevels, twelve bevelled edges sqrt(2)/2 wide, eight cut corners of sqrt(3)/8
    expected = 2 * (5 * 4 + 5 * 3 + 4 * 3) + 4 * (5 + 4 + 3) * math.sqrt(0.5) + 8 * math.sqrt(3) / 8
    assert table[codes].sum() == pytest.approx(expected, rel=1e-12)
    assert np.allclose(table, table[::-1])  # inside and outside exchanged
    ball = metrics._neighbour_codes(ellipsoid((11, 13, 15), (10.5, 10.5, 10.5)) > 0)
    # the surface of a voxelised ball of radius r: 4 pi r^2 times the mean over directions of the facet's excess, at most 10 %
    assert 1.0 < table[ball].sum() / (4 * math.pi * 10.5**2) < 1.10


# ---- Jacobian ----

def test_determinant_of_a_linear_field_is_exact_up_to_the_edge() -> None:
    matrix = np.array([[0.1, 0.3, -0.2], [-0.1, 0.2, 0.05], [0.4, 0.1, -0.3]])
    points = np.stack(np.meshgrid(np.arange(6), np.arange(7), np.arange(8), indexing="ij"))
    disp = np.einsum("cd,dijk->cijk", matrix, points).astype(np.float32)
    # float32 displacements up to 6: differences are good to 1e-6
    assert np.abs(metrics.jacobian_determinant(disp) - np.linalg.det(np.eye(3) + matrix)).max() < 1e-5


def test_determinant_agrees_with_itk() -> None:
    disp = smooth_disp((16, 18, 20), 9, 4.0)
    expected = from_sitk(sitk.DisplacementFieldJacobianDeterminant(disp_to_sitk(disp), useImageSpacing=False))
    inside = (slice(1, -1),) * 3  # at the edge ITK halves the gradient
    # float32 derivatives of values up to 4
    assert np.abs(metrics.jacobian_determinant(disp) - expected)[inside].max() < 1e-5
    assert expected[inside].min() < 0.7 and expected[inside].max() > 1.3  # the field does something


def test_folds_are_counted_where_the_field_turns_back() -> None:
    disp = np.zeros((3, 20, 6, 6), dtype=np.float32)
    disp[0, 10:] = -3.0 * np.arange(10)[:, None, None]  # det 1 - 3 = -2 from the 11th plane on, 1 - 1.5 = -0.5 on the 10th
    determinant = metrics.jacobian_determinant(disp)
    assert metrics.folds_percent(determinant) == 50.0
    mask = np.zeros((20, 6, 6), dtype=np.uint8)
    mask[:12] = 1
    assert metrics.folds_percent(determinant, mask) == pytest.approx(100 * 2 / 12)
    assert math.isnan(metrics.folds_percent(determinant, 0 * mask))


def test_zero_determinant_is_a_fold() -> None:
    disp = np.zeros((3, 8, 4, 4), dtype=np.float32)
    disp[1] = -np.arange(4)[None, :, None]
    assert metrics.folds_percent(metrics.jacobian_determinant(disp)) == 100.0


def test_sdlogj_is_the_spread_of_the_logarithm_without_the_folds() -> None:
    determinant = np.exp(np.where(np.indices((8, 8, 8)).sum(axis=0) % 2, 0.3, -0.3)).astype(np.float32)
    assert metrics.sdlogj(determinant) == pytest.approx(0.3, abs=1e-6)  # float32 determinants
    mask = np.ones((8, 8, 8), dtype=np.uint8)
    determinant[0], mask[0] = -1.0, 0
    assert metrics.sdlogj(determinant) == pytest.approx(0.3, abs=1e-6)
    assert metrics.sdlogj(determinant, mask) == pytest.approx(0.3, abs=1e-6)
    assert math.isnan(metrics.sdlogj(-np.ones((3, 3, 3), dtype=np.float32)))


def test_official_sdlogj_follows_its_description() -> None:
    disp = smooth_disp((15, 16, 17), 10, 20.0)
    gradient = np.zeros((3, 3, 15, 16, 17))
    for component in range(3):
        for axis in range(3):
            gradient[component, axis] = ndimage.correlate1d(disp[component].astype(np.float64), [-0.5, 0, 0.5], axis=axis)
    determinant = np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3))[2:-2, 2:-2, 2:-2]
    assert determinant.min() < -3.0  # so that the clip is exercised
    logarithm = np.log(np.clip(determinant + 3, 1e-9, 1e9))
    ours = metrics.jacobian_determinant(disp)
    # float32 against float64 determinants of some tens, one of them possibly beside the clip
    assert metrics.sdlogj_official(ours) == pytest.approx(logarithm.std(), rel=1e-4)
    mask = (np.arange(15)[:, None, None] < 9) & np.ones((15, 16, 17), dtype=bool)
    expected = logarithm[mask[2:-2, 2:-2, 2:-2]].std()
    assert metrics.sdlogj_official(ours, mask.astype(np.uint8)) == pytest.approx(expected, rel=1e-4)


# ---- landmarks ----

def test_tre_of_a_linear_field_is_exact_in_mm_per_axis() -> None:
    points = np.random.default_rng(11).uniform(1, 8, (20, 3))
    matrix = np.array([[0.1, 0.0, 0.05], [0.0, -0.2, 0.1], [0.02, 0.0, 0.15]])
    grid = np.stack(np.meshgrid(np.arange(10), np.arange(10), np.arange(10), indexing="ij"))
    disp = np.einsum("cd,dijk->cijk", matrix, grid)
    residual = np.array([0.5, -1.0, 0.25])
    moving = points + points @ matrix.T - residual
    for tre in (metrics.tre_mm(points, moving, disp, SPACING), metrics.tre_official(points, moving, disp, SPACING)):
        # a cubic spline with mirrored ends bends a linear field near the edge: a hundredth of a millimetre a voxel inside
        assert tre == pytest.approx(np.full(20, math.hypot(0.75, 1.0, 0.75)), abs=0.15)
    assert metrics.tre_mm(points, moving, disp, SPACING) == pytest.approx(np.full(20, math.hypot(0.75, 1.0, 0.75)), abs=1e-9)


def test_beyond_the_grid_only_the_official_tre_loses_the_displacement() -> None:
    disp = np.full((3, 6, 6, 6), 2.0, dtype=np.float32)
    fixed = np.array([[5.4, 3.0, 3.0]])
    assert metrics.tre_mm(fixed, fixed + 2.0, disp, (1, 1, 1)) == pytest.approx([0.0], abs=1e-6)
    assert metrics.tre_official(fixed, fixed + 2.0, disp, (1, 1, 1)) == pytest.approx([math.sqrt(12)], abs=1e-6)


def test_official_tre_samples_a_cubic_spline() -> None:
    disp = np.zeros((3, 11, 11, 11), dtype=np.float32)
    disp[0, 5] = 1.0
    fixed = np.array([[4.5, 5.0, 5.0]])
    values = metrics.tre_official(fixed, fixed, disp, (1, 1, 1)), metrics.tre_mm(fixed, fixed, disp, (1, 1, 1))
    # cardinal cubic spline halfway to its peak: 0.6009 far from the ends (weights z^n of the prefilter, z = sqrt(3) - 2)
    z = math.sqrt(3) - 2
    peak = [6 * z / (z * z - 1) * z ** abs(n) for n in range(-3, 4)]  # B-spline coefficients of a unit impulse
    halfway = sum(c * w for c, w in zip(peak[1:5], (1 / 48, 23 / 48, 23 / 48, 1 / 48), strict=True))
    assert values[0] == pytest.approx([halfway], abs=1e-3)  # the ends of 11 samples are z^5 = 1e-3 away
    assert values[1] == pytest.approx([0.5], abs=1e-9)


def test_endpoint_error_is_in_mm_and_inside_the_mask() -> None:
    disp = np.zeros((3, 4, 4, 4), dtype=np.float32)
    truth = disp.copy()
    truth[0], truth[2] = 2.0, 1.0
    truth[:, 0] = 100.0
    mask = np.ones((4, 4, 4), dtype=np.uint8)
    mask[0] = 0
    assert metrics.endpoint_error_mm(disp, truth, SPACING, mask) == pytest.approx(math.hypot(3.0, 3.0))


@pytest.mark.parametrize("shapes", [((3, 3), (4, 3)), ((3, 2), (3, 2)), ((3,), (3,))])
def test_landmarks_that_do_not_pair_up_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="landmarks"):
        metrics.tre_mm(np.zeros(shapes[0]), np.zeros(shapes[1]), np.zeros((3, 4, 4, 4)), (1, 1, 1))


@pytest.mark.parametrize("shape", [(4, 4, 4), (2, 4, 4, 4), (4, 4, 4, 3)])
def test_a_field_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(3, i, j, k\)"):
        metrics.jacobian_determinant(np.zeros(shape, dtype=np.float32))


def test_aggregates_take_the_unfavourable_quantile_as_the_scorer_does() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert metrics.aggregate(values, higher_is_worse=True)["30"] == 8.0
    assert metrics.aggregate(values, higher_is_worse=False) == {"mean": 6.0, "std": pytest.approx(math.sqrt(10)), "30": 4.0}
    assert math.isnan(metrics.aggregate([1.0, math.nan], higher_is_worse=True)["mean"])
    assert math.isnan(metrics.aggregate([], higher_is_worse=True)["mean"])
