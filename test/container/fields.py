"""Compare displacement fields with expected ones, and fail where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import SimpleITK

STEP = 3  # every third voxel is kept: the fields are smooth over several voxels, a fault in one place shows in its neighbours
QUANTUM = 1 / 256  # voxels; int16 then reaches 128 voxels
# Another order of summation (threads, processor, release of torch) changes the rounding, and iterations amplify it. One and two
# threads differ by less than the quantum; single voxels were seen to move by 0.2 in solvers of this kind. A real fault is far
# outside: with the field's sign wrong, two axes exchanged or the grid off by half a voxel, the mean is 0.4 voxel or more.
MEAN_TOLERANCE = 0.02
MAX_TOLERANCE = 0.2

Field = npt.NDArray[np.float32]


def load_field(path: Path) -> Field:
    """The (3, x, y, z) displacement in voxels of a Learn2Reg NIfTI or of a scalar 4-D .mha; ValueError for any other file."""
    if path.suffix == ".mha":
        image = SimpleITK.ReadImage(str(path))
        array = SimpleITK.GetArrayFromImage(image).transpose(3, 2, 1, 0) if image.GetNumberOfComponentsPerPixel() == 1 else None
        if array is None or array.ndim != 4:
            raise ValueError(f"{path}: not a scalar 4-D image")
    else:
        array = np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.float32:
        raise ValueError(f"{path}: shape {array.shape}, type {array.dtype}; expected (X, Y, Z, 3) float32")
    return np.moveaxis(array, 3, 0)


def save_expected(path: Path, disp: Field) -> None:
    """Keep every ``STEP``-th voxel of a field, in ``QUANTUM``."""
    kept = np.rint(disp[:, ::STEP, ::STEP, ::STEP] / QUANTUM).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, disp=kept, shape=np.asarray(disp.shape))


def compare(disp: Field, expected: Path) -> tuple[list[str], dict[str, float]]:
    """What is wrong with a field, in words (nothing, if it is as expected), and by how many voxels it differs."""
    with np.load(expected) as stored:
        kept, shape = stored["disp"], tuple(stored["shape"])
    if disp.shape != shape:
        return [f"the field has shape {disp.shape}, {expected.name} {shape}"], {}
    return difference(disp[:, ::STEP, ::STEP, ::STEP], kept.astype(np.float32) * np.float32(QUANTUM), expected.name)


def difference(disp: Field, other: Field, name: str) -> tuple[list[str], dict[str, float]]:
    """The same for two arrays of one shape."""
    if not np.isfinite(disp).all():
        return ["the field holds values that are not finite"], {}
    distance = np.sqrt(np.sum((disp.astype(np.float64) - other) ** 2, axis=0))
    found: dict[str, Any] = {"mean": float(distance.mean()), "max": float(distance.max())}
    problems = [f"the field differs from {name} by {found[kind]:.4f} voxels ({kind}); allowed is {bound}"
                for kind, bound in (("mean", MEAN_TOLERANCE), ("max", MAX_TOLERANCE)) if not found[kind] <= bound]
    return problems, found
