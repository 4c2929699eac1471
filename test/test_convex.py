"""The discrete stage: the cost of every candidate, the convex coupling, both directions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from dinoreg.convex import (
    COUPLING,
    UNKNOWN,
    FeatureVolume,
    candidates,
    cost_volume,
    coupled_convex,
    discrete,
    inverse_consistent,
    settled,
)
from dinoreg.grid import Shape, apply_axes, compose, gaussian_matrix

SUM = 1e-5  # float32 sums of squares of order 1 to 10, some by way of |f|^2 - 2 f.m + |m|^2


def texture(*shape: int, seed: int = 0, sigma: float = 0.8) -> Tensor:
    """Random features whose distance between unrelated cells is 1."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    smooth = apply_axes(noise, [gaussian_matrix(n, sigma) for n in shape[-3:]])
    return smooth / (smooth.std() * (2 * shape[0]) ** 0.5)


def shifted_pair(shape: Shape, shift: tuple[int, int, int], channels: int = 8) -> tuple[FeatureVolume, FeatureVolume]:
    """Two windows of one texture: fixed(x) = moving(x + shift)."""
    margin = max(abs(s) for s in shift)
    whole = texture(channels, *(n + 2 * margin for n in shape))
    low = (slice(None), *(slice(margin, margin + n) for n in shape))
    moved = (slice(None), *(slice(margin - s, margin - s + n) for n, s in zip(shape, shift, strict=True)))
    return FeatureVolume(whole[low].clone(), torch.ones(shape)), FeatureVolume(whole[moved].clone(), torch.ones(shape))


def naive_average(values: np.ndarray, coarse: Shape) -> np.ndarray:
    """Area average onto a lattice, then twice the mean over the 3^3 cells around each, as far as they exist."""
    for axis, m in enumerate(coarse):
        n = values.shape[axis]
        rows = []
        for a in range(m):
            low, high = a * n / m, (a + 1) * n / m
            share = [max(0.0, min(high, x + 1) - max(low, x)) for x in range(n)]
            rows.append(np.average(np.moveaxis(values, axis, 0), axis=0, weights=share))
        values = np.moveaxis(np.stack(rows), 0, axis)
    for _ in range(2):
        ones = ndimage.uniform_filter(np.ones_like(values), 3, mode="constant")
        values = ndimage.uniform_filter(values, 3, mode="constant") / ones
    return values


def naive_cost(fixed: FeatureVolume, moving: FeatureVolume, half_width: int, coarse: Shape) -> np.ndarray:
    f, wf, m, wm = (x.double().numpy() for x in (fixed.features, fixed.weight, moving.features, moving.weight))
    where = np.indices(wf.shape)
    costs = []
    for step in itertools.product(range(-half_width, half_width + 1), repeat=3):
        at = tuple(np.clip(index + d, 0, n - 1) for index, d, n in zip(where, step, wf.shape, strict=True))
        weight = wf * wm[at]
        difference = weight * ((f - m[(slice(None), *at)]) ** 2).sum(0)
        ratio = (naive_average(difference, coarse) + UNKNOWN) / (naive_average(weight, coarse) + UNKNOWN)
        costs.append(ratio * naive_average(wf, coarse))
    return np.stack(costs)


def naive_coupled_convex(cost: np.ndarray, steps: np.ndarray) -> np.ndarray:
    shape = cost.shape[1:]
    disp = np.zeros((3, *shape))
    share = ndimage.uniform_filter(np.ones(shape), 3, mode="constant")
    for beta in (COUPLING[0], *COUPLING):
        picks = np.zeros_like(disp)
        for cell in np.ndindex(*shape):
            distance = ((steps - disp[(slice(None), *cell)]) ** 2).sum(1)
            picks[(slice(None), *cell)] = steps[np.argmin(cost[(slice(None), *cell)] + beta * distance)]
        disp = np.stack([ndimage.uniform_filter(p, 3, mode="constant") / share for p in picks])
    return disp


def weighted_pair(shape: Shape) -> tuple[FeatureVolume, FeatureVolume]:
    generator = torch.Generator().manual_seed(5)
    return (FeatureVolume(texture(4, *shape), torch.rand(shape, generator=generator).round(decimals=1)),
            FeatureVolume(texture(4, *shape, seed=1), (torch.rand(shape, generator=generator) > 0.3).float()))


# ---- cost


def test_candidates_are_all_steps_with_the_last_axis_fastest() -> None:
    found = candidates(2)
    assert found.shape == (125, 3) and found[0].tolist() == [-2, -2, -2] and found[1].tolist() == [-2, -2, -1]
    assert len({tuple(step) for step in found.tolist()}) == 125 and found[62].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("shape", "coarse", "half_width"), [((6, 8, 10), (3, 4, 5), 2), ((7, 5, 9), (3, 5, 4), 1),
                                                             ((4, 11, 1), (2, 3, 1), 3)])
