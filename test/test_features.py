"""Features of a pair: every family on one scale, voxels never normalised one by one."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from fake_encoder import PatchMeans, affine
from torch import Tensor

from dinoreg.config import EncoderConfig, MindConfig, PcaConfig
from dinoreg.convex import FeatureVolume
from dinoreg.dino import ProjectedPair, pair_features
from dinoreg.encoding import EncodedVolume
from dinoreg.features import PairFeatures, unrelated_distance
from dinoreg.grid import Shape, apply_axes, gaussian_matrix, resize
from dinoreg.mind import mind_ssc
from dinoreg.pca import token_moments
from dinoreg.slices import volume_tokens

SHAPE, LATTICE = (21, 25, 18), (11, 13, 9)
MIND = MindConfig(radius=1, dilation=1)


def image(seed: int) -> Tensor:
    noise = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(seed))
    smooth = apply_axes(noise, [gaussian_matrix(n, 1.5) for n in SHAPE])
    return (0.5 + 0.2 * smooth / smooth.std()).clamp(0, 1)


def region(seed: int) -> Tensor:
    """A valid region with a straight edge."""
    valid = torch.ones(SHAPE)
    valid[: 4 + 3 * seed] = 0
    return valid


@cache
def dino() -> ProjectedPair:
    body = torch.zeros(SHAPE, dtype=torch.bool)
    body[3:-3, 4:-4] = True
    config = EncoderConfig(long_side_tokens=8, gap_mm=2.0)
    tokens = [volume_tokens(image(seed), body, affine((1.0, 1.0, 1.0)), PatchMeans(), config) for seed in (0, 1)]
    fixed, moving = (EncodedVolume(one, token_moments(one.tokens, one.foreground)) for one in tokens)
    return pair_features(fixed, moving, PcaConfig(components=2))


def pair(*, with_mind: bool = True, with_dino: bool = False) -> PairFeatures:
    return PairFeatures(image(0), image(1), region(0), region(1), dino() if with_dino else None, MIND if with_mind else None)


def scale_between(scaled: Tensor, raw: Tensor) -> float:
    """The one number that makes the second the first; fails if there is none."""
    factor = float((scaled * raw).sum() / raw.square().sum())
    torch.testing.assert_close(scaled, raw * factor, rtol=0, atol=1e-5 * float(scaled.abs().max()))
    return factor


def test_unrelated_distance_is_the_mean_over_all_pairs_of_voxels() -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(3, 4, 2, 5, generator=generator) * (seed + 1) + 5 for seed in range(2)]
    weights = [torch.rand(4, 2, 5, generator=generator) for _ in range(2)]
    expected = []
    for f, w in zip(features, weights, strict=True):
        rows, shares = f.reshape(3, -1).T.double().numpy(), w.flatten().double().numpy()
        distance = ((rows[:, None] - rows[None]) ** 2).sum(-1)
        expected.append((shares @ distance @ shares) / shares.sum() ** 2)
    found = unrelated_distance(*features, *weights)
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)  # float32 features, sums in double precision


def test_unrelated_distance_does_not_see_a_common_offset_or_what_has_no_weight() -> None:
    f, m = torch.randn(2, 3, 6, 5, 4, generator=torch.Generator().manual_seed(1))
    weight = torch.ones(6, 5, 4)
    weight[3:] = 0
    expected = float(unrelated_distance(f, m, weight, weight))
    changed = f.clone()
    changed[:, 3:] = 1e4
    assert float(unrelated_distance(changed, m, weight, weight)) == expected
    assert float(unrelated_distance(f + 100, m, weight, weight)) == pytest.approx(expected, rel=1e-4)  # 100 costs two digits


def test_features_that_do_not_vary_are_not_blown_up() -> None:
    """Their rounding errors would be features then: of vectors 100 long, squares are known to 1e-3."""
    flat = PairFeatures(torch.full(SHAPE, 0.5), torch.full(SHAPE, 0.5), region(0), region(0), None, MIND)
    for volume in flat.on(SHAPE):
        assert float(volume.features.square().sum(0).max()) < 1.01e4


@pytest.mark.parametrize(("with_mind", "with_dino"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("lattice", [LATTICE, SHAPE])
def test_unrelated_places_differ_by_1_whatever_the_features(with_mind: bool, with_dino: bool, lattice: Shape) -> None:
    fixed, moving = pair(with_mind=with_mind, with_dino=with_dino).on(lattice)
    assert fixed.features.shape == moving.features.shape == (12 * with_mind + 2 * with_dino, *lattice)
    assert fixed.features.dtype == torch.float32
    assert float(unrelated_distance(fixed.features, moving.features, fixed.weight, moving.weight)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("weight", "shares"), [(1.0, (0.5, 0.5)), (3.0, (0.75, 0.25))])
def test_with_both_families_each_counts_half_or_as_its_weight_says(weight: float, shares: tuple[float, float]) -> None:
    both = dataclasses.replace(pair(with_dino=True), mind=dataclasses.replace(MIND, weight=weight))
    fixed, moving = both.on(LATTICE)
    for family, share in zip((slice(0, 12), slice(12, None)), shares, strict=True):
        distance = unrelated_distance(fixed.features[family], moving.features[family], fixed.weight, moving.weight)
        assert float(distance) == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("with_mind", [False, True])
def test_all_views_together_count_as_much_as_one(with_mind: bool) -> None:
    one = pair(with_dino=True, with_mind=with_mind)
    fixed, moving = dataclasses.replace(one, views=(dino(), dino())).on(LATTICE)
    assert len(fixed.features) == 12 * with_mind + 3 * 2
    for view in range(3):
        channels = slice(12 * with_mind + 2 * view, 12 * with_mind + 2 * view + 2)
        distance = unrelated_distance(fixed.features[channels], moving.features[channels], fixed.weight, moving.weight)
        assert float(distance) == pytest.approx((0.5 if with_mind else 1.0) / 3, rel=1e-4)
    # the same tokens three times are no other features than once
    alone = one.on(LATTICE)[0].features
    torch.testing.assert_close(fixed.features.square().sum(0), alone.square().sum(0), rtol=1e-4, atol=1e-6)  # float32 sums


def test_a_family_is_scaled_by_one_number_for_both_images() -> None:
    """Vectors keep their lengths relative to one another: dividing each voxel's by its own length makes motion vanish."""
    volumes = pair(with_dino=True).on(LATTICE)
    images = [resize(image(seed), LATTICE) for seed in (0, 1)]
    mind = [scale_between(v.features[:12], mind_ssc(x, 1, 1)) for v, x in zip(volumes, images, strict=True)]
    tokens = [scale_between(v.features[12:], s.values * s.weight) for v, s in zip(volumes, dino().sample(LATTICE), strict=True)]
    assert mind[0] == pytest.approx(mind[1], rel=1e-5) and tokens[0] == pytest.approx(tokens[1], rel=1e-5)


def test_images_and_weights_are_averages_over_the_cells() -> None:
    fixed, moving, wf, wm = pair().images(LATTICE)
    for found, whole in ((fixed, image(0)), (moving, image(1)), (wf, region(0)), (wm, region(1))):
        torch.testing.assert_close(found, resize(whole, LATTICE))
    assert float(wf.min()) == 0 and float(wf.max()) == pytest.approx(1)
    on = pair().on(LATTICE)
    assert torch.equal(on[0].weight, wf) and torch.equal(on[1].weight, wm)


def test_warping_a_feature_volume_takes_its_weight_along() -> None:
    volume = FeatureVolume(torch.randn(2, 7, 6, 5, generator=torch.Generator().manual_seed(2)), torch.zeros(7, 6, 5))
    volume.weight[:3] = 1
    shift = torch.tensor([2.0, 0, 0])[:, None, None, None].expand(3, 7, 6, 5)
    found = volume.warp(shift)
    torch.testing.assert_close(found.features[:, :5], volume.features[:, 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.weight[:5], volume.weight[2:], rtol=0, atol=1e-5)
