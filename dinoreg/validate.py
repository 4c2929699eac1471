"""Checks of a case before it is registered: everything that is wrong with it at once, as values.

A check reads and judges; it changes nothing. What a file's reader refuses (truncation, 2D or 4D, a spacing of zero) never gets
here: see :mod:`dinoreg.io`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dinoreg.errors import InputError
from dinoreg.volume import Volume

CODES = {  # what each code means; error unless said otherwise
    "not-3d": "an axis of the image has a single voxel: there is no volume to register",
    "non-finite": "the image holds NaN or infinite values",
    "constant": "all voxels of the image have the same value",
    "spacing": "warning: a spacing that no scanner of people has",
    "shape-mismatch": "the images of a Learn2Reg pair are not of one shape",
    "affine-mismatch": "warning: the headers of a Learn2Reg pair differ; the pair is taken voxel by voxel, as it is scored",
    "no-overlap": "by their headers, fixed and moving image have no point in common",
    "small-overlap": "warning: by their headers, the moving image covers little of the fixed one",
    "mask-mismatch": "a mask is not on the grid of its image",
    "mask-empty": "a mask selects no voxel",
}

_PLAUSIBLE_SPACING_MM = (0.05, 20.0)
_SMALL_OVERLAP = 0.25  # of the fixed image


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        code: a key of ``CODES``.
        severity: an "error" stops the pair, a "warning" goes into log and report.
        message: what is wrong, in which image, expected, got.
        fix: what to do.
    """

    code: str
    severity: Literal["error", "warning"]
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.message}; {self.fix} [{self.code}]"


def check_volume(volume: Volume, name: str) -> list[Problem]:
    """Check one image by itself.

    Args:
        volume: the image.
        name: what messages call it: the file.
    """
    problems = []
    if min(volume.shape) < 2:
        problems.append(Problem("not-3d", "error", f"{name}: expected a 3D image; got shape {volume.shape}",
                                "give a volume, not a slice"))
    array = volume.array
    bad = array.size - int(np.count_nonzero(np.isfinite(array))) if array.dtype.kind == "f" else 0
    if bad:
        problems.append(Problem("non-finite", "error", f"{name}: expected finite values; got {bad} NaN or infinite voxels",
                                "replace them with the value of air"))
    elif array.min() == array.max():
        problems.append(Problem("constant", "error", f"{name}: expected an image; got the value {array.flat[0]} everywhere",
                                "check how it was exported"))
    low, high = _PLAUSIBLE_SPACING_MM
    if not all(low <= spacing <= high for spacing in volume.spacing):
        got = " x ".join(f"{spacing:g}" for spacing in volume.spacing)
        problems.append(Problem("spacing", "warning", f"{name}: expected a spacing of {low:g} to {high:g} mm; got {got} mm",
                                "check the header: micrometres or metres?"))
    return problems


def check_mask(mask: Volume, volume: Volume, name: str) -> list[Problem]:
    """Check that a mask lies on its image's grid and selects something.

    Args:
        mask: anything but 0 selects.
        volume: the image that the mask belongs to.
        name: what messages call the mask: its file.
    """
    problems = []
    if not mask.same_grid(volume):
        problems.append(Problem("mask-mismatch", "error", f"{name}: expected the grid of its image ({_grid(volume)}); got "
                                f"{_grid(mask)}", "resample the mask with nearest neighbour"))
    if not np.any(mask.array):
        problems.append(Problem("mask-empty", "error", f"{name}: expected a mask that selects voxels; got zeros", "leave it out"))
    return problems


def check_pair(fixed: Volume, moving: Volume, *, same_grid: bool) -> list[Problem]:
    """Check two images against each other.

    Args:
        fixed, moving: the images.
        same_grid: the contract is Learn2Reg's: displacements lead from voxel to voxel, whatever the headers say.
    """
    grids = f"{_grid(fixed)} (fixed) and {_grid(moving)} (moving)"
    if same_grid:
        if fixed.shape != moving.shape:
            return [Problem("shape-mismatch", "error", f"expected images of one shape; got {grids}",
                            "resample one to the other's grid")]
        if not fixed.same_grid(moving):
            return [Problem("affine-mismatch", "warning", f"expected one grid; got {grids}",
                            "the pair is registered voxel by voxel, as it is scored")]
        return []
    covered, back = _overlap(fixed, moving), _overlap(moving, fixed)
    if max(covered, back) == 0:
        return [Problem("no-overlap", "error", f"expected images that overlap; got {grids}",
                        "correct the headers or align the images first")]
    if covered < _SMALL_OVERLAP:
        return [Problem("small-overlap", "warning", f"the moving image covers {100 * covered:.0f} % of the fixed one",
                        "check the headers if both show the same region")]
    return []


def raise_errors(problems: Sequence[Problem], unreadable: Sequence[str] = ()) -> list[str]:
    """Raise all errors as one InputError, those of files that could not be read first; return the warnings as text."""
    errors = [*unreadable, *(str(problem) for problem in problems if problem.severity == "error")]
    if errors:
        raise InputError(" | ".join(errors))
    return [str(problem) for problem in problems]


def _overlap(inner: Volume, outer: Volume) -> float:
    """The share of ``inner``'s extent that lies in ``outer``'s, from a lattice of 17^3 points."""
    axes = [np.linspace(-0.5, n - 0.5, 17) for n in inner.shape]
    points = np.stack([*np.meshgrid(*axes, indexing="ij"), np.ones((17, 17, 17))]).reshape(4, -1)
    mapped = np.linalg.solve(outer.affine, inner.affine @ points)[:3]
    upper = np.array(outer.shape)[:, None] - 0.5
    return float(((mapped >= -0.5) & (mapped <= upper)).all(axis=0).mean())


def _grid(volume: Volume) -> str:
    spacing = " x ".join(f"{value:.4g}" for value in volume.spacing)
    origin = ", ".join(f"{value:.4g}" for value in volume.affine[:3, 3])
    return f"{' x '.join(map(str, volume.shape))} at {spacing} mm, {volume.orientation}, origin ({origin})"
