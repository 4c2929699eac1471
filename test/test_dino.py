"""From tokens to features on the solver's lattice: in the right place, without artificial edges, the last slice included."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from fake_encoder import PatchMeans, affine
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from dinoreg.config import EncoderConfig, PcaConfig
from dinoreg.dino import Placement, ProjectedGrid, pair_features
from dinoreg.encoding import EncodedVolume
from dinoreg.errors import RegistrationError
from dinoreg.pca import token_moments
from dinoreg.slices import TokenGeometry, TokenGrid, volume_tokens
from dinoreg.weights import random_encoder

CONFIG = EncoderConfig(long_side_tokens=16, gap_mm=5.0, crop=False)
FLOAT16_ONE = 2.0**-11  # rounding of tokens up to 1


def encode(volume: Tensor, matrix: np.ndarray, config: EncoderConfig = CONFIG, mask: Tensor | None = None) -> ProjectedGrid:
    """Patch means as features, no PCA."""
    mask = torch.ones(volume.shape, dtype=torch.bool) if mask is None else mask
    grid = volume_tokens(volume, mask, matrix, PatchMeans(), config)
    return ProjectedGrid(grid.tokens.float(), grid.foreground, grid.geometry)


def lattice_positions(voxels: int, cells: int) -> Tensor:
    """Centres of lattice cells in voxels."""
    return (torch.arange(cells) + 0.5) * voxels / cells - 0.5


GRIDS = [
    ((24, 24, 18), affine((2.0, 2.0, 2.0))),
    ((25, 37, 19), affine((1.7, 0.9, 3.1), "LPS")),  # odd sizes, anisotropic
    ((19, 33, 28), affine((3.0, 1.1, 1.4), "SRA")),  # axes permuted
    ((31, 17, 23), affine((1.0, 2.5, 1.3), "PIR", tilt_degrees=14.0)),  # permuted, flipped and oblique
]


@pytest.mark.parametrize(("shape", "matrix"), GRIDS)
@pytest.mark.parametrize("cells", [(25, 37, 28), (12, 12, 9), (7, 9, 5), (40, 40, 40)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_linear_ramp_is_reproduced_inside(shape: tuple[int, int, int], matrix: np.ndarray, cells: tuple[int, int, int],
                                            axis: int) -> None:
    """Lattices finer and coarser than voxels and tokens, with ratios that are no whole numbers."""
    grid = encode(torch.rand(shape), matrix)
    at = torch.from_numpy(grid.geometry.positions[axis].copy()).float()
    along = grid.geometry.axes.index(axis)
    tokens = at.reshape([-1 if n == along else 1 for n in range(4)]).expand(*grid.foreground.shape, 1)
    sampled = replace(grid, features=tokens.contiguous(), foreground=torch.ones_like(grid.foreground)).sample(cells)
    values = sampled.values[0].movedim(axis, 0).flatten(1)
    expected = lattice_positions(shape[axis], cells[axis])
    half = shape[axis] / cells[axis] / 2
    inside = (expected - half >= at.min()) & (expected + half <= at.max())  # cells that lie between the outermost tokens
    assert inside.any()
    # float32: numbers up to 40 through three interpolations and one division
    assert (values[inside] - expected[inside][:, None]).abs().max() < 1e-4


@pytest.mark.parametrize(("shape", "matrix"), GRIDS[1:])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_bright_blob_is_found_where_it_is(shape: tuple[int, int, int], matrix: np.ndarray, plane: str) -> None:
    """The whole way, pixels and slices, on grids of every orientation: mean position to a twentieth of a voxel."""
    centre = [0.45 * n + 0.3 for n in shape]
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    lines = [((torch.arange(n) - c) * float(mm)).square() for n, c, mm in zip(shape, centre, spacing, strict=True)]
    blob = torch.exp(-(lines[0][:, None, None] + lines[1][:, None] + lines[2]) / (2 * 5.0**2))  # sigma 5 mm, slices 5 mm apart
    sampled = encode(blob, matrix, replace(CONFIG, axis=plane)).sample(shape)
    values = sampled.values[0] - sampled.values[0].min()
    for axis, n in enumerate(shape):
        profile = values.movedim(axis, 0).flatten(1).sum(1)
        near = (torch.arange(n) - centre[axis]).abs() * spacing[axis] < 15  # three sigma both ways, clear of the borders
        found = float((profile * torch.arange(n) * near).sum() / (profile * near).sum())
        expected = float((lambda p: (p * torch.arange(n) * near).sum() / (p * near).sum())(torch.exp(-lines[axis] / 50)))
        assert abs(found - expected) < 0.05, (axis, found, expected)


@pytest.mark.parametrize("count", [19, 20, 21, 22])
@pytest.mark.parametrize("codes", ["RAS", "RAI"])
def test_encoded_slices_stay_at_their_index_to_the_last(count: int, codes: str) -> None:
    """The published code shifts the last segment by a slice and overwrites the last encoded slice."""
    values = torch.rand(count, generator=torch.Generator().manual_seed(count))
    grid = encode(values.expand(24, 24, count).contiguous(), affine((1.0, 1.0, 1.0), codes), replace(CONFIG, gap_mm=3.0))
    found = grid.sample((24, 24, count)).values[0, 12, 12]
    encoded = sorted(int(index) for index in grid.geometry.positions[2])
    assert {0, count - 1} <= set(encoded)
    expected = np.interp(np.arange(count), encoded, values[encoded])
    np.testing.assert_allclose(found, expected, atol=FLOAT16_ONE)


def hand_made(foreground: Tensor) -> ProjectedGrid:
    """A grid on a volume of 12 x 10 x 9 voxels with tokens at whole and fractional positions, rows against the array."""
    generator = torch.Generator().manual_seed(8)
    positions = (np.array([10.5, 7.5, 4.5, 1.5]), np.array([1.0, 4.0, 7.0]), np.array([0.0, 3.0, 6.0, 8.0]))
    geometry = TokenGeometry((12, 10, 9), (2, 0, 1), positions, ((0.0, 12.0), (-0.5, 8.5), (-1.5, 9.5)))
    return ProjectedGrid(torch.randn(4, 4, 3, 5, generator=generator) * foreground[..., None], foreground, geometry)


def test_values_times_weight_is_the_interpolation_of_zero_filled_tokens() -> None:
    foreground = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(9)) > 0.4
    grid = hand_made(foreground)
    sampled = grid.sample((12, 10, 9))
    zero_filled = torch.cat([grid.features, foreground[..., None]], -1).permute(1, 2, 0, 3).flip(0).numpy()  # i j k c, ascending
    points = [np.sort(at) for at in grid.geometry.positions]
    oracle = RegularGridInterpolator(points, zero_filled)
    clamped = [np.clip(np.arange(n), at[0], at[-1]) for n, at in zip((12, 10, 9), points, strict=True)]
    expected = oracle(np.stack(np.meshgrid(*clamped, indexing="ij"), -1))
    expected[:, 9] = 0  # voxel 9 lies beyond the extent along j
    weight = sampled.weight.numpy()
    np.testing.assert_allclose(weight, expected[..., -1], atol=1e-6)
    np.testing.assert_allclose(sampled.values.numpy() * weight, np.moveaxis(expected[..., :-1], -1, 0), atol=1e-5)
    assert weight.min() >= 0 and weight.max() <= 1
    assert not sampled.values[:, sampled.weight == 0].any()


def test_foreground_features_do_not_fade_towards_the_background() -> None:
    foreground = torch.zeros(4, 4, 3, dtype=torch.bool)
    foreground[1:3, 1:3] = True
    grid = hand_made(foreground)
    sampled = replace(grid, features=foreground[..., None] * torch.tensor([2.0, -3.0])).sample((12, 10, 9))
    inside = sampled.weight > 0
    assert 0 < inside.float().mean() < 1 and bool(((sampled.weight > 0) & (sampled.weight < 1)).any())
    torch.testing.assert_close(sampled.values[:, inside], torch.tensor([[2.0], [-3.0]]).expand(2, int(inside.sum())))


def test_a_lattice_coarser_than_the_tokens_averages_them() -> None:
    """Cells of 3 x 3 tokens on a checkerboard of +-1 average to +-1/9; their centres alone would give +-1."""
    volume = torch.zeros(33, 33, 5)
    grid = encode(volume, affine((1.0, 1.0, 1.0)), replace(CONFIG, long_side_tokens=33, gap_mm=1.0))
    rows, cols = torch.meshgrid(torch.arange(33), torch.arange(33), indexing="ij")
    board = ((rows + cols) % 2 * 2 - 1).float().expand(5, 33, 33)[..., None]
    coarse = replace(grid, features=board.contiguous()).sample((11, 11, 5))
    assert coarse.values.abs().max() < 1 / 9 + 1e-5  # float32


def test_a_single_slice_and_a_single_token_are_enough() -> None:
    grid = encode(torch.full((10, 10, 1), 0.25), affine((1.0, 1.0, 4.0)), replace(CONFIG, long_side_tokens=4))
    sampled = grid.sample((5, 5, 1))
    assert torch.allclose(sampled.values, torch.tensor(0.25)) and torch.allclose(sampled.weight, torch.tensor(1.0))


def encoded(grid: TokenGrid) -> EncodedVolume:
    return EncodedVolume(grid, token_moments(grid.tokens, grid.foreground))


@cache
def tokens_of(seed: int, shape: tuple[int, int, int] = (40, 36, 20)) -> EncodedVolume:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 1, 8, 8, 5, generator=generator), size=shape, mode="trilinear")[0, 0]
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[4:-4, 3:-3, 2:-2] = True
    encoder = random_encoder("vits14_reg4", 0)
    config = replace(CONFIG, crop=True, gap_mm=15.0, long_side_tokens=12)
    return encoded(volume_tokens(smooth * mask, mask, affine((3.0, 3.0, 3.0)), encoder, config))


def test_pair_goes_from_volumes_to_lattice_in_one_basis() -> None:
    fixed, moving = tokens_of(1), tokens_of(2)
    pair = pair_features(fixed, moving, PcaConfig(components=24, center=True))
    first, second = pair.sample((13, 12, 7))
    assert first.values.shape == second.values.shape == (24, 13, 12, 7)
    assert first.weight.shape == (13, 12, 7)
    assert first.values.dtype == torch.float32 and torch.isfinite(first.values).all() and torch.isfinite(second.values).all()
    assert first.weight[6, 6, 3] > 0.9999 and first.weight[0, 0, 0] < 0.5
    assert not first.values.is_inference()
    # jointly centred: the mean over all foreground tokens of both volumes is zero in every component
    everything = torch.cat([grid.features[grid.foreground] for grid in (pair.fixed, pair.moving)])
    assert everything.mean(0).abs().max() < 1e-4 * everything.std()
    variance = everything.double().var(0, unbiased=False)
    torch.testing.assert_close(variance, pair.basis.variance, rtol=1e-3, atol=1e-6)


def test_swapping_the_volumes_swaps_the_features() -> None:
    fixed, moving = tokens_of(1), tokens_of(2)
    forward, backward = (pair_features(*grids, PcaConfig(components=8)) for grids in ((fixed, moving), (moving, fixed)))
    # sums in another order: double precision
    torch.testing.assert_close(forward.fixed.features, backward.moving.features, rtol=1e-4, atol=1e-4)


def test_projecting_first_gives_what_interpolating_first_gives() -> None:
    fixed, moving = tokens_of(1), tokens_of(2)
    pair = pair_features(fixed, moving, PcaConfig(components=6))
    grid = fixed.grid
    wide = ProjectedGrid(grid.tokens.float() * grid.foreground[..., None], grid.foreground, grid.geometry).sample((11, 9, 8))
    late = torch.einsum("cijk,cn->nijk", wide.values.double() - pair.basis.mean[:, None, None, None], pair.basis.components)
    early = pair.fixed.sample((11, 9, 8))
    inside = early.weight > 0
    assert inside.any()
    # float32 products of 384 terms of order 1
    torch.testing.assert_close(early.values[:, inside].double(), late[:, inside], rtol=0, atol=2e-3)


def test_too_many_components_are_a_clear_error() -> None:
    volume = torch.rand(20, 20, 8)
    grid = volume_tokens(volume, torch.ones_like(volume, dtype=torch.bool), affine((1.0, 1.0, 1.0)), PatchMeans(), CONFIG)
    one = encoded(grid)
    with pytest.raises(RegistrationError, match="24 components were asked for, but the tokens have 3 channels"):
        pair_features(one, one, PcaConfig(components=24))


@pytest.mark.parametrize(("shape", "matrix"), GRIDS)
def test_placing_on_the_same_grid_changes_nothing(shape: tuple[int, int, int], matrix: np.ndarray) -> None:
    """At the voxels' centres the general way is an oracle of the separable one, and the other way round."""
    grid = encode(torch.rand(shape, generator=torch.Generator().manual_seed(1)), matrix)
    plain, placed = grid.sample(shape), replace(grid, placed=Placement(np.eye(4), shape)).sample(shape)
    # float32: positions up to 40 tokens to 1e-5, times differences of up to 1 a token
    torch.testing.assert_close(placed.weight, plain.weight, rtol=0, atol=5e-5)
    torch.testing.assert_close(placed.values, plain.values, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("shape", "matrix"), GRIDS[1:])
