"""MIND-SSC: the formula, and what it must not depend on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoreg.grid import apply_axes, gaussian_matrix
from dinoreg.mind import PAIRS, mind_ssc

# exp(-D / V) of float32 differences of values of order 1, relative error of a squared difference about 1e-6 of its neighbourhood
TOLERANCE = 1e-5


def texture(*shape: int, seed: int = 0) -> Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    image = apply_axes(noise, [gaussian_matrix(n, 1.0) for n in shape])
    return (image - image.min()) / (image.max() - image.min())


def naive(image: np.ndarray, radius: int, dilation: int) -> np.ndarray:
    """Voxel by voxel, pair by pair, in double precision; outside the image its border voxels are meant, patches end there."""
    shape = image.shape

    def value(at: tuple[int, ...], offset: tuple[int, int, int]) -> float:
        return float(image[tuple(min(max(x + dilation * o, 0), n - 1) for x, o, n in zip(at, offset, shape, strict=True))])

    distance = np.zeros((len(PAIRS), *shape))
    for at in np.ndindex(*shape):
        ranges = (range(max(0, x - radius), min(n, x + radius + 1)) for x, n in zip(at, shape, strict=True))
        patch = list(itertools.product(*ranges))
        for number, (p, q) in enumerate(PAIRS):
            distance[(number, *at)] = np.mean([(value(y, p) - value(y, q)) ** 2 for y in patch])
    distance -= distance.min(0)
    noise = distance.mean(0)
    return np.exp(-distance / np.clip(noise, 1e-3 * noise.mean(), 1e3 * noise.mean()))


@pytest.mark.parametrize(("shape", "radius", "dilation"),
                         [((5, 7, 6), 1, 1), ((6, 4, 5), 1, 2), ((5, 3, 4), 0, 1), ((3, 1, 6), 2, 3)])
def test_descriptor_is_that_of_the_formula(shape: tuple[int, int, int], radius: int, dilation: int) -> None:
    image = texture(*shape)
    expected = naive(image.double().numpy(), radius, dilation)
    np.testing.assert_allclose(mind_ssc(image, radius, dilation), expected, rtol=0, atol=TOLERANCE)


def test_pairs_are_the_twelve_neighbours_at_a_right_angle() -> None:
    assert len(PAIRS) == len({frozenset(pair) for pair in PAIRS}) == 12
    assert all(np.dot(p, q) == 0 and np.abs(p).sum() == np.abs(q).sum() == 1 for p, q in PAIRS)


def test_range_is_0_to_1_and_the_closest_pair_of_each_voxel_is_1() -> None:
    found = mind_ssc(texture(17, 14, 19))
    assert found.shape == (12, 17, 14, 19) and found.dtype == torch.float32
    assert (found > 0).all() and torch.equal(found.amax(0), torch.ones(17, 14, 19))


@pytest.mark.parametrize(("scale", "offset"), [(2.5, 0.0), (-1.0, 1.0), (-0.4, 3.0), (1e3, -1024.0), (1e-3, 0.0)])
def test_contrast_brightness_and_inversion_do_not_matter(scale: float, offset: float) -> None:
    image = texture(17, 14, 19)
    changed = image * scale + offset
    # The offset costs digits: 6e-8 of it, against differences between neighbours of 0.05 of the scale, twice in a square
    rounding = 4 * 6e-8 * abs(offset / scale) / 0.05 * 10
    torch.testing.assert_close(mind_ssc(changed), mind_ssc(image), rtol=0, atol=TOLERANCE + rounding)


def test_scale_does_not_matter_where_almost_everything_is_constant() -> None:
    """The largest noise allowed, 1000 times its mean, is relative as well."""
    image = torch.zeros(48, 48, 48)
    image[24, 24, 24] = 1
    expected = mind_ssc(image, dilation=1)
    for scale in (2.0**-10, 2.0**10):  # powers of two: exact
        assert torch.equal(mind_ssc(image * scale, dilation=1), expected)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_permuting_axes_permutes_channels(order: tuple[int, int, int]) -> None:
    image = texture(9, 11, 8)
    pairs = [frozenset(pair) for pair in PAIRS]
    # axis a of the permuted image is axis order[a] of the image: an offset (x0, x1, x2) there is x[order] here
    channels = [pairs.index(frozenset(tuple(p[order.index(a)] for a in range(3)) for p in pair)) for pair in PAIRS]
    found = mind_ssc(image.permute(order))
    expected = mind_ssc(image)[channels].permute(0, *(1 + a for a in order))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_flipping_axes_permutes_channels(axes: tuple[int, ...]) -> None:
    image = texture(9, 11, 8)
    pairs = [frozenset(pair) for pair in PAIRS]
    mirrored = [frozenset(tuple(-x if a in axes else x for a, x in enumerate(p)) for p in pair) for pair in PAIRS]
    expected = mind_ssc(image)[[pairs.index(pair) for pair in mirrored]].flip([1 + a for a in axes])
    torch.testing.assert_close(mind_ssc(image.flip(axes)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("value", [0.0, 1.0, -1024.0, 1e-30])
def test_a_constant_image_has_a_constant_descriptor(value: float) -> None:
    assert torch.equal(mind_ssc(torch.full((6, 5, 7), value)), torch.ones(12, 6, 5, 7))


def test_a_far_change_does_not_matter() -> None:
    """Descriptors are local but for the bounds on the noise, which hardly any voxel meets."""
    image = texture(24, 10, 11)
    changed = image.clone()
    changed[16:] = texture(8, 10, 11, seed=1)
    torch.testing.assert_close(mind_ssc(changed)[:, :12], mind_ssc(image)[:, :12], rtol=0, atol=TOLERANCE)
