"""The continuous stage: its gradients, its regulariser, and what it finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinoreg.convex import FeatureVolume
from dinoreg.grid import Shape, apply_axes, box_matrix, gaussian_matrix, identity, jacobian_determinant, warp
from dinoreg.refine import LNCC, FeatureSSD, MutualInformation, Similarity, Sum, laplacian, ranks, refine

SHAPE: Shape = (15, 12, 17)
SETTINGS = {"rate": 0.25, "regularity": 0.5, "step_sigma": 1.0, "damping": 0.01}


def texture(*shape: int, seed: int = 0, sigma: float = 1.5) -> Tensor:
    """Smooth random values with mean 0 and standard deviation 1 a channel."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    smooth = apply_axes(noise, [gaussian_matrix(n, sigma) for n in shape[-3:]])
    return (smooth - smooth.mean()) / smooth.std()


def image(*shape: int, seed: int = 0) -> Tensor:
    return (0.5 + 0.15 * texture(*shape, seed=seed)).clamp(0, 1)


def features(values: Tensor) -> FeatureVolume:
    """With weight 1, scaled so that unrelated cells differ by 1."""
    return FeatureVolume(values / (2 * len(values)) ** 0.5, torch.ones(values.shape[1:]))


def smooth_disp(shape: Shape, size: float, seed: int = 9) -> Tensor:
    disp = texture(3, *shape, seed=seed, sigma=max(shape) / 6)
    return disp * (size / disp.abs().max())


def weights(seed: int) -> Tensor:
    return texture(*SHAPE, seed=seed).sigmoid().double()


def terms(around: Tensor) -> dict[str, tuple[Similarity, Callable[[Tensor], Tensor]]]:
    """In double precision, each data term and its plain formula at every cell, with the weights as they are at a field."""
    wf, wm = weights(3), weights(4)
    one, two = texture(3, *SHAPE).double(), texture(3, *SHAPE, seed=1).double()
    f, m = image(*SHAPE).double(), image(*SHAPE, seed=1).double()

    weight = wf * warp(wm[None], around)[0]

    def ssd(disp: Tensor) -> Tensor:
        return weight * (warp(two, disp) - one).square().sum(0)

    def mean(x: Tensor) -> Tensor:
        return apply_axes(x, [box_matrix(n, 5) for n in SHAPE])

    def lncc(disp: Tensor) -> Tensor:
        moved = warp(m[None], disp)[0]
        cov = mean(f * moved) - mean(f) * mean(moved)
        cov = cov + LNCC.FLOOR * torch.where(cov >= 0, 1, -1)
        var_f, var_m = mean(f * f) - mean(f) ** 2, mean(moved * moved) - mean(moved) ** 2
        return -weight * cov**2 / ((var_f + LNCC.FLOOR) * (var_m + LNCC.FLOOR))

    return {"ssd": (FeatureSSD(FeatureVolume(one, wf), FeatureVolume(two, wm)), ssd), "lncc": (LNCC(f, m, wf, wm, 5), lncc),
            "sum": (Sum([(0.3, FeatureSSD(FeatureVolume(one, wf), FeatureVolume(two, wm))), (2.0, LNCC(f, m, wf, wm, 5))]),
                    lambda disp: 0.3 * ssd(disp) + 2 * lncc(disp))}


# ---- data terms


@pytest.mark.parametrize("name", ["ssd", "lncc", "sum"])
def test_loss_and_gradient_are_those_of_the_plain_formula(name: str) -> None:
    disp = smooth_disp(SHAPE, 2.5).double()
    term, formula = terms(disp)[name]
    loss, slope = term.gradient(disp)
    leaf = disp.clone().requires_grad_()
    expected = formula(leaf)
    by_hand = torch.autograd.grad(expected.sum(), leaf)[0]
    # box matrices are rounded to float32; everything else is in double precision
    assert float(loss) == pytest.approx(float(expected.detach().mean()), rel=1e-6)
    torch.testing.assert_close(slope, by_hand, rtol=0, atol=1e-6 * float(by_hand.abs().max()))
    assert not slope.requires_grad


