"""Preset ``published``: the released algorithm as its formulas say.

The oracle is ``released.py``, a plain re-implementation. Both get the same tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
import released
import torch
from fake_encoder import PatchMeans, affine
from published_cases import PRESET, SMALL, TOKENS, PatchCodes, phantom_pair, principal_sines, smooth_noise

from dinoreg import published
from dinoreg.config import PRESETS, Config, PublishedConfig, QuirksConfig, auto_preset
from dinoreg.errors import ConfigError, InputError
from dinoreg.features import PairFeatures
from dinoreg.grid import apply_axes
from dinoreg.published_features import encode_pair, slice_stack, voxel_features
from dinoreg.registration import Registrar
from dinoreg.volume import Volume

ALL, NONE = PRESET.quirks, QuirksConfig()


def units(pair: tuple[Volume, Volume]) -> list[np.ndarray]:
    """[0, 1] by the formulas: MR from the minimum to the 97th percentile of all voxels, CT from -150 to 250 HU."""
    mr, ct = (volume.array.astype(float) for volume in pair)
    return [released.unit_range(mr, mr.min(), np.percentile(mr, 97)), released.unit_range(ct, -150, 250)]


# ---- the whole of it, on the same tokens


def test_subspace_features_and_fields_are_those_of_the_plain_formulas() -> None:
    pair = phantom_pair()
    shape, images = pair[0].shape, units(pair)
    masks = [released.body(image, threshold) for image, threshold in zip(images, (0.05, 0.005), strict=True)]
    encoder = PatchCodes()
    shown = [torch.tensor(image, dtype=torch.float32) for image in images]
    stacks = [slice_stack(image, torch.from_numpy(mask), pair[0].affine, encoder, SMALL.encoder, SMALL.quirks)
              for image, mask in zip(shown, masks, strict=True)]

    # the encoder is shown the same planes: its tokens of order 1 differ by the rounding to float16
    for image, stack in zip(images, stacks, strict=True):
        plain = encoder.patch_tokens(released.images(image, TOKENS, gap=3), 1)
        assert (stack.encoded.tokens.float() - plain).abs().max() < 2.0**-10

    # one set of tokens for both from here on
    tokens = [released.all_slices(stack.encoded.tokens.double().numpy(), shape[2], gap=3) for stack in stacks]
    inside = [released.whole_patches(mask, TOKENS) for mask in masks]
    components, volumes = released.features(tokens, inside, 12, shape, seed=0)
    for stack, expected, mask in zip(stacks, tokens, inside, strict=True):
        found = np.stack([slice_tokens.numpy() for slice_tokens, _ in stack.slices()])
        np.testing.assert_allclose(found, expected, atol=1e-6)  # float32
        assert np.array_equal(stack.foreground.numpy(), mask) and 0.2 < mask.mean() < 0.8
    bodies = (torch.from_numpy(masks[0]), torch.from_numpy(masks[1]))
    found_pair = encode_pair((shown[0], shown[1]), bodies, pair[0].affine, encoder, SMALL, "cpu")
    assert principal_sines(found_pair.basis.components, components).max() < 1e-3  # theirs is a float32 product of 6000 tokens

    everywhere = torch.ones(shape)
    f, m = voxel_features(PairFeatures(*shown, everywhere, everywhere, found_pair, None), SMALL.quirks)
    # A basis of the same subspace may be rotated within it, which no distance between features sees.
    turn = (components.double().T @ found_pair.basis.components).numpy()
    for found, expected in zip((f, m), volumes, strict=True):
        np.testing.assert_allclose(found.numpy(), np.einsum("cijk,cn->nijk", expected, turn), atol=2e-3 * expected.std())

    # the solver, on one set of features
    start, _ = published.discrete(f, m, SMALL.published, SMALL.quirks)
    expected_start = released.discrete(f.double().numpy(), m.double().numpy(), 6, 4, 15)
    # float32 against float64 on a field of up to 24 voxels
    np.testing.assert_allclose(start.numpy(), expected_start, atol=2e-5)
    disp, losses = published.refine((f, m), start, SMALL.published, SMALL.quirks)
    expected = released.adam(f.numpy(), m.numpy(), start.numpy(), 10, 3.0, 2.0)
    # Adam divides by the size of the slope and so enlarges the rounding of float32 where it is small.
    difference = np.abs(disp.numpy() - expected)
    assert difference.mean() < 1e-3 and difference.max() < 0.05
    assert np.abs(expected - expected_start).mean() > 0.3 and losses[-1] < 0.9 * losses[0]

    # and the preset through the front door
    result = Registrar(SMALL, encoder=encoder).register(*pair)
    difference = np.abs(result.disp - expected)
    assert difference.mean() < 2e-3 and difference.max() < 0.1
    true = np.array([4.0, -3.0, 2.0])[:, None]
    error = np.linalg.norm(result.disp[:, masks[0]] - true, axis=0).mean()
    assert error < 0.8 * np.linalg.norm(true), error  # ten iterations, all of the volume near its border: it is on its way


def test_discrete_stage_is_that_of_convexadam() -> None:
    """Where the package ConvexAdam is installed: the same functions that the released code calls."""
    utils = pytest.importorskip("convexAdam.convex_adam_utils")
    shape, c = (50, 45, 64), 24
    mask = np.zeros(shape, dtype=np.float32)
    mask[8:-8, 6:-6, 7:-7] = 1
    f = torch.tensor(smooth_noise(shape, 3, channels=c) * mask, dtype=torch.float32)
    m = torch.roll(f, (6, -4, 5), (1, 2, 3)) + torch.tensor(0.1 * smooth_noise(shape, 4, channels=c) * mask, dtype=torch.float32)
    pooled = [torch.nn.functional.avg_pool3d(x[None], 6) for x in (f, m)]
    mesh = torch.nn.functional.affine_grid(4 * torch.eye(3, 4)[None], [1, 1, 9, 9, 9], align_corners=True)
    mesh = mesh.permute(0, 4, 1, 2, 3).reshape(3, -1, 1)
    scale = torch.tensor([n // 6 - 1 for n in shape]).reshape(1, 3, 1, 1, 1) / 2
    fields = [utils.coupled_convex(*utils.correlate(a, b, 4, 6, shape, c), mesh, 6, shape) for a, b in (pooled, pooled[::-1])]
    forward, _ = utils.inverse_consistency(*((u / scale).flip(1) for u in fields), iter=15)
    expected = torch.nn.functional.interpolate(forward.flip(1) * scale * 6, size=shape, mode="trilinear")[0]
    found, _ = published.discrete(f, m, PRESET.published, ALL)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---- the solver's parts


def test_slope_of_the_energy_is_its_derivative() -> None:
    """Closed forms against finite differences, in double precision."""
    generator = torch.Generator().manual_seed(11)
    f, m = (torch.tensor(smooth_noise((7, 8, 9), seed, cells=3, channels=9)) for seed in (1, 2))
    disp, way = (0.4 * torch.randn(3, 7, 8, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    for quirks in (ALL, NONE):
        for energy in (lambda d, q=quirks: published._data(f, m, q, d), lambda d: published._diffusion(d)):
            slope = float((energy(disp)[1] * way).sum())
            h = 1e-6  # short of the next corner of the linear interpolation for nearly all voxels
            numeric = (energy(disp + h * way)[0] - energy(disp - h * way)[0]) / (2 * h)
            assert slope == pytest.approx(numeric, rel=1e-3)


def test_pooling_is_the_mean_of_whole_blocks() -> None:
    x = torch.rand(1, 14, 13, 12, generator=torch.Generator().manual_seed(1))
    for quirk, cells in ((True, (2, 2, 2)), (False, (3, 3, 2))):
        found = apply_axes(x, [published.pooling(n, 6, quirk)[0] for n in (14, 13, 12)])
        assert found.shape[1:] == cells
        torch.testing.assert_close(found[0, 1, 1, 1], x[0, 6:12, 6:12, 6:12].mean())


# ---- the preset


def test_quirks_are_all_on_in_the_preset_and_off_everywhere_else() -> None:
    assert all(getattr(ALL, f.name) not in (False, None, 0) for f in fields(QuirksConfig))
    for name, config in PRESETS.items():
        assert (config.solver == "published") == (name == "published")
        assert (config.quirks == NONE) == (name != "published")
    with pytest.raises(ConfigError, match="quirks are those of the solver 'published' alone"):
        Config(quirks=QuirksConfig(zero_border=True))
    with pytest.raises(ConfigError, match="token_grid must be two numbers"):
        QuirksConfig(token_grid=(112, 2))
    assert Config.from_dict(PRESET.to_dict()) == PRESET


@pytest.mark.parametrize("dataset", ["", "AbdomenMRCT", "ThoraxCBCT", "OASIS", "published"])
@pytest.mark.parametrize("modalities", [("MR", "CT"), ("CBCT", "CT"), ("", "")])
def test_the_preset_is_never_chosen_by_itself(dataset: str, modalities: tuple[str, str]) -> None:
    assert auto_preset(dataset, modalities) != "published"


def test_its_tokens_on_its_own_data_are_those_released() -> None:
    """112 x 96 tokens for 192 x 160 voxels, every third slice and the last."""
    stack = slice_stack(torch.rand(192, 160, 8), torch.ones(192, 160, 8, dtype=torch.bool), affine((2.0, 2.0, 2.0)), PatchMeans(),
                        PRESET.encoder, ALL)
    assert stack.encoded.tokens.shape[:3] == (4, 112, 96)
    assert stack.between.shape == (8, 4) and stack.foreground.shape == (8, 112, 96)


def test_a_volume_thinner_than_a_cell_is_refused() -> None:
    flat = torch.zeros(2, 20, 20, 5)
    with pytest.raises(InputError, match="averages over 6 voxels"):
        published.discrete(flat, flat, PRESET.published, ALL)


def test_features_are_let_go_as_they_are_laid_out() -> None:
    held = [torch.rand(4, 12, 12, 12) for _ in range(2)]
    first = weakref.ref(held[0])

    def features() -> Iterator[torch.Tensor]:
        yield held.pop(0)
        assert first() is None
        yield held.pop(0)

    published.refine(features(), torch.zeros(3, 12, 12, 12), PublishedConfig(iterations=1), QuirksConfig())
