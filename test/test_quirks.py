"""Each quirk of the released code: the defect is there with its switch, and gone without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import released
import torch
from fake_encoder import PatchMeans, affine
from published_cases import PRESET, SMALL, PatchCodes, phantom_pair, principal_sines, smooth_noise
from torch import Tensor

from dinoreg import published
from dinoreg.config import EncoderConfig, PublishedConfig, QuirksConfig
from dinoreg.dino import ProjectedGrid, ProjectedPair
from dinoreg.features import PairFeatures
from dinoreg.grid import jacobian_determinant
from dinoreg.pca import Basis, Moments, fit_basis, token_moments
from dinoreg.preprocess import to_unit_range
from dinoreg.published_features import randomised_basis, slice_masks, slice_stack, voxel_features
from dinoreg.registration import Registrar
from dinoreg.slices import TokenGeometry

NONE = QuirksConfig()


def ripples(shape: tuple[int, int, int], shift: tuple[float, float, float]) -> Tensor:
    """Six smooth channels around a point ``shift`` voxels from the middle, zero far from it."""
    lines = [torch.arange(n) - (n - 1) / 2 - s for n, s in zip(shape, shift, strict=True)]
    x = torch.stack(torch.meshgrid(*lines, indexing="ij"))
    turns = torch.tensor([[0.6, 0.1, 0.0], [0.1, 0.6, 0.1], [0.1, 0.0, 0.6], [0.4, 0.4, 0.0], [0.0, 0.4, -0.4], [0.4, 0.0, 0.4]])
    return torch.sin(torch.einsum("ca,aijk->cijk", turns, x)) * torch.exp(-x.square().sum(0) / (2 * 5.0**2))


def test_short_displacement_shrinks_a_true_shift() -> None:
    shape, shift = (32, 30, 36), torch.tensor([6.0, -4.0, 5.0])
    f, m = ripples(shape, (0, 0, 0)), ripples(shape, (6, -4, 5))
    start = (0.97 * shift)[:, None, None, None].expand(3, *shape).contiguous()
    config = PublishedConfig(iterations=80, rate=0.02, boxes=2, regularity=0.0)
    for quirk in (True, False):
        disp, _ = published.refine((f, m), start, config, QuirksConfig(short_displacement=quirk))
        found = disp[:, 14:18, 13:17, 16:20].mean((1, 2, 3))
        size = torch.tensor(shape)
        expected = shift * (size - 1) / size if quirk else shift
        # a third of the least of the defects, 4/30 voxel
        torch.testing.assert_close(found, expected, rtol=0, atol=0.044)


def test_truncated_pooling_stretches_what_lies_at_the_far_end() -> None:
    for n in (41, 37, 36, 160):
        x = torch.arange(n, dtype=torch.float32)
        for quirk in (True, False):
            down, up = published.pooling(n, 6, quirk)
            error = (up @ down @ x - x)[3:-8].abs()  # between the centres of the first and the last whole cell
            if quirk and n % 6:
                assert error[-1] > 0.7 * (n % 6)
            else:
                assert error.max() < 1e-4


def test_untied_start_throws_empty_cells_into_the_corner() -> None:
    empty = torch.zeros(2, 54, 54, 54)
    thrown, _ = published.discrete(empty, empty, PublishedConfig(consistency_iterations=0), QuirksConfig(untied_start=True))
    kept, _ = published.discrete(empty, empty, PublishedConfig(), NONE)
    assert torch.allclose(thrown, torch.tensor(-24.0)) and kept.abs().max() == 0


def test_zero_border_damps_a_constant_field() -> None:
    nothing = torch.zeros(1, 40, 40, 40)
    for quirk in (True, False):
        disp, _ = published.refine((nothing, nothing), torch.full((3, 40, 40, 40), 5.0), PublishedConfig(iterations=1),
                                   QuirksConfig(zero_border=quirk))
        assert disp[0, 20, 20, 20] == pytest.approx(5, abs=1e-4)
        assert disp[0, 0, 20, 20] == pytest.approx(1.5 if quirk else 5, abs=0.1)  # less than a third is left at a face,
        assert (disp[0, 10, 20, 20] < 4.98) == quirk  # and some is missing up to 15 voxels from it


def test_zero_border_sees_zeros_beyond_the_volume() -> None:
    x, disp = torch.ones(1, 12, 12, 12), torch.full((3, 12, 12, 12), 3.0)
    assert published.sample(x, disp, QuirksConfig(zero_border=True))[0, -1, 5, 5] == 0
    assert published.sample(x, disp, NONE)[0, -1, 5, 5] == 1
    ones = torch.ones(1, 10, 10, 10)
    cost = published.cost_volume(ones, ones, 4, QuirksConfig(zero_border=True))
    assert cost[0, 0, 0, 0] > 0 and published.cost_volume(ones, ones, 4, NONE).abs().max() == 0


def voxel_pair(values: tuple[Tensor, Tensor], foreground: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]) -> PairFeatures:
    """Features (c, i, j, k) that were found at every voxel."""
    shape = values[0].shape[1:]
    geometry = TokenGeometry(tuple(shape), (2, 0, 1), tuple(np.arange(n, dtype=float) for n in shape),
                             tuple((-0.5, n - 0.5) for n in shape))
    basis = Basis(torch.eye(len(values[0])), torch.zeros(len(values[0])), torch.ones(len(values[0])), 1.0)
    grids = [ProjectedGrid((v * f).permute(3, 1, 2, 0).contiguous(), f.permute(2, 0, 1), geometry)
             for v, f in zip(values, foreground, strict=True)]
    blank = torch.zeros(shape)
    return PairFeatures(blank, blank, valid[0].float(), valid[1].float(), ProjectedPair(basis, *grids), None)


def test_zero_fill_draws_the_contour_to_the_edge_of_the_view() -> None:
    """One body, seen as a whole by one image and within a cylinder by the other; nothing moved."""
    shape = (48, 48, 30)
    x = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij"))
    radius = np.hypot(x[0], x[1])
    texture = torch.tensor(1.5 + 0.2 * smooth_noise(shape, 6, channels=6), dtype=torch.float32)
    body, view = torch.from_numpy(radius < 22), torch.from_numpy(radius < 14)
    pair = voxel_pair((texture, texture), (body & view, body), (view, torch.ones_like(view)))
    ring = (radius > 10) & (radius < 14) & (np.abs(x[2]) < 9)
    outward = {}
    for quirk in (True, False):
        disp, _ = published.discrete(*voxel_features(pair, QuirksConfig(zero_fill=quirk)), PublishedConfig(), NONE)
        outward[quirk] = float(((disp[0].numpy() * x[0] + disp[1].numpy() * x[1]) / radius)[ring].mean())
    # the contour lies 8 voxels further out than the edge of the view; cells are 6 voxels
    assert outward[True] > 4 and abs(outward[False]) < 1.5, outward


def test_raw_scale_lets_the_encoder_s_units_weigh() -> None:
    shape = (14, 12, 10)
    values = tuple(torch.tensor(smooth_noise(shape, seed, channels=4), dtype=torch.float32) for seed in (7, 8))
    everywhere = torch.ones(shape, dtype=torch.bool)
    for quirk, ratio in ((True, 100.0), (False, 1.0)):
        small, large = (voxel_features(voxel_pair(tuple(factor * v for v in values), (everywhere,) * 2, (everywhere,) * 2),
                                       QuirksConfig(raw_scale=quirk)) for factor in (1.0, 100.0))
        for a, b in zip(small, large, strict=True):
            torch.testing.assert_close(b, ratio * a, rtol=1e-4, atol=1e-4)
    two_voxels = (small[0][:, 3, 4, 5] - small[0][:, 11, 8, 2]).square().sum()
    assert 0.05 < two_voxels < 10  # of order 1 without the quirk


def noisy_moments() -> tuple[Moments, Tensor]:
    """Tokens of 64 channels with 4 strong directions, the others alike; and the tokens themselves."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randn(3000, 64, generator=generator) * torch.cat([torch.tensor([9.0, 7, 5, 3]), torch.ones(60)]) + 2
    return token_moments(tokens[None, :, None], torch.ones(1, 3000, 1, dtype=torch.bool)), tokens


