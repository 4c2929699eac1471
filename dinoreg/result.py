"""What a registration gives: the displacement field of a pair, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dinoreg.grid import Shape, identity
from dinoreg.preprocess import within
from dinoreg.volume import Volume


@dataclass(frozen=True, eq=False)
class Registration:
    """The result for a pair.

    Attributes:
        disp: (3, i, j, k) float32, voxels of the fixed grid, component c along array axis c: warped(x) = moving(x + disp(x)),
            where the moving image is meant on the fixed grid (through both headers, if their grids differ).
        fixed_affine: of the grid, voxel -> RAS mm.
        stages: seconds and the process's peak memory (MB) at the end of each stage.
        warnings: what a user should know before trusting the field.
        info: features, encoder and its weights, device, loss before and after each level.
        initial: the affine start, float64 4x4, RAS mm, fixed point -> moving point; ``disp`` contains it. The identity if there
            was none.
        confidence: (i, j, k) float32 in [0, 1], how clear the match was in the discrete stage: 0 where another place would have
            done as well; None where there is none (solver "published").
        colours: what DINOv2 saw: (2, i', j', k', 3) uint8, the first three principal components of the tokens as colours, of the
            fixed and of the warped moving image, on a lattice over the fixed image; None unless asked for.
    """

    disp: npt.NDArray[np.float32]
    fixed_affine: npt.NDArray[np.float64]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    initial: npt.NDArray[np.float64] = field(default_factory=lambda: np.eye(4))
    confidence: npt.NDArray[np.float32] | None = None
    colours: npt.NDArray[np.uint8] | None = None

    def warp(self, volume: Volume, order: int = 1) -> Volume:
        """A volume of the moving image's space on the fixed grid.

        Args:
            volume: on any grid: its header says where it lies.
            order: 1 linear, 0 nearest neighbour (labels). The type of the array is kept.

        Returns:
            The volume on the fixed grid; 0 (or the smallest value, for images with negative values) where it has none.
        """
        shape: Shape = (self.disp.shape[1], self.disp.shape[2], self.disp.shape[3])
        points = identity(shape).numpy() + self.disp  # on the fixed grid, voxels
        matrix = np.linalg.solve(volume.affine, self.fixed_affine)
        where = np.einsum("ab,bijk->aijk", matrix[:3, :3], points.astype(np.float64)) + matrix[:3, 3, None, None, None]
        fill = min(0.0, float(volume.array.min())) if order else 0
        dtype = volume.array.dtype
        source = volume.array.astype(np.float32) if order else volume.array
        warped = ndimage.map_coordinates(source, where, order=order, mode="nearest")
        for at, n in zip(where, volume.shape, strict=True):
            warped[~within(at, n)] = fill
        if order and np.issubdtype(dtype, np.integer):
            warped = np.rint(warped)
        return Volume(warped.astype(dtype), self.fixed_affine)