def test_cost_is_that_of_a_loop_over_candidates(shape: Shape, coarse: Shape, half_width: int) -> None:
    fixed, moving = weighted_pair(shape)
    found = cost_volume(fixed, moving, half_width, coarse)
    assert found.shape == ((2 * half_width + 1) ** 3, *coarse)
    np.testing.assert_allclose(found, naive_cost(fixed, moving, half_width, coarse), rtol=1e-4, atol=SUM)


def test_cost_is_zero_at_the_truth_and_about_one_where_nothing_is_related() -> None:
    fixed, moving = shifted_pair((24, 21, 26), (2, -1, 3), channels=24)
    cost = cost_volume(fixed, moving, 3, (12, 10, 13))[:, 4:-4, 4:-4, 4:-4]
    truth = int((candidates(3) == torch.tensor([2.0, -1, 3])).all(1).nonzero())
    # what is left is the share that counts as unknown
    torch.testing.assert_close(cost[truth], torch.full_like(cost[truth], UNKNOWN / (1 + UNKNOWN)), rtol=0, atol=SUM)
    others = cost[(candidates(3) - candidates(3)[truth]).norm(dim=1) >= 4]  # where the texture is no longer like itself
    assert float(others.mean()) == pytest.approx(1, abs=0.1)


def test_cells_without_fixed_data_cost_nothing_and_those_without_moving_data_cost_one() -> None:
    fixed, moving = weighted_pair((6, 8, 10))
    empty = torch.zeros(6, 8, 10)
    assert not cost_volume(FeatureVolume(fixed.features, empty), moving, 1, (3, 4, 5)).any()
    cost = cost_volume(FeatureVolume(fixed.features, torch.ones(6, 8, 10)), FeatureVolume(moving.features, empty), 1, (3, 4, 5))
    torch.testing.assert_close(cost, torch.ones_like(cost), rtol=0, atol=SUM)


# ---- coupling


@pytest.mark.parametrize("shape", [(5, 4, 6), (3, 7, 1)])
def test_coupled_convex_is_that_of_a_loop_over_cells(shape: Shape) -> None:
    steps = candidates(2) * torch.tensor([0.5, 0.45, 0.6])
    cost = 0.1 * torch.rand(125, *shape, generator=torch.Generator().manual_seed(0))  # the coupling decides early
    expected = naive_coupled_convex(cost.double().numpy(), steps.double().numpy())
    np.testing.assert_allclose(coupled_convex(cost, steps), expected, rtol=0, atol=1e-5)  # means of 27 picks of at most 1.2


def test_no_evidence_at_all_means_no_motion() -> None:
    assert not coupled_convex(torch.zeros(125, 4, 5, 6), candidates(2)).any()
    assert not coupled_convex(torch.ones(125, 4, 5, 6), candidates(2)).any()


def test_cells_without_evidence_follow_their_neighbours() -> None:
    """The first candidate is the far corner of the search: a plain arg-min of equal costs would send such cells there."""
    steps = candidates(3)
    cost = torch.zeros(343, 12, 5, 6)
    truth = int((steps == torch.tensor([2.0, 1, -1])).all(1).nonzero())
    cost[:, :6] = 1
    cost[truth, :6] = 0
    disp = coupled_convex(cost, steps)
    motion = torch.tensor([2.0, 1, -1])[:, None, None]
    torch.testing.assert_close(disp[:, :5], motion[..., None].expand(3, 5, 5, 6), rtol=0, atol=1e-5)
    for plane in range(6, 12):  # between no motion and that of the neighbours, and no farther away from them than the last
        assert (disp[:, plane] * motion.sign() >= -1e-5).all() and (disp[:, plane] * motion.sign() <= motion.abs() + 1e-5).all()
        assert (disp[:, plane].abs() <= disp[:, plane - 1].abs() + 1e-5).all()
    assert disp[:, 6].abs().min() > 0


# ---- both directions


