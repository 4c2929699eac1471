"""An affine start of a registration: checked, given to the solver through the moving image's header, and folded into the field.

An initial transform is a 4x4 matrix A in RAS mm that leads from a point of the fixed image to one of the moving image. The solver
sees the moving image as if A had been undone (its affine becomes A^-1 @ affine), finds u, and the total is T(p) = A(p + u(p)).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinoreg.errors import InputError
from dinoreg.slabs import slabs
from dinoreg.volume import Volume

Matrix = npt.NDArray[np.float64]

LARGEST_CHANGE = 100.0  # of volume, either way: more is a mistake in the units


def checked(matrix: npt.ArrayLike) -> Matrix:
    """An initial transform as float64 4x4.

    Raises:
        InputError: not a finite 4x4 matrix with last row (0, 0, 0, 1), or one that mirrors or flattens.
    """
    try:
        values = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"initial transform: expected a 4x4 matrix of numbers; got {str(matrix)[:80]!r}; give a matrix in RAS "
                         "mm, fixed to moving") from error
    if values.shape != (4, 4) or not np.isfinite(values).all() or not np.allclose(values[3], (0, 0, 0, 1), rtol=0, atol=1e-9):
        raise InputError(f"initial transform: expected a finite 4x4 matrix with last row 0 0 0 1; got {values.tolist()}; give a "
                         "matrix in RAS mm, fixed to moving")
    change = float(np.linalg.det(values[:3, :3]))
    if not 1 / LARGEST_CHANGE <= change <= LARGEST_CHANGE:
        raise InputError("initial transform: expected one that keeps left and right and changes volumes by a factor of less "
                         f"than {LARGEST_CHANGE:g}; got a determinant of {change:.3g}; check signs and units (RAS mm)")
    return values


def undone(volume: Volume, matrix: Matrix) -> Volume:
    """A volume of the moving image's space where the fixed image expects it if ``matrix`` leads from fixed to moving: only the
    header changes."""
    return Volume(volume.array, np.asarray(np.linalg.solve(matrix, volume.affine), dtype=np.float64))


def folded(disp: npt.NDArray[np.float32], matrix: Matrix, affine: Matrix) -> npt.NDArray[np.float32]:
    """The total of an initial transform and the field that was found after it: T(p) = A(p + u(p)).

    Args:
        disp: (3, i, j, k) float32, voxels of the fixed grid: u.
        matrix: A, 4x4, RAS mm, fixed -> moving.
        affine: of the fixed grid, voxel -> RAS mm.

    Returns:
        (3, i, j, k) float32 in voxels of the fixed grid; ``disp`` itself, to the bit, for the identity.
    """
    if np.array_equal(matrix, np.eye(4)):
        return disp
    voxels = np.linalg.solve(affine, matrix @ affine)  # A in voxels of the fixed grid
    total = np.empty_like(disp)
    for slab in slabs(disp.shape[1:]):
        index = np.ogrid[slab, : disp.shape[2], : disp.shape[3]]
        for axis in range(3):  # M (x + d) - x, in double precision
            row = voxels[axis, 3] + sum((voxels[axis, c] - (c == axis)) * index[c] for c in range(3))
            for c in range(3):
                row = row + voxels[axis, c] * disp[c, slab]
            total[axis, slab] = row
    return total
