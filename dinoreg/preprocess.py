"""Grey values to [0, 1], and where an image says anything."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dinoreg.config import MODALITIES, IntensityConfig
from dinoreg.errors import ConfigError, InputError
from dinoreg.slabs import slabs
from dinoreg.volume import Volume

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
CUBE = np.ones((3, 3, 3), dtype=bool)


def to_unit_range(array: FloatArray, modality: str, config: IntensityConfig, background: bool = False) -> FloatArray:
    """Clip grey values to the modality's window and scale them to [0, 1].

    Args:
        array: (i, j, k), finite; NaN where the image has no value (these become 0).
        modality: "CT", "CBCT", "MR" or "" (unknown). CT windows are only used where the values can be HU: some below -200.
        config: windows and percentiles. Percentiles are taken over the voxels above the smallest value.
        background: take percentiles over all voxels instead (the published way).

    Raises:
        ConfigError: a modality of another name.
        InputError: the image has no contrast.
    """
    if modality not in MODALITIES:
        raise ConfigError(f"a modality is one of {MODALITIES}; got {modality!r}")
    lowest, highest = float(np.fmin.reduce(array, None)), float(np.fmax.reduce(array, None))  # which pass over NaN
    if not lowest < highest:
        raise InputError("the image has one value everywhere (on the fixed image's grid): nothing can be registered to it")
    window = {"CT": config.ct_window, "CBCT": config.cbct_window}.get(modality)
    if window is None or lowest > -200:
        known = array[np.isfinite(array)] if background else array[array > lowest]
        low, high = np.percentile(known, config.percentiles, overwrite_input=True)
        if config.percentiles[0] == 0:
            low = lowest
        window = (float(low), float(high)) if low < high else (lowest, highest)  # nearly everything has one value: a label map
    unit = np.empty(array.shape, dtype=np.float32)
    for slab in slabs(array.shape):  # in double precision: the smallest and the largest float32 can be a window, too
        scaled = (array[slab].astype(np.float64) - window[0]) / (window[1] - window[0])
        unit[slab] = np.nan_to_num(scaled, nan=0.0).clip(0, 1)
    return unit


def valid_region(array: FloatArray, margin: int = 2) -> BoolArray:
    """Where an image holds data: everything but the constant fill that reaches its border, such as the outside of a cone-beam
    CT's cylinder, padding, or the zeros around an extracted brain.

    Args:
        array: (i, j, k); NaN counts as fill.
        margin: voxels of fill beside data that still count as valid (a contour needs both of its sides).
    """
    fill = ~np.isfinite(array)
    fill |= array == np.fmin.reduce(array, None)
    labels, _ = ndimage.label(ndimage.binary_erosion(fill, CUBE, border_value=1))
    touching = np.zeros(labels.max() + 1, dtype=bool)
    for axis in range(3):
        for index in (0, -1):
            touching[np.take(labels, index, axis=axis)] = True
    touching[0] = False
    outside = touching[labels]
    if margin > 1:
        outside = ndimage.binary_erosion(outside, CUBE, iterations=margin - 1, border_value=1)
    return np.asarray(~outside, dtype=bool)


def grown(mask: BoolArray, voxels: int = 3) -> BoolArray:
    """A mask with a margin: features at a contour need both of its sides (AbdomenMRCTx: Dice .436 without, .479 with)."""
    return np.asarray(ndimage.maximum_filter(mask.view(np.uint8), 2 * voxels + 1, mode="constant"), dtype=np.uint8).view(bool)


def body_mask(unit: FloatArray, valid: BoolArray, threshold: float = 0.05) -> BoolArray:
    """The body: the largest connected part above a threshold, its holes (lungs, too) filled slice by slice along each axis.

    Args:
        unit: (i, j, k) in [0, 1].
        valid: where there is data.
        threshold: of the unit range: 0.05 (published for MR; with the CT window used here, -925 HU).
    """
    labels, number = ndimage.label(ndimage.binary_opening((unit > threshold) & valid, CUBE))
    if number == 0:
        return valid
    sizes = np.zeros(number + 1, dtype=np.int64)
    for slab in slabs(labels.shape):  # bincount turns its argument into 64 bits a voxel
        sizes += np.bincount(labels[slab].ravel(), minlength=number + 1)
    sizes[0] = 0
    body = labels == sizes.argmax()
    for axis in range(3):
        for section in np.moveaxis(body, axis, 0):  # views: filled in place
            section[...] = ndimage.binary_fill_holes(section)
    return np.asarray(body, dtype=bool)


def on_grid(volume: Volume, reference: Volume, order: int = 1) -> npt.NDArray[np.generic]:
    """An image on another image's grid, through both headers.

    Args:
        volume: the image to bring over.
        reference: the grid.
        order: 1 linear (float32), 0 nearest (keeps the type).

    Returns:
        Array of the reference's shape; NaN (linear) or 0 outside the volume, which ends half a voxel beyond its outer centres.
    """
    if volume.same_grid(reference):
        return volume.array.astype(np.float32, copy=False) if order else volume.array
    matrix = np.linalg.solve(volume.affine, reference.affine)
    source = volume.array.astype(np.float32, copy=False) if order else volume.array
    found = np.asarray(ndimage.affine_transform(source, matrix[:3, :3], matrix[:3, 3], output_shape=reference.shape, order=order,
                                                mode="nearest"))
    for slab in slabs(reference.shape):
        index = np.ogrid[slab, : reference.shape[1], : reference.shape[2]]
        for row, n in zip(matrix, volume.shape, strict=False):
            at = row[3] + sum(factor * line for factor, line in zip(row, index, strict=False))  # along one axis of the volume
            found[slab][~within(at, n)] = np.nan if order else 0
    return found


def within(at: FloatArray, n: int) -> BoolArray:
    """Whether coordinates along an axis of n voxels lie in the volume: up to half a voxel beyond the outermost centres, and a
    rounding error more."""
    return np.asarray((at > -0.5 - 1e-4) & (at < n - 0.5 + 1e-4))


