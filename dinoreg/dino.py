"""From the tokens of two volumes to features on the solver's lattice.

Tokens are projected first (1024 channels become 24) and interpolated after: the same values as the other way round, since both
are linear, for 1/43 of the memory. Interpolation is separable, one small matrix an axis, and goes straight to the lattice; the
features never exist at the resolution of the volume.

Only foreground tokens count. Between foreground and background the features are those of the foreground alone, and a weight
says how much foreground there is: ``features * weight`` is what interpolating zero-filled features would give (the published
form), ``features`` with ``weight`` as a mask has no artificial edge.

Cost for a grid of s x h x w tokens of C channels, c components and m cells: 2 s h w C c for the projection and at most
2 c m (s + h + w) for the interpolation; memory 4 c (s h w + m) bytes a volume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from dinoreg.config import PcaConfig
from dinoreg.grid import Shape, apply_axes, linear_weights, resize_disp, warp
from dinoreg.pca import Basis, fit_basis, project, token_moments
from dinoreg.slices import TokenGeometry, TokenGrid


@dataclass(frozen=True, eq=False)
class LatticeFeatures:
    """Features of one volume on a lattice.

    Attributes:
        values: (c, i, j, k) float32, the mean of the foreground features in each cell; zero where there is no foreground.
        weight: (i, j, k) float32 in [0, 1], the share of foreground in each cell.
    """

    values: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class ProjectedGrid:
    """Projected tokens of one volume; ``features`` (slices, h, w, c) float32 and ``foreground`` (slices, h, w) bool."""

    features: Tensor
    foreground: Tensor
    geometry: TokenGeometry

    def sample(self, lattice: Shape) -> LatticeFeatures:
        """Features on a lattice that covers the whole volume.

        Cell a of m over an axis of n voxels has its centre at voxel (a + 1/2) n / m - 1/2. Within a cell the linear
        interpolation of the tokens is averaged over points at most one voxel apart (a single point, the centre, where cells
        are not larger than voxels), which keeps lattices coarser than the tokens free of aliasing and reproduces linear
        functions exactly. Within the extent of the tokens the outermost ones are replicated; beyond it the weight is zero.

        Args:
            lattice: cells along (i, j, k).
        """
        geometry = self.geometry
        lines = zip(geometry.positions, geometry.extent, geometry.shape, lattice, strict=True)
        matrices = [_lattice_matrix(*line) for line in lines]
        order = [geometry.axes.index(axis) for axis in range(3)]
        weight = self.foreground.to(self.features)
        stacked = torch.cat([self.features * weight[..., None], weight[..., None]], dim=-1)
        summed = apply_axes(stacked.permute(3, *order), matrices)  # (c + 1, i, j, k)
        values, weight = summed[:-1], summed[-1]
        return LatticeFeatures(torch.where(weight > 1e-6, values / weight.clamp_min(1e-6), 0.0), weight.clamp(0, 1))


@dataclass(frozen=True, eq=False)
class ProjectedPair:
    """Both volumes of a pair in one basis."""

    basis: Basis
    fixed: ProjectedGrid
    moving: ProjectedGrid

    def sample(self, lattice: Shape) -> tuple[LatticeFeatures, LatticeFeatures]:
        """Features of the fixed and of the moving volume on a lattice of cells (i, j, k); see ``ProjectedGrid.sample``."""
        return self.fixed.sample(lattice), self.moving.sample(lattice)

    def colours(self, lattice: Shape, disp: Tensor) -> npt.NDArray[np.uint8]:
        """What the encoder saw, for people: the first three components as red, green and blue, on one scale for both volumes.

        Args:
            lattice: cells along (i, j, k).
            disp: (3, i, j, k) on any lattice over the volumes, in its cells: the moving volume is pulled back by it.

        Returns:
            (2, *lattice, 3), fixed and moving; black where there is no foreground.
        """
        leading = (replace(grid, features=grid.features[..., :3]).sample(lattice) for grid in (self.fixed, self.moving))
        fixed, moving = (pad(torch.cat([found.values, found.weight[None]]), (0,) * 6 + (3 - len(found.values), 0))
                         for found in leading)  # (4, i, j, k); red is missing first where there are fewer than three components
        both = torch.stack([fixed, warp(moving, resize_disp(disp, lattice))]).cpu().numpy()
        values, weight = both[:, :3], both[:, 3:]
        inside = values.swapaxes(0, 1)[:, weight[:, 0] > 0.5]  # (3, n)
        low, high = np.percentile(inside, (2, 98), axis=1)[:, None, :, None, None, None] if inside.size else (0.0, 1.0)
        unit = ((values - low) / np.maximum(high - low, 1e-6)).clip(0, 1) * weight
        return np.asarray(np.rint(255 * np.moveaxis(unit, 1, -1)), dtype=np.uint8)


def pair_features(fixed: TokenGrid, moving: TokenGrid, config: PcaConfig, device: torch.device | str = "cpu") -> ProjectedPair:
    """Joint PCA of the foreground tokens of both volumes, and both volumes projected.

    Args:
        fixed: tokens of the fixed volume.
        moving: tokens of the moving volume, from the same encoder.
        config: number of components, and whether the mean token is subtracted.
        device: where products are computed and where the result lies.

    Raises:
        RegistrationError: when the foreground tokens are too few or all the same.
    """
    moments = token_moments(fixed.tokens, fixed.foreground, device) + token_moments(moving.tokens, moving.foreground, device)
    basis = fit_basis(moments, config.components)
    first, second = (ProjectedGrid(project(grid.tokens, grid.foreground, basis, config.center, device),
                                   grid.foreground.to(device), grid.geometry) for grid in (fixed, moving))
    return ProjectedPair(basis, first, second)


def _lattice_matrix(positions: npt.NDArray[np.float64], extent: tuple[float, float], voxels: int, cells: int) -> Tensor:
    """(cells, tokens) weights along one axis: the mean over each cell of the linear interpolation between token positions."""
    points = math.ceil(voxels / cells)  # a cell
    at = (np.arange(cells * points) + 0.5) * (voxels / (cells * points)) - 0.5  # voxel coordinates
    ascending = np.argsort(positions)  # positions are monotonic: this is their order, or its reverse
    matrix = linear_weights(torch.from_numpy(np.interp(at, positions[ascending], ascending)), len(positions))
    matrix[torch.from_numpy((at < extent[0]) | (at > extent[1]))] = 0
    return matrix.reshape(cells, points, -1).mean(1)