def test_randomised_pca_is_that_of_torch_and_leaves_weak_components_to_chance() -> None:
    moments, tokens = noisy_moments()
    torch.manual_seed(3)
    _, singular, expected = torch.pca_lowrank(tokens, q=24)
    found = randomised_basis(moments, 24, seed=3)
    assert principal_sines(found.components, expected).max() < 1e-3  # float32 there
    torch.testing.assert_close(found.variance, singular.double().square() / len(tokens), rtol=1e-3, atol=0)
    sines = principal_sines(found.components, randomised_basis(moments, 24, seed=4).components)
    assert sines[-1] > 0.9 and sines[3] < 0.1  # most directions are chance; the strong ones are found either way
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))]
    again = token_moments(shuffled[None, :, None], torch.ones(1, 3000, 1, dtype=torch.bool))
    assert principal_sines(fit_basis(moments, 24).components, fit_basis(again, 24).components)[-1] < 1e-3  # exact: no chance


@pytest.mark.parametrize("count", [19, 20, 21])
def test_shifted_last_gap_moves_the_end_by_a_slice(count: int) -> None:
    ramp = (torch.arange(count) / count).expand(24, 20, count).contiguous()
    config = EncoderConfig(long_side_tokens=8, gap_mm=3.0)
    for quirk in (True, False):
        stack = slice_stack(ramp, torch.ones_like(ramp, dtype=torch.bool), affine((1.0, 1.0, 1.0)), PatchMeans(), config,
                            QuirksConfig(shifted_last_gap=quirk))
        found = np.array([float(tokens[3, 3, 0]) for tokens, _ in stack.slices()]) * count
        start = released.encoded_slices(count, 3)[-2]
        expected = np.arange(count, dtype=float)
        if quirk:
            expected[start:] = start + (expected[start:] - start) * (count - 1 - start) / (count - start)
        # float16 tokens up to 1
        np.testing.assert_allclose(found, expected, atol=count * 2.0**-10)


