"""A 3D image and where it lies in the patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinoreg.errors import InputError

AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))  # negative and positive direction of each RAS axis


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D array with its voxel-to-patient transform.

    Attributes:
        array: values, shape (i, j, k) in the order of the file's voxels (as nibabel gives them).
        affine: float64 4x4, voxel index (i, j, k, 1) -> RAS millimetres. Voxel centres lie at integer indices.
    """

    array: npt.NDArray[np.generic]
    affine: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if self.array.ndim != 3:
            raise InputError(f"a volume has 3 dimensions; got an array of shape {self.array.shape}")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise InputError(f"a volume needs a finite, invertible 4x4 affine; got {affine.tolist()}")
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along (i, j, k)."""
        i, j, k = self.array.shape
        return i, j, k

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in millimetres between voxel centres along (i, j, k)."""
        si, sj, sk = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(si), float(sj), float(sk)

    @property
    def orientation(self) -> str:
        """The patient direction in which each array axis mainly points, such as ``"RAS"`` or ``"LPS"``."""
        return "".join(AXIS_CODES[row][int(sign > 0)] for row, sign in _main_directions(self.affine))

    @property
    def axial_axis(self) -> int:
        """The array axis that runs mainly along the patient's inferior-superior direction."""
        return next(axis for axis, (row, _) in enumerate(_main_directions(self.affine)) if row == 2)

    def same_grid(self, other: Volume, tolerance_vox: float = 1e-3) -> bool:
        """Whether voxel (i, j, k) of both volumes is the same point, to a fraction of a voxel at every corner."""
        if self.shape != other.shape:
            return False
        corners = np.array([[i, j, k, 1.0] for i in (0, self.shape[0] - 1) for j in (0, self.shape[1] - 1)
                            for k in (0, self.shape[2] - 1)])
        mapped = corners @ np.linalg.solve(self.affine, other.affine).T
        return bool(np.abs(mapped - corners).max() <= tolerance_vox)


def _main_directions(affine: npt.NDArray[np.float64]) -> list[tuple[int, float]]:
    """For each array axis the RAS axis it follows most closely and the sign; each RAS axis is taken once."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    result: dict[int, tuple[int, float]] = {}
    remaining = np.abs(cosines)
    for _ in range(3):
        row, column = (int(n) for n in np.unravel_index(np.argmax(remaining), (3, 3)))
        result[column] = (row, float(cosines[row, column]))
        remaining[row, :] = -1.0
        remaining[:, column] = -1.0
    return [result[axis] for axis in range(3)]