@pytest.mark.parametrize("name", ["ssd", "lncc"])
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    disp, direction = smooth_disp(SHAPE, 2.5).double(), texture(3, *SHAPE, seed=11).double()
    term, formula = terms(disp)[name]
    step = 1e-6  # of a cell: no cell boundary is crossed but by chance, and differences of 1e-6 have 10 digits left
    numeric = float((formula(disp + step * direction) - formula(disp - step * direction)).sum() / (2 * step))
    analytic = float((term.gradient(disp)[1] * direction).sum())
    assert numeric == pytest.approx(analytic, rel=1e-4)


def test_lncc_sees_no_locally_linear_change_of_intensity_and_no_inversion() -> None:
    fixed, ones = image(24, 20, 22), torch.ones(24, 20, 22)
    ramp = torch.linspace(0.5, 1, 24)[:, None, None]
    for moving in (fixed, 1 - fixed, 0.2 + 0.5 * fixed, ramp * fixed):
        loss, _ = LNCC(fixed, moving, ones, ones, 5).gradient(torch.zeros(3, 24, 20, 22))
        assert float(loss) < -0.94  # short of -1 by the floor of the variance, and by the ramp within a window
    unrelated, _ = LNCC(fixed, image(24, 20, 22, seed=1), ones, ones, 5).gradient(torch.zeros(3, 24, 20, 22))
    assert float(unrelated) > -0.3  # about one over the number of independent values in a window


def test_flat_windows_match_one_another_and_do_not_pull() -> None:
    flat, ones = torch.full(SHAPE, 0.7), torch.ones(SHAPE)
    for fixed, moving, expected in ((flat, flat, -1.0), (flat, image(*SHAPE), 0.0), (image(*SHAPE), flat, 0.0)):
        loss, slope = LNCC(fixed, moving, ones, ones, 5).gradient(torch.zeros(3, *SHAPE))
        # a flat window and one of contrast v: floor / v, a thousandth. 0.7^2 is known to 3e-8, so covariances are known to 1e-7
        # and those of two flat windows to a hundredth of the floor
        assert float(loss) == pytest.approx(expected, abs=0.03) and float(slope.abs().max()) < 0.05


def test_cells_without_weight_do_not_count() -> None:
    one, two = texture(3, *SHAPE), texture(3, *SHAPE, seed=1)
    weight = torch.zeros(SHAPE)
    weight[:7] = 1
    expected = FeatureSSD(FeatureVolume(one, weight), FeatureVolume(two, torch.ones(SHAPE))).gradient(torch.zeros(3, *SHAPE))
    changed = one.clone()
    changed[:, 7:] = 100.0
    found = FeatureSSD(FeatureVolume(changed, weight), FeatureVolume(two, torch.ones(SHAPE))).gradient(torch.zeros(3, *SHAPE))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not found[1][:, 7:].any() and found[1][:, :7].any()


def information(fixed: Tensor, moving: Tensor, weight: Tensor | None = None) -> MutualInformation:
    ones = torch.ones(fixed.shape)
    return MutualInformation(fixed, moving, ones if weight is None else weight, ones)


def test_information_is_that_of_the_joint_histogram() -> None:
    """Equal images: nearly the entropy of 29 filled bins, less what smoothing by a bin mixes; unrelated ones: nearly none."""
    at = torch.zeros(3, 24, 20, 22)
    fixed = image(24, 20, 22)
    equal = -float(information(fixed, fixed).gradient(at)[0])
    unrelated = -float(information(fixed, image(24, 20, 22, seed=1)).gradient(at)[0])
    # smoothing both axes by sigma 1 leaves a band of sigma sqrt(2): log(29 / (sqrt(2 pi e) sqrt(2))) = 1.60
    assert equal == pytest.approx(1.60, abs=0.1)
    assert 0 <= unrelated < 0.05 * equal


