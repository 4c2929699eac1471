"""A volume's tokens follow from the volume alone, and what they follow from is what their key names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fake_encoder import PatchMeans, affine
from scipy import ndimage

from dinoreg.config import Config, EncoderConfig, IntensityConfig, PcaConfig
from dinoreg.dino import ProjectedGrid, placement
from dinoreg.encoding import EncodedVolume, encode_volume, encoding_key, same_view, tilt_degrees, upright
from dinoreg.initial import undone
from dinoreg.volume import Volume

CONFIG = Config(features="dinov2", encoder=EncoderConfig(long_side_tokens=12, gap_mm=5.0), pca=PcaConfig(components=1))
SHAPE = (30, 26, 20)


def ball(matrix: np.ndarray, shape: tuple[int, int, int] = SHAPE, centre: tuple[float, float, float] = (0, 0, 0)) -> Volume:
    """A textured ball of 17 mm in the middle of a grid, moved by ``centre`` mm; int16."""
    matrix = matrix.copy()
    matrix[:3, 3] = -matrix[:3, :3] @ ((np.array(shape) - 1) / 2)
    at = np.einsum("ab,bijk->aijk", matrix[:3, :3], np.indices(shape)) + matrix[:3, 3, None, None, None]
    at -= np.array(centre)[:, None, None, None]
    values = 500 + 300 * np.sin(at[0] / 4) * np.cos(at[1] / 5) * np.cos(at[2] / 6)
    return Volume(np.where((at**2).sum(0) < 17**2, values, 0).astype(np.int16), matrix)


def encode(volume: Volume, mask: Volume | None = None) -> EncodedVolume:
    return encode_volume(volume, mask, "", PatchMeans(), CONFIG)


def same(one: EncodedVolume, other: EncodedVolume) -> bool:
    assert one.moments is not None and other.moments is not None
    return (torch.equal(one.grid.tokens, other.grid.tokens) and torch.equal(one.grid.foreground, other.grid.foreground)
            and torch.equal(one.moments.scatter, other.moments.scatter))


def test_moving_a_volume_as_a_whole_changes_neither_tokens_nor_key() -> None:
    volume = ball(affine((2.0, 2.1, 2.4), "LPS", 4.0))
    moved = volume.affine.copy()
    moved[:3, 3] += (100, -33.3, 7)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.05), -np.sin(0.05)], [np.sin(0.05), np.cos(0.05)]]
    for other in (Volume(volume.array, moved), Volume(volume.array, turn @ volume.affine)):
        assert same(encode(volume), encode(other))
        assert encoding_key(volume, None, "", PatchMeans(), CONFIG) == encoding_key(other, None, "", PatchMeans(), CONFIG)


def _one_voxel(volume: Volume) -> Volume:
    array = volume.array.copy()
    array[15, 13, 10] += 1  # type: ignore[call-overload]
    return Volume(array, volume.affine)


@pytest.mark.parametrize("change", [
    _one_voxel,
    lambda volume: Volume(volume.array.astype(np.float32), volume.affine),
    lambda volume: Volume(volume.array, volume.affine * 1.01),
    lambda volume: Volume(volume.array, np.diag([-1, 1, 1, 1]) @ volume.affine),
    lambda volume: Volume(np.ascontiguousarray(volume.array.reshape(26, 30, 20)), volume.affine),
], ids=["a voxel", "the type", "the spacing", "the orientation", "the shape"])
def test_the_key_knows_the_volume(change: Callable[[Volume], Volume]) -> None:
    volume = ball(affine((2.0, 2.0, 2.0)))
    assert encoding_key(volume, None, "", PatchMeans(), CONFIG) != encoding_key(change(volume), None, "", PatchMeans(), CONFIG)


def test_the_key_knows_mask_modality_preprocessing_slices_weights_and_basis() -> None:
    volume = ball(affine((2.0, 2.0, 2.0)))
    mask, part = (Volume((volume.array > level).astype(np.uint8), volume.affine) for level in (0, 500))
    windows = IntensityConfig(percentiles=(1.0, 99.0))
    keys = {
        encoding_key(volume, None, "", PatchMeans(), CONFIG),
        encoding_key(volume, mask, "", PatchMeans(), CONFIG),
        encoding_key(volume, part, "", PatchMeans(), CONFIG),
        encoding_key(volume, Volume(part.array, 2 * part.affine), "", PatchMeans(), CONFIG),
        encoding_key(volume, None, "MR", PatchMeans(), CONFIG),
        encoding_key(volume, None, "", PatchMeans(), dataclasses.replace(CONFIG, encoder_intensity=windows)),
        encoding_key(volume, None, "", PatchMeans(), dataclasses.replace(CONFIG, intensity=windows)),
        encoding_key(volume, None, "", PatchMeans(), dataclasses.replace(CONFIG, encoder=EncoderConfig(gap_mm=4.0))),
        encoding_key(volume, None, "", PatchMeans(sha256="1"), CONFIG),
        encoding_key(volume, None, "", PatchMeans(arch="other"), CONFIG),
        encoding_key(volume, None, "", PatchMeans(), CONFIG, "1"),
    }
    assert len(keys) == 11
    again = Volume(mask.array * 7, mask.affine)  # what counts is where a mask is 0
    assert encoding_key(volume, again, "", PatchMeans(), CONFIG) in keys
    solver = dataclasses.replace(CONFIG, features="dinov2+mind", pca=PcaConfig(components=2))
    assert encoding_key(volume, None, "", PatchMeans(), solver) in keys  # tokens do not follow from these


def test_a_tilted_volume_is_encoded_upright() -> None:
    """What the encoder sees of it is what it sees of the same anatomy on a straight grid."""
    tilted = ball(affine((2.0, 2.0, 2.0), "LPS", 25.0))
    assert 24 < tilt_degrees(tilted) < 40
    grid = upright(tilted)
    assert tilt_degrees(grid) == 0 and grid.orientation == tilted.orientation
    corners = np.array([[i, j, k, 1] for i in (0, 29) for j in (0, 25) for k in (0, 19)])
    inside = corners @ np.linalg.solve(grid.affine, tilted.affine).T[:, :3]
    assert (inside > -0.5).all() and (inside < np.array(grid.shape) - 0.5).all()
    straight = ball(affine((2.0, 2.0, 2.0), "LPS"))
    cells = (15, 13, 10)
    one, other = (ProjectedGrid(found.tokens.float(), found.foreground, found.geometry, placement(upright(volume), straight))
                  .sample(cells) for volume in (tilted, straight) for found in [encode(volume).grid])
    inside = (one.weight > 0.99) & (other.weight > 0.99)
    assert inside.sum() > 100
    # slices 5 mm apart and patches of 3 mm, laid differently over a texture of 25 mm and more; the raw tilt would leave .6
    assert np.corrcoef(one.values[0][inside], other.values[0][inside])[0, 1] > 0.95


def test_a_straight_volume_is_its_own_grid() -> None:
    volume = ball(affine((2.0, 2.0, 2.0), "PIR", 5.0))
    assert tilt_degrees(volume) < 10 and upright(volume) is volume


def test_a_mask_is_what_counts() -> None:
    volume = ball(affine((2.0, 2.0, 2.0)))
    half = np.zeros(SHAPE, np.uint8)
    half[:15] = 1
    found = encode(volume, Volume(half, volume.affine)).grid
    reach = ndimage.find_objects((volume.array > 0) & (half > 0))[0][0].stop
    assert found.geometry.extent[0][1] < reach + 3 + 3  # voxels: grown by 3, a patch is 3 wide


@pytest.mark.parametrize(("degrees", "same"), [(0, True), (6, True), (14, False), (90, False)])
def test_a_start_that_turns_little_leaves_the_view_as_it_is(degrees: float, same: bool) -> None:
    volume = ball(affine((2.0, 2.0, 2.4), "LPS"))
    angle, start = np.deg2rad(degrees), np.eye(4)
    start[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    start[:3] *= 1.03
    start[:3, 3] = (50, 0, -20)
    assert same_view(volume, undone(volume, start)) == same
