"""A volume becomes slices, slices become tokens, and every token knows where it lies in the volume.

The interface of encoders is here: whatever turns a volume into a ``TokenGrid`` can stand in for DINOv2, and any encoder of 2D
images (``PatchEncoder``) gets there through ``volume_tokens``.

What the encoder is shown: parallel slices, each a window around the body, in the orientation of a radiological display
(whatever the order and direction of the file's axes), resampled to square pixels in millimetres: nothing is ever stretched.
The window's long side is filled with tokens; its short side is rounded up to whole patches by showing more of the volume, and
black where the volume ends. A token is never finer than a voxel: beyond that it would only cost time.

Cost: slices x (24 n d^2 + 4 n^2 d) x depth operations for n = h x w tokens of d channels; tokens are kept as float16 in host
memory, 2 n d bytes a slice, and nothing else grows with the number of slices.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinoreg.config import EncoderConfig
from dinoreg.errors import RegistrationError
from dinoreg.volume import AXIS_CODES, Volume

# Patient directions in which slices follow one another, image rows go down and image columns go right.
DISPLAY = {"axial": "SPL", "coronal": "AIL", "sagittal": "LIP"}
CROP_MARGIN = 1 / 64  # of the body's longer side, shown around the body: about one token
FOREGROUND = 0.5  # share of a patch inside the mask from which its token counts as foreground
TOKENS_A_BATCH = {"cuda": 16384, "cpu": 4096}  # a GPU is busy with 16k tokens; a CPU gains nothing from more than a slice
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WORTH_SAYING = 10.0  # seconds that encoding will take, from which an estimate is logged

log = logging.getLogger(__name__)


class PatchEncoder(Protocol):
    """A frozen encoder of 2D images, with its provenance for reports."""

    @property
    def arch(self) -> str:
        """Name of the architecture."""

    @property
    def sha256(self) -> str | None:
        """Hash of its checkpoint file; None if there is none."""

    @property
    def source(self) -> str:
        """Where its weights come from, in words."""

    @property
    def patch(self) -> int:
        """Side in px of the square that becomes one token."""

    @property
    def device(self) -> torch.device:
        """Where images have to be."""

    def patch_tokens(self, images: Tensor, last_layers: int) -> Tensor:
        """Images (b, 3, h * patch, w * patch), float32 -> tokens (b, h, w, channels)."""


@dataclass(frozen=True, eq=False)
class TokenGeometry:
    """Where the tokens of a volume lie; separable, one line an array axis.

    Attributes:
        shape: voxels (i, j, k) of the volume.
        axes: the array axis along which the slices, the rows and the columns of the grid run.
        positions: per array axis, voxel coordinates of the tokens along it, monotonic (descending where the display runs
            against the array).
        extent: per array axis, (low, high) voxel coordinates of the part that the tokens stand for.
    """

    shape: tuple[int, int, int]
    axes: tuple[int, int, int]
    positions: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]
    extent: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Tokens of one volume.

    Attributes:
        tokens: (slices, h, w, channels) float16 on the host; zero in slices that were not encoded.
        foreground: (slices, h, w) bool; False for background, for padding and in slices that were not encoded.
        geometry: where they lie.
    """

    tokens: Tensor
    foreground: Tensor
    geometry: TokenGeometry


