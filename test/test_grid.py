"""The convention: sampling, lattices, smoothing, and the algebra of displacement fields."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from dinoreg import grid, metrics
from dinoreg.grid import (
    SLABS,
    Shape,
    apply_axes,
    area_matrix,
    box_matrix,
    compose,
    gaussian_matrix,
    identity,
    jacobian_determinant,
    lattice_shape,
    limited_cell,
    linear_matrix,
    linear_weights,
    resize,
    resize_disp,
    total,
    unfold,
    warp,
)

# Coordinates pass through [-1, 1] in float32: half a unit in the last place there is 3e-8 * n = 1e-6 voxels for n = 37.
COORDINATE = 1e-5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_disp(shape: Shape, size: float, seed: int = 0) -> Tensor:
    """A smooth random field whose largest component is ``size`` cells."""
    disp = apply_axes(noise(3, *shape, seed=seed), [gaussian_matrix(n, n / 6) for n in shape])
    return disp * (size / disp.abs().max())


def linear_field(matrix: np.ndarray, shape: Shape) -> Tensor:
    """disp(x) = matrix (x - centre)."""
    at = identity(shape) - torch.tensor([(n - 1) / 2 for n in shape])[:, None, None, None]
    return torch.einsum("ab,bijk->aijk", torch.from_numpy(matrix).float(), at)


def inner(x: Tensor, margin: int) -> Tensor:
    return x[..., margin:-margin, margin:-margin, margin:-margin]


# ---- sampling


@pytest.mark.parametrize("source", [(17, 23, 11), (9, 31, 12), (40, 5, 22), (6, 1, 3)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_warp_is_map_coordinates_for_any_pair_of_lattices(source: Shape, mode: str) -> None:
    shape = (17, 23, 11)
    image, disp = noise(2, *source), 4 * noise(3, *shape, seed=1)  # many points fall outside
    ratio = np.array([s / n for s, n in zip(source, shape, strict=True)])[:, None, None, None]
    at = ((identity(shape) + disp).double().numpy() + 0.5) * ratio - 0.5  # cells of the source
    found = warp(image, disp, mode)
    assert found.shape == (2, *shape)
    for channel in range(2):
        expected = ndimage.map_coordinates(image[channel].numpy(), at, order=int(mode == "bilinear"), mode="nearest")
        if mode == "bilinear":
            # neighbouring values differ by up to 8, coordinates by COORDINATE (here n <= 40)
            np.testing.assert_allclose(found[channel], expected, rtol=0, atol=8 * COORDINATE)
        else:
            clear = (np.abs(at - np.floor(at) - 0.5) > COORDINATE).all(0)  # not halfway between two voxels
            assert clear.mean() > 0.99
            np.testing.assert_array_equal(found[channel].numpy()[clear], expected[clear])


@pytest.mark.parametrize("first", [1, 2, 7, 8, 9, 16, 19])
def test_slabs_change_nothing_for_any_length_of_the_first_axis(first: int) -> None:
    shape = (first, 4, 5)
    image, disp = noise(1, *shape), 2 * noise(3, *shape, seed=1)
    expected = ndimage.map_coordinates(image[0].numpy(), (identity(shape) + disp).numpy(), order=1, mode="nearest")
    np.testing.assert_allclose(warp(image, disp)[0], expected, atol=8 * COORDINATE)


def test_zero_field_returns_the_image_and_integer_shifts_return_its_voxels() -> None:
    image = noise(3, 19, 14, 27)
    torch.testing.assert_close(warp(image, torch.zeros(3, 19, 14, 27)), image, rtol=0, atol=8 * COORDINATE)
    shift = torch.tensor([6.0, -4, 5])[:, None, None, None].expand(3, 19, 14, 27)
    torch.testing.assert_close(warp(image, shift)[:, :13, 4:, :22], image[:, 6:, :10, 5:], rtol=0, atol=8 * COORDINATE)


@pytest.mark.parametrize("shape", [(37, 25, 31), (16, 12, 20)])
def test_a_shift_of_6_4_5_comes_back_to_1e_4_voxel(shape: Shape) -> None:
    """Displacements scaled by 2 / (n - 1) on this grid come out (n - 1) / n too short: 5.84 for 6 at n = 37."""
    shift = torch.tensor([6.0, -4, 5])[:, None, None, None].expand(3, *shape)
    moved = warp(identity(shape), shift) - identity(shape)
    inside = moved[:, : shape[0] - 6, 4:, : shape[2] - 5]
    torch.testing.assert_close(inside, shift[:, : shape[0] - 6, 4:, : shape[2] - 5], rtol=0, atol=1e-4)


def test_outside_is_the_nearest_voxel() -> None:
    image = noise(1, 6, 7, 8)
    far = torch.tensor([100.0, -100, 100])[:, None, None, None].expand(3, 6, 7, 8)
    assert (warp(image, far) == image[0, -1, 0, -1]).all()


def test_results_are_the_same_to_the_bit_on_any_number_of_threads() -> None:
    """A tall matrix product and a sum over everything are cut up by the number of threads, which shows in their last bits."""
    shape = (50, 41, 101)
    image, disp = noise(2, *shape), smooth_disp(shape, 5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            leaf = disp.clone().requires_grad_()
            warped = warp(image, leaf)
            slope = torch.autograd.grad(warped, leaf, torch.ones_like(warped))[0]
            smoothed = apply_axes(image, [box_matrix(n, 5, 2) for n in shape])
            small = resize(image, (20, 13, 25))
            repaired = disp + 0.4 * noise(3, *shape, seed=2)
            assert unfold(repaired) > 0
            results.append((warped.detach(), slope, smoothed, small, resize(small, (40, 44, 48)), repaired,
                            torch.stack([total(image.double() ** power) for power in range(1, 9)])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_total_adds_in_double_precision() -> None:
    x = noise(3, 5, 7, 300) + 1000
    assert float(total(x)) == pytest.approx(float(x.double().sum()), rel=1e-14)
    assert total(x).dtype == torch.float64 and total(x).shape == ()


def test_slab_count_is_a_constant_of_the_code() -> None:
    assert SLABS == 8  # results may depend on it in their last bits: not to be derived from the machine


# ---- lattices


def test_apply_axes_is_three_contractions() -> None:
    x = noise(2, 3, 5, 6, 7)
    a, b, c = noise(4, 5, seed=1), noise(9, 6, seed=2), noise(2, 7, seed=3)
    torch.testing.assert_close(apply_axes(x, [a, b, c]), torch.einsum("xyijk,ai,bj,ck->xyabc", x, a, b, c), rtol=1e-4, atol=1e-4)
    one_axis = torch.einsum("ijk,bj->ibk", x[0, 0], b)
    torch.testing.assert_close(apply_axes(x[0, 0], [None, b, None]), one_axis, rtol=1e-5, atol=1e-5)
    assert torch.equal(apply_axes(x, [None, None, None]), x)


@pytest.mark.parametrize(("n", "m"), [(13, 13), (13, 7), (48, 11), (192, 32), (7, 1), (5, 3)])
def test_area_average_keeps_the_mean_and_counts_each_voxel_once(n: int, m: int) -> None:
    matrix = area_matrix(n, m).double()
    torch.testing.assert_close(matrix.sum(1), torch.ones(m, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.sum(0), torch.full((n,), m / n, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (matrix >= 0).all()


def test_area_average_by_a_whole_factor_is_average_pooling() -> None:
    x = noise(2, 12, 15, 8)
    expected = torch.nn.functional.avg_pool3d(x[None], (3, 5, 2))[0]
    torch.testing.assert_close(resize(x, (4, 3, 4)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(13, 7), (48, 11), (190, 32), (100, 17), (5, 3)])
def test_no_size_is_stretched_by_averaging(n: int, m: int) -> None:
    """Pooling 190 voxels by 6 into 31 cells and treating these as all of them moves the far edge by 4 voxels."""
    centres = (np.arange(m) + 0.5) * n / m - 0.5
    found = area_matrix(n, m).double().numpy() @ np.arange(n)
    # A split voxel counts at its centre instead of that of its part: at most (1/2)(1/2)/2 of a voxel in n / m of them.
    np.testing.assert_allclose(found, centres, rtol=0, atol=m / n / 8 + 1e-5)
    np.testing.assert_allclose(found + found[::-1], n - 1, rtol=0, atol=1e-4)  # both ends alike


@pytest.mark.parametrize(("n", "m"), [(7, 13), (11, 48), (32, 190), (3, 5), (1, 4)])
def test_linear_resize_of_a_ramp_is_exact_inside_and_flat_outside(n: int, m: int) -> None:
    centres = (np.arange(m) + 0.5) * n / m - 0.5
    found = linear_matrix(n, m).double().numpy() @ np.arange(n)
    np.testing.assert_allclose(found, np.clip(centres, 0, n - 1), rtol=0, atol=1e-5)


def test_resize_to_a_finer_lattice_is_trilinear_interpolation() -> None:
    x = noise(2, 5, 7, 6)
    expected = torch.nn.functional.interpolate(x[None], (11, 7, 20), mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(resize(x, (11, 7, 20)), expected, rtol=0, atol=1e-5)


def test_linear_weights_replicate_beyond_both_ends() -> None:
    matrix = linear_weights(torch.tensor([-3.0, 0.0, 1.25, 4.0, 9.0]), 5)
    expected = torch.zeros(5, 5)
    expected[[0, 1, 3, 4], [0, 0, 4, 4]] = 1
    expected[2, 1:3] = torch.tensor([0.75, 0.25])
    torch.testing.assert_close(matrix, expected)
    assert torch.equal(linear_weights(torch.tensor([-1.0, 0.4]), 1), torch.ones(2, 1))


@pytest.mark.parametrize("shape", [(10, 10, 10), (7, 31, 20), (1, 12, 3)])
def test_a_constant_shift_in_mm_survives_any_change_of_lattice(shape: Shape) -> None:
    start, spacing = (14, 22, 9), (1.5, 0.7, 3.0)
    shift_mm = torch.tensor([9.0, -4.2, 6.0])
    disp = (shift_mm / torch.tensor(spacing))[:, None, None, None].expand(3, *start)
    cell = torch.tensor([n * s / m for n, s, m in zip(start, spacing, shape, strict=True)])
    found = resize_disp(disp, shape) * cell[:, None, None, None]
    torch.testing.assert_close(found, shift_mm[:, None, None, None].expand(3, *shape), rtol=1e-5, atol=0)


def test_resized_field_moves_the_resized_image_alike() -> None:
    """A field on half the lattice, brought up, points where it did: warping coordinates in [-1, 1] gives the same numbers."""
    shape, half = (18, 24, 30), (9, 12, 15)
    disp = smooth_disp(half, 1.5)
    position = resize(identity(half) + disp, shape)  # linear in the coarse cells
    fine = resize_disp(disp, shape) + identity(shape)
    for axis in range(3):
        torch.testing.assert_close(inner(fine[axis], 2), inner(2 * position[axis] + 0.5, 2), rtol=0, atol=1e-4)


def test_lattice_shape_counts_cells_in_millimetres() -> None:
    assert lattice_shape((100, 60, 50), (1.0, 2.0, 3.0), 4.0) == (25, 30, 38)  # 37.5 rounds to even
    assert lattice_shape((100, 60, 50), (1.0, 2.0, 3.0), 1.5) == (67, 60, 50)  # never finer than the voxels
    assert lattice_shape((3, 200, 1), (1.0, 1.0, 5.0), 50.0) == (1, 4, 1)


# ---- smoothing


@pytest.mark.parametrize("matrix", [box_matrix(13, 3), box_matrix(13, 7, 2), box_matrix(4, 9), gaussian_matrix(13, 1.7),
                                    gaussian_matrix(5, 20.0), box_matrix(1, 3)])
def test_smoothing_keeps_a_constant_up_to_the_border(matrix: Tensor) -> None:
    ones = torch.ones(matrix.shape[0])
    torch.testing.assert_close(matrix @ ones, ones, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [3, 5, 7])
def test_box_is_a_uniform_filter(width: int) -> None:
    line = noise(17).double().numpy()
    zero = ndimage.uniform_filter1d(line, width, mode="constant")
    np.testing.assert_allclose(box_matrix(17, width, zero_border=True).double().numpy() @ line, zero, atol=1e-6)
    share = ndimage.uniform_filter1d(np.ones(17), width, mode="constant")
    np.testing.assert_allclose(box_matrix(17, width).double().numpy() @ line, zero / share, atol=1e-6)
    twice = ndimage.uniform_filter1d(zero, width, mode="constant")
    np.testing.assert_allclose(box_matrix(17, width, 2, zero_border=True).double().numpy() @ line, twice, atol=1e-6)


def test_only_the_published_smoothing_damps_a_field_at_the_border() -> None:
    field = torch.ones(3, 20, 20, 20)
    published = apply_axes(field, [box_matrix(20, 7, 5, zero_border=True)] * 3)
    ours = apply_axes(field, [box_matrix(20, 7, 5)] * 3)
    assert published[:, 0, 10, 10].max() < 0.55 and published[:, 0, 0, 0].max() < 0.55**3
    torch.testing.assert_close(ours, field, rtol=0, atol=1e-5)


def test_gaussian_has_its_width_and_none_means_no_smoothing() -> None:
    matrix = gaussian_matrix(61, 3.0)
    assert matrix is not None
    x = torch.arange(61, dtype=torch.float64) - 30
    assert float((matrix[30].double() * x.square()).sum()) == pytest.approx(9, rel=1e-3)  # the variance; cut at 10 sigma
    assert gaussian_matrix(61, 0.0) is None


# ---- displacement fields


def test_constant_fields_add_up_and_cancel() -> None:
    a, b = (torch.tensor(v)[:, None, None, None].expand(3, 12, 9, 15) for v in ([1.5, -2, 0.25], [0.5, 3, -4]))
    torch.testing.assert_close(compose(a, b), a + b)
    torch.testing.assert_close(compose(a, -a), torch.zeros_like(a))


def test_linear_fields_compose_as_matrices() -> None:
    shape, eye = (31, 27, 35), np.eye(3)
    rng = np.random.default_rng(0)
    a, b = (0.05 * rng.standard_normal((3, 3)) for _ in range(2))
    found = compose(linear_field(a, shape), linear_field(b, shape))
    expected = linear_field((eye + a) @ (eye + b) - eye, shape)
    torch.testing.assert_close(inner(found, 4), inner(expected, 4), rtol=0, atol=1e-4)  # linear functions interpolate exactly


# ---- volume change and folds


def test_jacobian_of_a_linear_field_is_its_determinant_up_to_the_border() -> None:
    a = 0.3 * np.random.default_rng(3).standard_normal((3, 3))
    found = jacobian_determinant(linear_field(a, (7, 9, 5)))
    torch.testing.assert_close(found, torch.full((7, 9, 5), float(np.linalg.det(np.eye(3) + a))), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(7, 9, 5), (2, 3, 8)])
def test_jacobian_agrees_with_the_metric(shape: Shape) -> None:
    disp = noise(3, *shape)
    found = jacobian_determinant(disp).numpy()
    np.testing.assert_allclose(found, metrics.jacobian_determinant(disp.numpy()), rtol=1e-4, atol=1e-4)
    assert (found < 0).any()


def test_jacobian_of_a_single_slice_ignores_that_axis() -> None:
    disp = torch.zeros(3, 6, 5, 1)
    disp[0] = 0.5 * torch.arange(6)[:, None, None]
    torch.testing.assert_close(jacobian_determinant(disp), torch.full((6, 5, 1), 1.5))


def test_unfold_removes_a_fold_and_leaves_the_rest_as_it_is_to_the_bit() -> None:
    disp = smooth_disp((34, 31, 29), 2.0)
    assert float(jacobian_determinant(disp).min()) > 0.05
    folded = disp.clone()
    folded[0, 16:18, 15, 14] += torch.tensor([2.5, -2.5])
    found = folded.clone()
    count = unfold(found)
    assert count == int((jacobian_determinant(folded) < 0.05).sum()) > 0
    assert float(jacobian_determinant(found).min()) >= 0.05
    changed = (found != folded).any(0).nonzero()
    # The fold's determinants lie within 1 voxel of it; each pass reaches 2 voxels beyond the offending ones.
    low, high = changed.amin(0), changed.amax(0)
    assert (low >= torch.tensor([10, 9, 8])).all() and (high <= torch.tensor([23, 21, 20])).all()


def test_unfold_does_not_touch_a_field_without_folds() -> None:
    disp = smooth_disp((20, 21, 22), 2.0)
    found = disp.clone()
    count = unfold(found)
    assert count == 0 and torch.equal(found, disp)


def test_unfold_stops_after_its_passes_with_fewer_folds() -> None:
    disp = 10 * noise(3, 21, 18, 25)
    found = disp.clone()
    count = unfold(found, passes=2)
    left = int((jacobian_determinant(found) < 0.05).sum())
    assert count == int((jacobian_determinant(disp) < 0.05).sum()) and 0 < left < count / 2


@pytest.mark.parametrize("shape", [(21, 18, 25), (4, 30, 6)])
def test_unfold_mends_even_a_field_of_noise(shape: Shape) -> None:
    found = 10 * noise(3, *shape)
    count = unfold(found)
    assert count > 0.2 * found[0].numel()
    assert float(jacobian_determinant(found).min()) >= 0.05


@pytest.mark.parametrize("voxels", [1, 700, 3000])
def test_unfold_in_slabs_is_unfold(voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of sums, which is that of a slab's planes."""
    expected = smooth_disp((34, 31, 29), 2.0)
    expected[0, 16:18, 15, 14] += torch.tensor([2.5, -2.5])
    expected[1, 2, 8:10, 3] += torch.tensor([2.5, -2.5])
    found = expected.clone()
    counts = [unfold(expected)]
    monkeypatch.setattr("dinoreg.slabs.VOXELS", voxels)
    counts.append(unfold(found))
    assert counts[0] == counts[1] > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_cell_grows_until_the_lattice_is_small_enough() -> None:
    for shape, spacing in (((512, 512, 400), (0.7, 0.7, 1.0)), ((300, 300, 5), (1.0, 1.0, 10.0)), ((9, 8, 7), (1.0, 2.0, 3.0))):
        for limit in (1000, 100_000, 16_000_000):
            cell = limited_cell(shape, spacing, min(spacing), limit)
            assert math.prod(lattice_shape(shape, spacing, cell)) <= limit
            if cell > min(spacing):  # and no larger than it has to be: a lattice of cells 3 % smaller has too many
                assert math.prod(lattice_shape(shape, spacing, 0.97 * cell)) > 0.95 * limit
            else:
                assert math.prod(lattice_shape(shape, spacing, cell)) == math.prod(lattice_shape(shape, spacing, min(spacing)))