def test_information_does_not_ask_how_values_are_related() -> None:
    """An increasing change of the grey values changes nothing, a decreasing one nothing but rounding to bins."""
    at, fixed, moving = smooth_disp(SHAPE, 1.0), image(*SHAPE), image(*SHAPE)
    expected, slope = information(fixed, moving).gradient(at)
    curved, curved_slope = information(fixed, moving.square()).gradient(at)
    # between its 65 quantiles a curve is taken for straight: up to 1/64 of the range squared, and thinly filled bins follow
    assert float(curved) == pytest.approx(float(expected), rel=0.02)
    assert torch.nn.functional.cosine_similarity(curved_slope.flatten(), slope.flatten(), dim=0) > 0.9
    inverted, _ = information(fixed, 1.01 - moving).gradient(at)
    assert float(inverted) == pytest.approx(float(expected), rel=0.1)


def test_slope_of_the_information_is_that_of_finite_differences() -> None:
    """Along a smooth direction, summed over all cells: the loss is a mean, the slope is per cell."""
    fixed, moving = image(20, 18, 22), image(20, 18, 22)
    disp, direction = smooth_disp((20, 18, 22), 1.5), smooth_disp((20, 18, 22), 1.0, seed=4)
    term, step = information(fixed, moving), 0.02
    numeric = float(term.gradient(disp + step * direction)[0] - term.gradient(disp - step * direction)[0]) / (2 * step)
    analytic = float((term.gradient(disp)[1] * direction).sum()) / fixed.numel()
    # the histogram is piecewise linear in the values, and moving cells cross its bins
    assert numeric == pytest.approx(analytic, rel=0.05) and abs(numeric) > 1e-3


def test_cells_without_weight_add_no_information() -> None:
    fixed, weight = image(*SHAPE), torch.zeros(SHAPE)
    weight[:9] = 1
    changed = fixed.clone()
    changed[9:] = 1.0
    at = smooth_disp(SHAPE, 1.0)
    expected, found = (information(f, image(*SHAPE), weight).gradient(at) for f in (fixed, changed))
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
    assert not found[1][:, 9:].any() and found[1][:, :9].any()
    nothing, slope = information(fixed, fixed, torch.zeros(SHAPE)).gradient(at)
    assert torch.isfinite(nothing) and not slope.any()


def test_ranks_are_spread_evenly_and_nothing_stays_nothing() -> None:
    values = image(*SHAPE).pow(3)
    values[:4] = 0
    found = ranks(values, torch.ones(SHAPE))
    assert not found[:4].any() and float(found[4:].min()) >= 0.1
    counts = torch.histc(found[4:], 9, 0.1, 1.0) / found[4:].numel()
    torch.testing.assert_close(counts, torch.full((9,), 1 / 9), rtol=0, atol=0.01)  # quantiles every 1/64
    assert not ranks(torch.zeros(SHAPE), torch.ones(SHAPE)).any()


# ---- regulariser