def plan(quirks: QuirksConfig, spacing: tuple[float, float, float] = (1.0, 2.0, 5.0), codes: str = "RAS") -> TokenGeometry:
    volume = torch.rand(48, 40, 12)
    config = EncoderConfig(long_side_tokens=16, gap_mm=6.0)
    return slice_stack(volume, torch.ones_like(volume, dtype=torch.bool), affine(spacing, codes), PatchMeans(), config,
                       quirks).encoded.geometry


def steps(geometry: TokenGeometry) -> list[float]:
    return [float(abs(at[1] - at[0])) for at in geometry.positions]


def test_token_grid_stretches_and_knows_no_orientation() -> None:
    geometry = plan(QuirksConfig(token_grid=(12, 10)), codes="SRA")
    assert geometry.axes == (2, 0, 1) and steps(geometry)[:2] == pytest.approx([4.0, 4.0])  # 4 x 8 mm a token
    assert geometry.positions[0][0] == pytest.approx(1.5) and geometry.positions[1][-1] == pytest.approx(37.5)
    clean = plan(NONE, codes="SRA")
    assert clean.axes[0] == 0  # the axis that follows the patient
    clean = plan(NONE)
    assert steps(clean)[0] * 1.0 == pytest.approx(steps(clean)[1] * 2.0)  # as many mm along rows as along columns


def test_gap_slices_counts_planes_whatever_their_distance() -> None:
    assert list(plan(QuirksConfig(gap_slices=3)).positions[2]) == [0, 3, 6, 9, 11]  # 15 mm
    assert list(plan(NONE).positions[2]) == list(range(12))  # 6 mm asked for, 5 mm a plane
    sideways = plan(QuirksConfig(gap_slices=5), codes="SRA", spacing=(1.5, 1.0, 1.0))
    assert list(sideways.positions[0]) == [*range(0, 48, 5), 47]  # 7.5 mm


def test_slice_masks_know_one_plane_only() -> None:
    unit = np.zeros((40, 40, 10), dtype=np.float32)
    unit[7:30, 7:30, :8] = 0.6
    unit[10:20, 10:20, 3] = 0.0  # a hole
    unit[32:39, 32:39, 2] = 0.6  # less than the body in its plane,
    unit[32:39, 32:39, 9] = 0.6  # and the largest part of another, though nothing connects it with the body
    unit[30, 15, :8] = 0.6  # a hair, which the opening removes
    mask = slice_masks(unit, "MR")
    assert mask[12, 12, 3] and not mask[35, 35, 2] and mask[35, 35, 9] and not mask[30, 15, 4]
    assert np.array_equal(mask, released.body(unit, 0.05))
    faint = np.full((9, 9, 2), 0.01, dtype=np.float32)
    assert slice_masks(faint, "CT").all() and not slice_masks(faint, "MR").any()
    for quirk, number in ((True, 4 * 4), (False, 5 * 5 - 1)):  # tokens of 5 voxels: the ones at the edge are covered by .6, .36
        stack = slice_stack(torch.from_numpy(unit), torch.from_numpy(mask), affine((1.0, 1.0, 1.0)), PatchMeans(),
                            EncoderConfig(long_side_tokens=8), QuirksConfig(slice_masks=quirk))
        assert stack.foreground[4].sum() == number


def test_all_voxel_percentiles_depend_on_the_background() -> None:
    tissue = np.linspace(1, 100, 1000, dtype=np.float32).reshape(10, 10, 10)
    for quirk in (True, False):
        little, much = (to_unit_range(np.pad(tissue, ((n, 0), (0, 0), (0, 0))), "MR", PRESET.encoder_intensity, quirk)[n:]
                        for n in (1, 10))
        assert (abs(much[5].mean() / little[5].mean() - 1) > 0.01) == quirk


def test_folds_are_kept_with_the_quirk_and_repaired_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = phantom_pair()
    folded = torch.zeros(3, *pair[0].shape)
    folded[0, 20] = 6.0  # every plane after it lies before it
    monkeypatch.setattr(published, "refine", lambda *arguments: (folded, [1.0] * SMALL.published.iterations))
    for quirk in (True, False):
        config = replace(SMALL, quirks=replace(SMALL.quirks, folds_kept=quirk))
        result = Registrar(config, encoder=PatchCodes()).register(*pair)
        folds = int((jacobian_determinant(torch.from_numpy(result.disp)) <= 0).sum())
        assert (folds > 0) == quirk and ("repaired_voxels" in result.info) != quirk