@pytest.mark.parametrize(("shape", "shift"), [((24, 21, 26), (2, -1, 3)), ((19, 23, 17), (-3, 2, 0)), ((16, 16, 16), (0, 0, 0))])
def test_a_shift_of_whole_cells_is_recovered(shape: Shape, shift: tuple[int, int, int]) -> None:
    fixed, moving = shifted_pair(shape, shift)
    coarse = (shape[0] // 2, shape[1] // 2, shape[2] // 2)
    disp, saturated, _ = discrete(fixed, moving, 4, coarse, 15)
    found = disp * torch.tensor([n / m for n, m in zip(shape, coarse, strict=True)])[:, None, None, None]
    expected = torch.tensor(shift)[:, None, None, None].expand_as(found).float()
    # away from where the texture leaves the volume every cell picks the truth; means of it are exact but for rounding
    torch.testing.assert_close(found[:, 3:-3, 3:-3, 3:-3], expected[:, 3:-3, 3:-3, 3:-3], rtol=0, atol=1e-4)
    assert (found - expected).abs().max() < 1  # nowhere by more than a cell
    assert saturated == 0


def test_a_region_without_fixed_data_stays_calm() -> None:
    fixed, moving = shifted_pair((24, 20, 20), (2, -1, 3))
    weight = torch.ones(24, 20, 20)
    weight[12:] = 0
    disp, _, _ = discrete(FeatureVolume(fixed.features, weight), moving, 4, (12, 10, 10), 0)
    shift = torch.tensor([1.0, -0.5, 1.5])[:, None, None, None]
    assert (disp * shift.sign() >= -1e-4).all() and (disp.abs() <= shift.abs() + 0.3).all()


def test_equal_images_do_not_move_whatever_the_weights() -> None:
    fixed, _ = weighted_pair((14, 12, 16))
    disp, saturated, _ = discrete(fixed, fixed, 3, (7, 6, 8), 15)
    assert not disp.any() and saturated == 0


@pytest.mark.parametrize("axes", [(0,), (1, 2)])
def test_flipping_both_volumes_flips_the_field(axes: tuple[int, ...]) -> None:
    fixed, moving = (FeatureVolume(texture(6, 13, 12, 15, seed=s), torch.ones(13, 12, 15)) for s in (0, 1))
    expected, _, _ = discrete(fixed, moving, 2, (6, 6, 7), 15)
    turned = [FeatureVolume(v.features.flip([a + 1 for a in axes]), v.weight.flip(list(axes))) for v in (fixed, moving)]
    found, _, _ = discrete(turned[0], turned[1], 2, (6, 6, 7), 15)
    sign = torch.tensor([-1.0 if axis in axes else 1.0 for axis in range(3)])[:, None, None, None]
    torch.testing.assert_close(found.flip([a + 1 for a in axes]) * sign, expected, rtol=0, atol=1e-4)


def test_permuting_axes_permutes_the_field() -> None:
    fixed, moving = (FeatureVolume(texture(6, 13, 12, 15, seed=s), torch.ones(13, 12, 15)) for s in (0, 1))
    expected, _, _ = discrete(fixed, moving, 2, (6, 6, 7), 15)
    order = (2, 0, 1)
    turned = [FeatureVolume(v.features.permute(0, *(a + 1 for a in order)), v.weight.permute(order)) for v in (fixed, moving)]
    found, _, _ = discrete(turned[0], turned[1], 2, (7, 6, 6), 15)
    torch.testing.assert_close(found, expected[list(order)].permute(0, *(a + 1 for a in order)), rtol=0, atol=1e-4)


def test_inverse_consistency_shrinks_the_residual_and_leaves_true_inverses_alone() -> None:
    def field(seed: int) -> Tensor:
        return 12 * texture(3, 16, 15, 17, seed=seed, sigma=4.0)

    def residual(forward: Tensor, backward: Tensor) -> float:
        return float(compose(backward, forward)[:, 3:-3, 3:-3, 3:-3].square().mean().sqrt())

    one, two = field(0), field(1)
    first, again = inverse_consistent(one, two, 15)
    assert residual(first, again) < 0.02 * residual(one, two)
    shift = torch.tensor([1.0, -2, 3])[:, None, None, None].expand(3, 8, 8, 8)
    forward, backward = inverse_consistent(shift, -shift, 15)
    torch.testing.assert_close(forward, shift.clone())
    torch.testing.assert_close(backward, -shift)


def test_a_constant_contradiction_is_met_half_way() -> None:
    forward, backward = inverse_consistent(torch.full((3, 6, 6, 6), 3.0), torch.full((3, 6, 6, 6), -1.0), 15)
    torch.testing.assert_close(forward, torch.full((3, 6, 6, 6), 2.0))
    torch.testing.assert_close(backward, torch.full((3, 6, 6, 6), -2.0))


def test_an_ambiguous_match_gives_way_to_clear_ones_beside_it_and_not_the_other_way() -> None:
    disp, clear = torch.zeros(3, 9, 8, 7), torch.full((9, 8, 7), 0.8)
    disp[:, 4, 4, 3] = 10.0
    clear[4, 4, 3] = 0.0
    # it weighs .02 against .8 of each of its neighbours, of which a Gaussian of one cell counts about 15
    assert 0 < float(settled(disp, clear).max()) < 0.05
    constant = torch.full((3, 9, 8, 7), 2.5)
    torch.testing.assert_close(settled(constant, clear), constant)


def test_motion_at_the_edge_of_the_search_is_noticed() -> None:
    fixed, moving = shifted_pair((20, 20, 20), (4, 0, 0))
    assert discrete(fixed, moving, 4, (10, 10, 10), 0)[1] > 0.5
    assert discrete(fixed, moving, 5, (10, 10, 10), 0)[1] == 0


def test_result_is_the_same_to_the_bit_on_any_number_of_threads() -> None:
    fixed, moving = (FeatureVolume(texture(5, 30, 23, 31, seed=s), torch.ones(30, 23, 31)) for s in (0, 1))
    f, m = fixed.features, moving.features
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cost = cost_volume(fixed, moving, 1, (15, 11, 15))
            results.append((cost, coupled_convex(cost, candidates(1) * 0.5), *inverse_consistent(f[:3], m[:3], 1)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
