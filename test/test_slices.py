"""Volume -> slices -> tokens: undistorted, in the right place, nothing encoded for nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_encoder import PatchMeans, affine
from torch import Tensor

from dinoreg import slices
from dinoreg.config import EncoderConfig
from dinoreg.errors import RegistrationError
from dinoreg.slices import TokenGrid, volume_tokens

CONFIG = EncoderConfig(long_side_tokens=12, gap_mm=4.0, crop=False)
FLOAT16_ONE = 2.0**-11  # rounding of tokens up to 1


def everywhere(volume: Tensor) -> Tensor:
    return torch.ones(volume.shape, dtype=torch.bool)


def encode(volume: Tensor, matrix: np.ndarray, config: EncoderConfig = CONFIG, mask: Tensor | None = None,
           encoder: PatchMeans | None = None, window: Tensor | None = None) -> TokenGrid:
    mask = everywhere(volume) if mask is None else mask
    return volume_tokens(volume, mask, matrix, encoder or PatchMeans(), config, window=window)


def ramp(shape: tuple[int, int, int], axis: int) -> Tensor:
    """Voxel index along an axis over its length: (index + 1/2) / n."""
    n = shape[axis]
    at = [1, 1, 1]
    at[axis] = n
    return ((torch.arange(n) + 0.5) / n).reshape(at).expand(shape)


GRIDS = [
    ((24, 24, 18), affine((2.0, 2.0, 2.0))),
    ((25, 37, 19), affine((1.7, 0.9, 3.1), "LPS")),  # odd sizes, anisotropic
    ((19, 33, 28), affine((3.0, 1.1, 1.4), "SRA")),  # axes permuted
    ((31, 17, 23), affine((1.0, 2.5, 1.3), "PIR", tilt_degrees=14.0)),  # permuted, flipped and oblique
]


@pytest.mark.parametrize(("shape", "matrix"), GRIDS)
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_token_lies_where_its_geometry_says(shape: tuple[int, int, int], matrix: np.ndarray, plane: str, axis: int) -> None:
    """On a linear ramp the mean of a patch is the ramp's value at the patch's centre."""
    grid = encode(ramp(shape, axis), matrix, replace(CONFIG, axis=plane))
    geometry = grid.geometry
    inner = torch.ones(grid.foreground.shape, dtype=torch.bool)  # patches between the outermost voxel centres
    for line, along in enumerate(geometry.axes):
        at = geometry.positions[along]
        reach = abs(at[1] - at[0]) / 2 if line else 0.0
        inside = torch.from_numpy((at >= reach) & (at <= shape[along] - 1 - reach))
        assert inside.sum() >= 3
        inner &= inside.reshape([-1 if n == line else 1 for n in range(3)])
    assert grid.foreground[inner].all()
    line = geometry.axes.index(axis)
    expected = torch.from_numpy(geometry.positions[axis]).reshape([-1 if n == line else 1 for n in range(3)])
    found = grid.tokens[..., 0].double() * shape[axis] - 0.5  # voxels
    # float16 tokens, and float32 sums of 196 pixels
    assert (found - expected)[inner].abs().max() <= shape[axis] * (FLOAT16_ONE + 1e-5)


def test_slices_are_at_multiples_of_the_gap_and_at_the_last_index() -> None:
    volume = torch.rand(20, 20, 24)
    for gap_mm, step in ((1.0, 1), (4.0, 2), (4.9, 2), (5.1, 3), (14.0, 7), (500.0, 250)):
        grid = encode(volume, affine((2.0, 2.0, 2.0)), replace(CONFIG, gap_mm=gap_mm))
        expected = sorted({*range(0, 24, step), 23})
        assert grid.geometry.positions[2].tolist() == expected
    single = encode(volume[:, :, :1], affine((2.0, 2.0, 2.0)))
    assert single.tokens.shape[0] == 1


def test_an_encoded_slice_is_the_slice_at_its_index() -> None:
    """Each slice has one grey value of its own: any mixture or shift along the slice axis shows."""
    values = torch.rand(23, generator=torch.Generator().manual_seed(0))
    grid = encode(values.expand(30, 20, 23), affine((2.0, 2.0, 2.0)))
    for number, index in enumerate(grid.geometry.positions[2].astype(int)):
        assert torch.allclose(grid.tokens[number][grid.foreground[number]].float(), values[index], atol=FLOAT16_ONE)


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SAR", "ILP", "ASL"])
def test_the_picture_does_not_depend_on_how_the_file_orders_its_axes(codes: str) -> None:
    volume = torch.rand(22, 27, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(22, 27, 16, dtype=torch.bool)
    mask[3:19, 5:21, 2:13] = True
    spacing = (1.5, 2.0, 2.5)
    reference, other = PatchMeans(), PatchMeans()
    config = replace(CONFIG, crop=True)
    first = encode(volume, affine(spacing), config, mask, reference)
    pairs = ("RL", "AP", "SI")
    order = [next(n for n in range(3) if code in pairs[n]) for code in codes]
    flips = [n for n, code in enumerate(codes) if code in "LPI"]

    def reorder(x: Tensor) -> Tensor:
        return x.permute(order).flip(flips)

    new_spacing = (spacing[order[0]], spacing[order[1]], spacing[order[2]])
    second = encode(reorder(volume), affine(new_spacing, codes), config, reorder(mask), other)
    assert len(reference.images) == len(other.images) > 3
    for one, two in zip(reference.images, other.images, strict=True):
        assert torch.allclose(one, two, atol=1e-5)  # float32 sums in another order
    assert torch.equal(first.foreground, second.foreground)
    for n in range(3):  # the same tokens at the mirrored voxel
        expected = first.geometry.positions[order[n]]
        if n in flips:
            expected = volume.shape[order[n]] - 1 - expected
        np.testing.assert_allclose(second.geometry.positions[n], expected, atol=1e-9)


def test_anterior_is_up_and_the_patients_left_is_on_the_right_of_an_axial_picture() -> None:
    volume = torch.zeros(24, 24, 2)
    volume[:6, 18:, :] = 1.0  # low i is the patient's left, high j is anterior
    encoder = PatchMeans()
    encode(volume, affine((2.0, 2.0, 2.0), "RAS"), encoder=encoder)
    image = encoder.images[0][0]
    assert image[10, -10] == 1 and image[10, 10] == 0 and image[-10, -10] == 0


@pytest.mark.parametrize("spacing", [(1.0, 2.5, 2.0), (2.2, 0.7, 2.0)])
def test_the_encoder_sees_millimetres_not_voxels(spacing: tuple[float, float, float]) -> None:
    """A ball of 20 mm radius on an anisotropic grid is a disc in the picture."""
    shape = (round(60 / spacing[0]), round(60 / spacing[1]), 3)
    x, y = (((torch.arange(n) - (n - 1) / 2) * mm) for n, mm in zip(shape[:2], spacing[:2], strict=True))
    inside = (20 + 0.5 - (x[:, None] ** 2 + y**2).sqrt()).clamp(0, 1)
    encoder = PatchMeans()
    encode(inside[:, :, None].expand(shape).contiguous(), affine(spacing), replace(CONFIG, long_side_tokens=16), encoder=encoder)
    disc = encoder.images[0][0] > 0.5
    height, width = (int(disc.any(axis).sum()) for axis in (1, 0))
    # Interpolating an edge sampled every 2.5 mm moves it by up to a quarter of that: 2 x 0.6 of 40 mm, 3 %; stretching
    # either example to square voxels would be off by a factor of 2.5 or 3.
    assert abs(height / width - 1) < 0.05
    assert disc.sum() / (height * width) == pytest.approx(np.pi / 4, rel=0.05)


@pytest.mark.parametrize(("size", "tokens"), [((40, 29), (12, 9)), ((29, 40), (9, 12)), ((40, 40), (12, 12)), ((40, 3), (12, 1))])
def test_the_long_side_is_filled_and_the_short_side_padded(size: tuple[int, int], tokens: tuple[int, int]) -> None:
    """29/40 of 12 tokens is 8.7, so 9 rows; the margin is black and the scale is 40 voxels in 12 tokens both ways."""
    encoder = PatchMeans()
    grid = encode(torch.ones(*size, 2), affine((1.0, 1.0, 1.0), "PLS"), encoder=encoder)  # i = rows, j = columns
    assert grid.tokens.shape[1:3] == tokens
    image = encoder.images[0][0]
    assert image.shape == (14 * tokens[0], 14 * tokens[1])
    for axis in range(2):
        lit = int((image.amax(1 - axis) > 0).sum())
        assert abs(lit - size[axis] / 40 * 12 * 14) <= 1  # px
        assert np.diff(grid.geometry.positions[axis]) == pytest.approx(40 / 12)


def test_tokens_in_the_padding_are_not_foreground() -> None:
    grid = encode(torch.ones(40, 22, 2), affine((1.0, 1.0, 1.0), "PLS"), replace(CONFIG, long_side_tokens=40))
    assert bool(grid.foreground.all())
    grid = encode(torch.ones(40, 8, 2), affine((1.0, 1.0, 1.0), "PLS"), replace(CONFIG, long_side_tokens=4))
    assert grid.tokens.shape[1:3] == (4, 1)  # a token of 10 voxels, of which 8 are there
    assert bool(grid.foreground.all())
    grid = encode(torch.ones(40, 13, 2), affine((1.0, 1.0, 1.0), "PLS"), replace(CONFIG, long_side_tokens=4))
    assert grid.foreground[0].sum(1).tolist() == [2, 2, 2, 2]  # 6.5 of 10 voxels each
    grid = encode(torch.ones(40, 24, 2), affine((1.0, 1.0, 1.0), "PLS"), replace(CONFIG, long_side_tokens=4))
    assert grid.foreground[0].tolist() == 4 * [[True, True, True]]  # 7, 10 and 7 of 10 voxels


def test_a_token_is_never_finer_than_a_voxel() -> None:
    grid = encode(torch.ones(20, 16, 2), affine((2.0, 2.0, 2.0)), replace(CONFIG, long_side_tokens=64))
    assert sorted(grid.tokens.shape[1:3]) == [16, 20]


def test_a_fine_pattern_is_averaged_not_aliased_when_the_picture_is_smaller() -> None:
    """2.5 voxels a pixel: lines one voxel apart become grey; taken at points they would come out as coarse bands."""
    lines = (torch.arange(140) % 2).float()
    encoder = PatchMeans()
    encode(lines[:, None, None].expand(140, 140, 2).contiguous(), affine((1.0, 1.0, 1.0)), replace(CONFIG, long_side_tokens=4),
           encoder=encoder)
    # Weights of a triangle 2.5 wide on odd and even voxels differ by up to 4 %; at points the values are 0 to 1.
    assert (encoder.images[0][:, 2:-2, 2:-2] - 0.5).abs().max() < 0.03


def test_only_the_body_with_a_margin_is_shown_when_cropping() -> None:
    volume = torch.zeros(60, 60, 20)
    mask = torch.zeros(60, 60, 20, dtype=torch.bool)
    mask[20:40, 30:42, 4:15] = True
    grid = encode(volume, affine((2.0, 2.0, 2.0)), replace(CONFIG, crop=True), mask)
    low, high = grid.geometry.extent[0]
    assert 17 <= low <= 19.5 and 39.5 <= high <= 42  # a margin of one voxel each side, no more than a token
    low, high = grid.geometry.extent[1]
    assert low <= 29.5 and high >= 41.5 and high - low < 17
    assert grid.geometry.positions[2].tolist() == [4, 6, 8, 10, 12, 14]
    share = grid.foreground[0].float().mean()
    assert 0.5 < share < 1


def test_volumes_of_a_pair_share_one_scale_through_the_window() -> None:
    volume = torch.rand(40, 40, 12)
    small, large = torch.zeros(40, 40, 12, dtype=torch.bool), torch.zeros(40, 40, 12, dtype=torch.bool)
    small[15:25, 15:25, 4:8] = True
    large[4:36, 8:32, 1:11] = True
    config = replace(CONFIG, crop=True)
    first = encode(volume, affine((2.0, 2.0, 2.0)), config, small, window=small | large)
    second = encode(volume, affine((2.0, 2.0, 2.0)), config, large, window=small | large)
    for one, two in zip(first.geometry.positions, second.geometry.positions, strict=True):
        assert np.array_equal(one, two)
    assert 0 < first.foreground.sum() < second.foreground.sum()


def test_slices_without_foreground_are_not_encoded() -> None:
    volume = torch.rand(20, 20, 21)
    mask = torch.zeros(20, 20, 21, dtype=torch.bool)
    mask[:, :, :7] = True
    mask[:, :, 15:] = True
    encoder = PatchMeans()
    grid = encode(volume, affine((2.0, 2.0, 2.0)), CONFIG, mask, encoder)  # slices 0, 2, ..., 20
    assert len(encoder.images) == 7  # 0 2 4 6 and 16 18 20
    empty = [n for n, index in enumerate(grid.geometry.positions[2]) if 7 <= index < 15]
    assert not grid.foreground[empty].any() and not grid.tokens[empty].any()
    assert grid.foreground[0].all()


class Crowded(PatchMeans):
    """An encoder on a GPU that has room for some slices at a time."""

    room = 2

    def patch_tokens(self, images: Tensor, last_layers: int) -> Tensor:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().patch_tokens(images, last_layers)


def test_gpu_memory_that_runs_out_halves_the_batches(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """13 slices, then 6, 3 and 1 at a time; every slice is encoded once, and the tokens are the same."""
    volume = torch.rand(24, 24, 24, generator=torch.Generator().manual_seed(3))
    matrix = affine((2.0, 2.0, 2.0))
    monkeypatch.setitem(slices.TOKENS_A_BATCH, "cpu", 10**6)
    expected, encoder = encode(volume, matrix), Crowded()
    found = encode(volume, matrix, encoder=encoder)
    assert torch.equal(found.tokens, expected.tokens) and encoder.batches == [1] * 13
    assert [record.args for record in caplog.records] == [(13, 6), (6, 3), (3, 1)]


def test_gpu_memory_too_small_for_one_slice_is_an_error() -> None:
    encoder = Crowded()
    encoder.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        encode(torch.rand(24, 24, 24), affine((2.0, 2.0, 2.0)), encoder=encoder)


@pytest.mark.parametrize(("budget", "batches"), [(1, [1] * 12), (5 * 144, [5, 5, 2]), (10**6, [12])])
def test_batches_keep_to_the_budget_and_do_not_change_the_tokens(monkeypatch: pytest.MonkeyPatch, budget: int,
                                                                  batches: list[int]) -> None:
    volume = torch.rand(24, 24, 12, generator=torch.Generator().manual_seed(2))
    config = replace(CONFIG, gap_mm=1.0)
    expected = encode(volume, affine((1.0, 1.0, 1.0)), config)
    monkeypatch.setitem(slices.TOKENS_A_BATCH, "cpu", budget)
    encoder = PatchMeans()
    found = encode(volume, affine((1.0, 1.0, 1.0)), config, encoder=encoder)
    assert encoder.batches == batches
    assert torch.equal(found.tokens, expected.tokens)


def test_grey_is_repeated_and_normalised_only_on_request() -> None:
    volume = torch.full((24, 24, 2), 0.5)
    plain, normalised = PatchMeans(), PatchMeans()
    encode(volume, affine((1.0, 1.0, 1.0)), encoder=plain)
    encode(volume, affine((1.0, 1.0, 1.0)), replace(CONFIG, imagenet_norm=True), encoder=normalised)
    assert torch.allclose(plain.images[0], torch.tensor(0.5))
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(normalised.images[0][:, 50, 50], expected)


def test_tokens_are_float16_on_the_host_and_usable_under_autograd() -> None:
    grid = encode(torch.rand(24, 24, 4), affine((1.0, 1.0, 1.0)))
    assert grid.tokens.dtype == torch.float16 and grid.tokens.device.type == "cpu"
    assert not grid.tokens.is_inference() and not grid.tokens.requires_grad


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(RegistrationError, match="empty"):
        encode(torch.rand(20, 20, 4), affine((1.0, 1.0, 1.0)), mask=torch.zeros(20, 20, 4, dtype=torch.bool))


def test_a_mask_smaller_than_a_token_everywhere_is_refused() -> None:
    mask = torch.zeros(64, 64, 4, dtype=torch.bool)
    mask[30, 30, 2] = True
    with pytest.raises(RegistrationError, match="no token is foreground"):
        encode(torch.rand(64, 64, 4), affine((1.0, 1.0, 1.0)), mask=mask)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_tokens_that_float16_cannot_hold_are_refused(value: float) -> None:
    with pytest.raises(RegistrationError, match="not finite, or too large"):
        encode(torch.full((20, 20, 4), value), affine((1.0, 1.0, 1.0)))