@dataclass(frozen=True)
class _Line:
    """Samples along one array axis: ``count`` of them, ``step`` voxels apart (negative against the array), around ``centre``."""

    voxels: int
    count: int
    step: float
    centre: float

    def position(self, index: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Voxel coordinate of a sample index, which may be fractional."""
        return self.centre + (index - (self.count - 1) / 2) * self.step

    def matrix(self) -> npt.NDArray[np.float64]:
        """(count, voxels) weights that sample an image along this axis.

        Linear interpolation where samples are closer than voxels, a triangle as wide as two samples (no aliasing) where they
        are wider; weights are renormalised at the border, and a sample whose centre lies outside the volume is zero.
        """
        at = self.position(np.arange(self.count, dtype=np.float64))
        distance = np.abs(at[:, None] - np.arange(self.voxels))
        weights = np.maximum(0.0, 1 - distance / max(1.0, abs(self.step)))
        inside = (at >= -0.5) & (at <= self.voxels - 0.5)
        return np.where(inside[:, None], weights / np.maximum(weights.sum(1, keepdims=True), 1e-12), 0.0)


def volume_tokens(volume: Tensor, mask: Tensor, affine: npt.NDArray[np.float64], encoder: PatchEncoder, config: EncoderConfig,
                  *, window: Tensor | None = None, progress: Callable[[int, int], None] | None = None) -> TokenGrid:
    """Encode a volume slice by slice.

    Args:
        volume: (i, j, k) float, values in [0, 1]; 0 is what the encoder sees outside the volume.
        mask: (i, j, k) bool, the body (or whatever is to be registered).
        affine: 4x4, voxel -> RAS mm.
        encoder: where the images go; its device is used.
        config: plane, gap, size of the token grid, normalisation.
        window: (i, j, k) bool whose bounding box is shown, ``mask`` by default. For a pair on one grid give the union of both
            masks, so that both are seen at the same scale.
        progress: called after every batch with the number of slices encoded and to be encoded.

    Returns:
        The tokens with their geometry. Slices lie exactly on voxel indices; the first and the last one of the window are
        always among them. Slices without a foreground token are not encoded.

    Raises:
        RegistrationError: when there is no foreground to encode, or the encoder returns something that is not finite.
        torch.OutOfMemoryError: when a single slice is too much for the GPU; more than one are halved until they fit.
    """
    shape = (volume.shape[0], volume.shape[1], volume.shape[2])
    window = mask if window is None else window
    if not bool(mask.any()) or not bool(window.any()):
        raise RegistrationError("the foreground mask is empty: there is nothing to encode")
    device, patch = encoder.device, encoder.patch
    indices, rows, cols, geometry = _plan(shape, affine, window, patch, config)
    slices = volume.permute(geometry.axes)
    masks = mask.permute(geometry.axes)
    row_matrix, col_matrix = rows.matrix(), cols.matrix()
    row_cover, col_cover = (_float(m.reshape(-1, patch, m.shape[1]).mean(1), device) for m in (row_matrix, col_matrix))
    to_rows, to_cols = _float(row_matrix, device), _float(col_matrix, device)

    shares = [row_cover @ masks[index].to(device, torch.float32) @ col_cover.T for index in indices]  # each (h, w)
    foreground = torch.stack(shares) >= FOREGROUND
    wanted = [number for number in range(len(indices)) if bool(foreground[number].any())]
    if not wanted:
        raise RegistrationError(f"no token is foreground: the mask ({int(mask.sum())} voxels) is smaller than a token everywhere")
    size = max(1, TOKENS_A_BATCH.get(device.type, TOKENS_A_BATCH["cpu"]) // foreground[0].numel())
    mean, std = (torch.tensor(value, device=device)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))

    tokens: Tensor | None = None
    found: Tensor | None
    began = time.monotonic()
    start = 0
    while start < len(wanted):
        numbers = wanted[start : start + size]
        try:
            grey = torch.stack([to_rows @ slices[indices[n]].to(device, torch.float32) @ to_cols.T for n in numbers])
            images = grey[:, None].expand(-1, 3, -1, -1)  # (b, 3, height, width)
            if config.imagenet_norm:
                images = (images - mean) / std
            found = encoder.patch_tokens(images, config.last_layers).to("cpu", torch.float16)  # (b, h, w, c)
        except torch.OutOfMemoryError:  # of a GPU, which others may use as well
            if len(numbers) == 1:
                raise
            found = None
        if found is None:  # out here, nothing of the failed attempt is held any more
            size = len(numbers) // 2
            log.warning("GPU memory ran out with %d slices at a time: going on with %d", len(numbers), size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        if not bool(torch.isfinite(found).all()):
            raise RegistrationError("the encoder returned tokens that are not finite, or too large for float16 (65504)")
        if tokens is None:
            tokens = torch.zeros(len(indices), *found.shape[1:], dtype=torch.float16)
        tokens[numbers] = found
        seconds = time.monotonic() - began
        if start == 0 and (estimate := seconds / len(numbers) * len(wanted)) > WORTH_SAYING:
            log.info("encoding %d slices will take about %.0f s (the first %d took %.1f s)", len(wanted), estimate, len(numbers),
                     seconds)
        start += len(numbers)
        if progress is not None:
            progress(start, len(wanted))
    assert tokens is not None  # wanted is not empty
    return TokenGrid(tokens, foreground.cpu(), geometry)


def _plan(shape: tuple[int, int, int], affine: npt.NDArray[np.float64], window: Tensor, patch: int,
          config: EncoderConfig) -> tuple[list[int], _Line, _Line, TokenGeometry]:
    """Slice indices, pixel lines of the rows and columns, and the geometry of the tokens."""
    grid = Volume(np.broadcast_to(np.float32(0), shape), affine)  # for its orientation and spacing
    layout = [_along(grid.orientation, direction) for direction in DISPLAY[config.axis]]
    axes = (layout[0][0], layout[1][0], layout[2][0])
    boxes = [(0, shape[axis]) for axis in axes]
    if config.crop:
        boxes = [_bounds(window, axis) for axis in axes]
        sides = [(high - low) * grid.spacing[axis] for (low, high), axis in zip(boxes, axes, strict=True)]
        for line in (1, 2):  # rows and columns; along the slices there is nothing to see outside the body
            margin = math.ceil(CROP_MARGIN * max(sides[1:]) / grid.spacing[axes[line]])
            boxes[line] = (max(0, boxes[line][0] - margin), min(shape[axes[line]], boxes[line][1] + margin))

    gap = max(1, math.floor(config.gap_mm / grid.spacing[axes[0]] + 0.5))
    low, high = boxes[0]
    indices = list(range(low, high, gap)) if layout[0][1] > 0 else list(range(high - 1, low - 1, -gap))
    last = high - 1 if layout[0][1] > 0 else low
    if indices[-1] != last:
        indices.append(last)

    spacing = [grid.spacing[axes[line]] for line in (1, 2)]
    sides = [(high - low) * mm for (low, high), mm in zip(boxes[1:], spacing, strict=True)]
    long_side = max(1, min(config.long_side_tokens, math.floor(max(sides) / min(spacing) + 1e-6)))
    token_mm = max(sides) / long_side
    rows, cols = (
        _Line(shape[axis], patch * math.ceil(side / token_mm - 1e-6), sign * token_mm / patch / mm, (low + high - 1) / 2)
        for (axis, sign), side, mm, (low, high) in zip(layout[1:], sides, spacing, boxes[1:], strict=True))

    positions = {axes[0]: np.array(indices, dtype=np.float64)}
    extent = {axes[0]: (min(indices) - gap / 2, max(indices) + gap / 2)}
    for axis, pixels in zip(axes[1:], (rows, cols), strict=True):
        positions[axis] = pixels.position(np.arange(pixels.count // patch, dtype=np.float64) * patch + (patch - 1) / 2)
        half = abs(pixels.step) * pixels.count / 2
        extent[axis] = (pixels.centre - half, pixels.centre + half)
    return indices, rows, cols, TokenGeometry(shape, axes, (positions[0], positions[1], positions[2]),
                                              (extent[0], extent[1], extent[2]))


def _along(orientation: str, direction: str) -> tuple[int, int]:
    """The array axis that runs along a patient direction such as "S", and +1, or -1 where it runs the other way."""
    axis = next(n for n, code in enumerate(orientation) if any(code in pair and direction in pair for pair in AXIS_CODES))
    return axis, 1 if orientation[axis] == direction else -1


def _bounds(mask: Tensor, axis: int) -> tuple[int, int]:
    """First voxel and one past the last voxel of the mask along an axis."""
    occupied = mask.movedim(axis, 0).flatten(1).any(1).nonzero()
    return int(occupied[0]), int(occupied[-1]) + 1


def _float(matrix: npt.NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(matrix).to(device, torch.float32)