def test_two_cells_are_interpolated_between_their_centres() -> None:
    expected = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]])
    torch.testing.assert_close(grid.linear_matrix(2, 4), expected, rtol=0, atol=0)


def test_unfold_looks_one_cell_farther_every_ten_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    reaches: list[int] = []
    monkeypatch.setattr(grid, "smooth_near", lambda disp, marked, reach: reaches.append(reach))
    disp = torch.zeros(3, 6, 6, 6)
    disp[0, 3] = -3.0
    grid.unfold(disp, passes=25)
    assert reaches == [1] * 10 + [2] * 10 + [3] * 5


def test_the_slope_of_a_warp_is_its_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    image, upstream = torch.rand(1, 5, 6, 7, generator=generator), torch.rand(1, 4, 5, 6, generator=generator)
    disp = 0.3 + 0.4 * torch.rand(3, 4, 5, 6, generator=generator)
    found = grid.warp_slope(image, disp, upstream)
    disp.requires_grad_()
    (expected,) = torch.autograd.grad((grid.warp(image, disp) * upstream).sum(), disp)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32 sums of eight products of order 1


def test_outside_lies_the_border_or_zero_as_asked() -> None:
    image, away = torch.ones(1, 4, 5, 6), torch.full((3, 4, 5, 6), 10.0)
    assert torch.equal(grid.warp(image, away), image) and torch.equal(grid.warp(image, away, padding="zeros"), 0 * image)