def test_laplacian_of_quadratics_is_constant_inside() -> None:
    at = identity((9, 8, 7))
    disp = torch.stack([at[0] ** 2, 3 * at[1] ** 2 - at[2] ** 2, at[0] * at[1] + 5 * at[2]])
    found = laplacian(disp, (1.0, 0.5, 2.0))[:, 1:-1, 1:-1, 1:-1]
    expected = torch.tensor([2.0, 6 * 0.25 - 2 * 4, 0.0])[:, None, None, None].expand_as(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_laplacian_is_the_slope_of_the_diffusion_energy() -> None:
    """Half the sum of squared differences between neighbours, whose derivative is minus the Laplacian with a free border."""
    stretch = (1.0, 0.4, 0.7)
    disp = texture(3, 6, 5, 7, sigma=0.5).double().requires_grad_()
    energy = sum(0.5 * stretch[axis] ** 2 * disp.diff(dim=axis + 1).square().sum() for axis in range(3))
    torch.testing.assert_close(-laplacian(disp.detach(), stretch), torch.autograd.grad(energy, disp)[0], rtol=0, atol=1e-12)


def test_laplacian_of_a_constant_is_zero_up_to_the_border() -> None:
    assert not laplacian(torch.full((3, 4, 1, 5), 2.5), (1.0, 1.0, 1.0)).any()


# ---- Adam


class Constant:
    """A data term with the same slope everywhere."""

    def __init__(self, slope: tuple[float, float, float]) -> None:
        self.slope = torch.tensor(slope)[:, None, None, None]

    def gradient(self, disp: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(0.0), self.slope.expand_as(disp).clone()


def test_first_step_has_the_same_length_in_mm_on_every_axis() -> None:
    """Adam's first step is ``rate`` of the smallest cell size against the slope, whatever the slope's size."""
    spacing = (1.0, 0.8, 4.0)
    disp, _ = refine(Constant((5.0, -0.3, 20.0)), torch.zeros(3, 7, 8, 5), spacing, 1, rate=0.5, regularity=1.0, step_sigma=2.0,
                     damping=1e-6)
    mm = disp * torch.tensor(spacing)[:, None, None, None]
    expected = 0.5 * 0.8 * torch.tensor([-1.0, 1, -1])[:, None, None, None]
    torch.testing.assert_close(mm, expected.expand_as(mm), rtol=1e-4, atol=0)


def test_slopes_well_below_the_damping_move_little() -> None:
    """Slopes count per smallest cell size: 0.04 a cell of 4 mm is 0.01 a mm."""
    disp, _ = refine(Constant((1e-4, 0.0, 0.04)), torch.zeros(3, 7, 8, 5), (1.0, 1.0, 4.0), 1, **{**SETTINGS, "damping": 0.01})
    assert disp[0].abs().max() == pytest.approx(0.25 * 1e-4 / (1e-4 + 0.01), rel=1e-3)
    assert not disp[1].any()
    assert 4 * disp[2].abs().min() == pytest.approx(0.25 * 0.01 / (0.01 + 0.01), rel=1e-3)


def test_nothing_but_the_regulariser_flattens_a_field() -> None:
    start = smooth_disp((16, 14, 12), 2.0)
    disp, _ = refine(Constant((0.0, 0.0, 0.0)), start, (1.0, 1.0, 2.0), 60, **{**SETTINGS, "regularity": 5.0})
    assert float(disp.diff(dim=1).square().mean()) < 0.3 * float(start.diff(dim=1).square().mean())


def test_an_anchor_is_not_flattened() -> None:
    """The diffusion energy is that of the difference from the anchor: with nothing added there is no slope, to the bit."""
    start = smooth_disp((16, 14, 12), 2.0)
    disp, _ = refine(Constant((0.0, 0.0, 0.0)), start, (1.0, 1.0, 2.0), 60, **{**SETTINGS, "regularity": 5.0}, anchor=start)
    assert torch.equal(disp, start)


def test_no_iterations_leave_the_start_as_it_is() -> None:
    start = smooth_disp(SHAPE, 2.0)
    disp, losses = refine(Constant((1.0, 1.0, 1.0)), start, (1.0, 1.0, 1.0), 0, **SETTINGS)
    assert torch.equal(disp, start) and losses == []


def test_progress_is_told_every_iteration_and_its_loss() -> None:
    one, two = features(texture(2, *SHAPE)), features(texture(2, *SHAPE, seed=1))
    told: list[tuple[int, float]] = []
    _, losses = refine(FeatureSSD(one, two), torch.zeros(3, *SHAPE), (1.0, 1.0, 1.0), 3,
                       progress=lambda number, loss: told.append((number, loss)), **SETTINGS)
    assert told == list(enumerate(losses, start=1)) and len(losses) == 3


def registration_term(kind: str, moving: Tensor, fixed: Tensor) -> Similarity:
    if kind == "ssd":
        return FeatureSSD(features(fixed), features(moving))
    ones = torch.ones(fixed.shape[1:])
    if kind == "information":
        return MutualInformation(*(0.5 + 0.15 * x[0] for x in (fixed, -moving)), ones, ones)
    return LNCC(*(0.5 + 0.15 * x[0] for x in (fixed, moving)), ones, ones, 5)


@pytest.mark.parametrize(("kind", "left"), [("ssd", 0.15), ("lncc", 0.15), ("information", 0.6)])
def test_a_smooth_warp_is_recovered_without_folds(kind: str, left: float) -> None:
    """Information goes half the way: one grey value for many places, it helps features but does not stand for them."""
    shape = (33, 28, 30)
    moving, truth = texture(3, *shape, sigma=2.0), smooth_disp(shape, 2.5)
    term = registration_term(kind, moving, warp(moving, truth))
    disp, losses = refine(term, torch.zeros(3, *shape), (1.0, 1.0, 1.0), 40, **{**SETTINGS, "regularity": 0.05})
    before, after = (x[:, 3:-3, 3:-3, 3:-3].norm(dim=0) for x in (truth, disp - truth))
    assert float(before.median()) > 0.7
    assert float(after.median()) < left * float(before.median())
    assert float(jacobian_determinant(disp).min()) > 0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["ssd", "lncc"])
def test_equal_images_stay_where_they_are(kind: str) -> None:
    """They move by rounding alone, whose slopes are far below the damping."""
    moving = texture(3, 20, 17, 22)
    disp, _ = refine(registration_term(kind, moving, moving), torch.zeros(3, 20, 17, 22), (1.0, 1.0, 1.0), 30, **SETTINGS)
    assert disp.abs().max() < 0.005


def test_the_length_of_a_shift_is_not_biased() -> None:
    """Sampling scaled by 2 / (n - 1) finds (5.83, -3.88, 4.84) for (6, -4, 5) on this lattice."""
    shape, shift = (37, 33, 31), torch.tensor([6.0, -4, 5])
    whole = texture(3, 49, 41, 41, sigma=2.0)
    moving = whole[:, 6:43, 4:37, 5:36]
    fixed = whole[:, 12:49, 0:33, 10:41]  # fixed(x) = moving(x + shift)
    start = (shift + torch.tensor([-0.6, 0.5, 0.4]))[:, None, None, None].expand(3, *shape).clone()
    disp, _ = refine(registration_term("ssd", moving, fixed), start, (1.0, 1.0, 1.0), 50,
                     **{**SETTINGS, "regularity": 0.05})
    found = disp[:, 3:-7, 5:-3, 3:-6].flatten(1).median(1).values
    torch.testing.assert_close(found, shift, rtol=0, atol=0.01)  # 0.002 of it is what 50 iterations leave


def test_anisotropic_cells_favour_no_axis() -> None:
    """Permuting the axes of images and spacing permutes the field."""
    shape, spacing, order = (20, 16, 11), (1.0, 1.5, 2.5), (2, 0, 1)
    moving = texture(3, *shape)
    fixed = warp(moving, smooth_disp(shape, 1.5))
    expected, _ = refine(registration_term("ssd", moving, fixed), torch.zeros(3, *shape), spacing, 12, **SETTINGS)
    axes = [0, *(1 + a for a in order)]
    start = torch.zeros(3, *(shape[a] for a in order))
    found, _ = refine(registration_term("ssd", moving.permute(axes), fixed.permute(axes)), start, [spacing[a] for a in order], 12,
                      **SETTINGS)
    assert expected.abs().max() > 0.3
    # rounding of 1e-6, which twelve steps of a sign-like rule can enlarge where the slope is near zero
    torch.testing.assert_close(found, expected[list(order)].permute(axes), rtol=0, atol=1e-3)


def test_even_unrelated_images_hardly_fold_the_field() -> None:
    shape = (24, 21, 26)
    term = registration_term("ssd", texture(3, *shape), texture(3, *shape, seed=1))
    disp, _ = refine(term, torch.zeros(3, *shape), (1.0, 1.0, 1.0), 40, **SETTINGS)
    assert disp.abs().max() > 3
    assert float((jacobian_determinant(disp) <= 0).float().mean()) < 1e-3


def test_result_is_the_same_to_the_bit_on_any_number_of_threads() -> None:
    shape = (41, 30, 33)
    moving, fixed = texture(2, *shape), texture(2, *shape, seed=1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            term = Sum([(1.0, registration_term(kind, moving, fixed)) for kind in ("ssd", "lncc", "information")])
            results.append(refine(term, torch.zeros(3, *shape), (1.0, 1.2, 2.0), 3, **SETTINGS))
    finally:
        torch.set_num_threads(before)
    for disp, losses in results[1:]:
        assert torch.equal(disp, results[0][0]) and losses == results[0][1]
