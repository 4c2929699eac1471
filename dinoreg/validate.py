"""Checks of a case before it is registered: everything that is wrong with it at once, as values.

A check reads and judges; it changes nothing. What a file's reader refuses (:mod:`dinoreg.io`) becomes a problem among the others.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from nibabel.spatialimages import HeaderDataError

from dinoreg.config import modality
from dinoreg.errors import InputError
from dinoreg.io import image_suffix, open_nifti
from dinoreg.volume import Volume

CODES = {  # what each code means; error unless said otherwise
    "unreadable": "a file is missing, truncated, damaged or not what its name says",
    "too-large": "the header declares more voxels than are read",
    "affine": "the header gives no three spacings along independent directions",
    "sheared": "the axes of the image are not at right angles (not asked of a Learn2Reg pair, which is taken voxel by voxel)",
    "two-headers": "warning: the two places that a NIfTI file says it lies at (sform and qform) differ; the sform is taken",
    "not-3d": "an axis of the image has a single voxel: there is no volume to register",
    "non-finite": "the image holds NaN or infinite values",
    "out-of-range": "the image holds values beyond 1e37, which single precision cannot calculate with",
    "constant": "all voxels of the image have the same value, in single precision",
    "not-hu": "warning: the image is said to be a CT, but holds no value below -200; its window is taken from its percentiles",
    "not-mr": "warning: the image is said to be an MR, but its values look like those of a CT",
    "swapped": "warning: by their names, fixed and moving image are the other way round",
    "spacing": "warning: a spacing that no scanner of people has",
    "shape-mismatch": "the images of a Learn2Reg pair are not of one shape",
    "affine-mismatch": "warning: the headers of a Learn2Reg pair differ; the pair is taken voxel by voxel, as it is scored",
    "no-overlap": "by their headers, fixed and moving image have no point in common, and they are not to be moved",
    "apart": "warning: by their headers, the images have nothing in common; where they belong is found from the images",
    "small-overlap": "warning: by their headers, the moving image covers little of the fixed one",
    "mask-mismatch": "a mask is not on the grid of its image",
    "mask-empty": "a mask selects no voxel",
}

_PLAUSIBLE_SPACING_MM = (0.05, 20.0)
_LARGEST_SHEAR = 1e-3  # cosine between two axes: .2 mm over 200 mm in a field that ITK's NIfTI writer makes right-angled
_LARGEST_VALUE = 1e37  # a tenth of what float32 holds: differences and sums of some values stay finite
_HEADERS_APART = 0.5  # voxels
_SMALL_OVERLAP = 0.25  # of the fixed image
_NUMBER = re.compile(r"_\d{4}_(\d{4})\.nii")  # the modality in a Learn2Reg name


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


def unreadable(error: InputError) -> Problem:
    """What a reader refused, as a problem among others."""
    message, _, fix = str(error).rpartition("; ")
    return Problem(error.code, "error", message or fix, fix if message else "correct the input")


def check_header(path: Path) -> list[Problem]:
    """Check that both places a NIfTI file gives for its voxels are one, if it gives two; other formats give one.

    Args:
        path: a file that was read.
    """
    suffix = image_suffix(path)
    if suffix not in (".nii", ".nii.gz") or path.is_dir():
        return []
    with open_nifti(path, suffix) as (_, header):
        if not (header["sform_code"] > 0 and header["qform_code"] > 0):
            return []
        sform, shape = header.get_sform(), header.get_data_shape()[:3]
        try:
            qform = header.get_qform()
        except (HeaderDataError, ValueError):  # no rotation
            apart = np.inf
        else:
            corners = np.array(list(itertools.product(*((0, n - 1) for n in shape), (1,)))).T
            apart = float(np.abs(np.linalg.solve(sform, qform) @ corners - corners)[:3].max())
    if apart <= _HEADERS_APART:
        return []
    return [Problem("two-headers", "warning", f"{path}: expected its sform and its qform to say the same; got places that are up "
                    f"to {apart:.3g} voxels apart", "the sform is taken: remove the wrong one")]


def check_volume(volume: Volume, name: str, *, kind: str = "", straight: bool = True) -> list[Problem]:
    """Check one image by itself.

    Args:
        volume: the image.
        name: what messages call it: the file.
        kind: what the image is said to be: "CT", "CBCT", "MR" or "". A cone-beam CT may hold any values.
        straight: whether results lie where the header says: then its axes have to be at right angles.
    """
    problems = []
    if min(volume.shape) < 2:
        problems.append(Problem("not-3d", "error", f"{name}: expected a 3D image; got shape {volume.shape}",
                                "give a volume, not a slice"))
    array = volume.array
    bad = array.size - int(np.count_nonzero(np.isfinite(array))) if array.dtype.kind == "f" else 0
    lowest, highest = (0.0, 0.0) if bad else (float(array.min()), float(array.max()))
    span = f"from {lowest:.6g} to {highest:.6g}"
    if bad:
        problems.append(Problem("non-finite", "error", f"{name}: expected finite values; got {bad} NaN or infinite voxels",
                                "replace them with the value of air"))
    elif max(-lowest, highest) > _LARGEST_VALUE:
        problems.append(Problem("out-of-range", "error", f"{name}: expected values of at most {_LARGEST_VALUE:g}; got {span}",
                                "scale them"))
    elif np.float32(lowest) == np.float32(highest):
        problems.append(Problem("constant", "error", f"{name}: expected an image; got the value {array.flat[0]} everywhere",
                                "check how it was exported"))
    elif kind == "CT" and lowest > -200:
        problems.append(Problem("not-hu", "warning", f"{name}: expected a CT in HU, with air below -200; got values {span}",
                                "check rescale slope and intercept, and the modality"))
    elif kind == "MR" and lowest < -500 and array.dtype.kind == "i":
        problems.append(Problem("not-mr", "warning", f"{name}: expected an MR; got values {span}, as of a CT",
                                "check which image is which, and the modality"))
    axes = volume.affine[:3, :3] / volume.spacing
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if straight and cosine > _LARGEST_SHEAR:
        problems.append(Problem("sheared", "error", f"{name}: expected axes at right angles; got two at "
                                f"{np.degrees(np.arccos(min(cosine, 1))):.1f} degrees", "resample the image to a straight grid"))
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


def check_pair(fixed: Volume, moving: Volume, *, same_grid: bool, initial: str = "none") -> list[Problem]:
    """Check two images against each other.

    Args:
        fixed, moving: the images.
        same_grid: the contract is Learn2Reg's: displacements lead from voxel to voxel, whatever the headers say.
        initial: where registration starts: "none" (from the headers), "auto" (from the images, if the headers are far off), or
            "given" (a transform: the headers need not overlap).
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
    if initial == "given":
        return []
    covered, back = _overlap(fixed, moving), _overlap(moving, fixed)
    if max(covered, back) == 0 and initial == "auto":
        return [Problem("apart", "warning", f"the headers let the images lie apart: {grids}",
                        "where they belong is found from the images: look at the picture")]
    if max(covered, back) == 0:
        return [Problem("no-overlap", "error", f"expected images that overlap; got {grids}",
                        "correct the headers, or let the images be aligned (initial transform: auto, or a file)")]
    if covered < _SMALL_OVERLAP:
        return [Problem("small-overlap", "warning", f"the moving image covers {100 * covered:.0f} % of the fixed one",
                        "check the headers if both show the same region")]
    return []