@pytest.mark.parametrize("cells", [(24, 22, 20), (12, 11, 10)])
def test_a_blob_of_another_grid_is_found_where_it_is(shape: tuple[int, int, int], matrix: np.ndarray,
                                                     cells: tuple[int, int, int]) -> None:
    """Encoded on one grid, wanted on another, turned one: the middle of the blob in mm."""
    centre_mm = matrix[:3, :3] @ (0.5 * np.array(shape)) + matrix[:3, 3]
    at = np.einsum("ab,bijk->aijk", matrix[:3, :3], np.indices(shape)) + matrix[:3, 3, None, None, None]
    blob = torch.from_numpy(np.exp(-((at - centre_mm[:, None, None, None]) ** 2).sum(0) / (2 * 5.0**2)).astype(np.float32))
    other = affine((2.0, 2.0, 2.0), "LAS", tilt_degrees=20.0)
    size = (24, 22, 20)
    other[:3, 3] = centre_mm - other[:3, :3] @ ((np.array(size) - 1) / 2 + (0.3, -0.4, 0.2))  # the blob is near the middle
    placed = replace(encode(blob, matrix), placed=Placement(np.linalg.solve(matrix, other), size))
    values = placed.sample(cells).values[0]
    weights = (values - values.max() / 3).clamp_min(0)  # the middle part, clear of the border of what was encoded
    cell = np.array(size) / np.array(cells)
    found = [float((weights.movedim(axis, 0).flatten(1).sum(1) * torch.arange(n)).sum() / weights.sum())
             for axis, n in enumerate(cells)]
    found_mm = other[:3, :3] @ ((np.array(found) + 0.5) * cell - 0.5) + other[:3, 3]
    assert np.linalg.norm(found_mm - centre_mm) < 0.25, found_mm - centre_mm  # slices are 5 mm apart, cells 2 or 4 mm


def test_what_lies_outside_the_encoded_volume_has_no_weight() -> None:
    grid = encode(torch.rand(20, 20, 12), affine((2.0, 2.0, 2.0)))
    away = np.eye(4)
    away[0, 3] = 10  # voxel 0 of the other grid is voxel 10 of the volume
    weight = replace(grid, placed=Placement(away, (20, 20, 12))).sample((20, 20, 12)).weight
    assert weight[:10].min() > 0.99 and not weight[10:].any()


def test_coarse_cells_of_another_grid_average_tokens() -> None:
    grid = encode(torch.zeros(33, 33, 5), affine((1.0, 1.0, 1.0)), replace(CONFIG, long_side_tokens=33, gap_mm=1.0))
    rows, cols = torch.meshgrid(torch.arange(33), torch.arange(33), indexing="ij")
    board = ((rows + cols) % 2 * 2 - 1).float().expand(5, 33, 33)[..., None]
    coarse = replace(grid, features=board.contiguous(), placed=Placement(np.eye(4), (33, 33, 5))).sample((11, 11, 5))
    assert coarse.values.abs().max() < 1 / 9 + 1e-4  # float32