def check_roles(fixed: str, moving: str, given: tuple[str, str], expected: tuple[str, str]) -> list[Problem]:
    """Check that fixed and moving image are not swapped, by what they are called.

    Args:
        fixed, moving: names of the files.
        given: what the images are said to be ("CT", "CBCT", "MR" or ""), by the data set or the user.
        expected: what the preset expects of a fixed and of a moving image.
    """
    names = (Path(fixed).name, Path(moving).name)
    called = (modality(names[0]), modality(names[1]))
    guided = expected == ("CBCT", "CT")  # between MR and CT, either may move
    numbers = [_NUMBER.search(name) for name in names]
    reasons = [
        (_swapped(called, given), f"their names say {' and '.join(called)}, they are given as {' and '.join(given)}"),
        (guided and _swapped(called, expected), "the CT of the plan is usually what moves"),
        (guided and _swapped(given, expected), "the CT of the plan is usually what moves"),
        (guided and not any(given) and [number[1] for number in numbers if number] in (["0000", "0001"], ["0000", "0002"]),
         "in OncoReg and ThoraxCBCT, _0000 is the CT and moves"),
        (all(re.search(rf"(?i)(?<![a-z]){word}(?![a-z])", name) for word, name in zip(("moving", "fixed"), names, strict=True)),
         "their names say the opposite"),
    ]
    return [Problem("swapped", "warning", f"{names[0]} is fixed and {names[1]} moves: {reason}",
                    "swap them if that is not what is wanted") for holds, reason in reasons if holds][:1]


def _swapped(kinds: tuple[str, str], expected: tuple[str, str]) -> bool:
    return all(kinds) and kinds[0] != kinds[1] and kinds == expected[::-1]


def raise_errors(problems: Sequence[Problem]) -> list[str]:
    """Raise all errors as one InputError; return the warnings as text."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise InputError(" | ".join(map(str, errors)), errors[0].code)
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
