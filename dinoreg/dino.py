"""From the tokens of two volumes to features on the solver's lattice.

Tokens are projected first (1024 channels become 24) and interpolated after: the same values as the other way round, since both
are linear, for 1/43 of the memory. Interpolation is separable, one small matrix an axis, and goes straight to the lattice; the
features never exist at the resolution of the volume.

Tokens know where they lie on the grid of the volume that was encoded. A volume of another grid than the lattice's (a moving
image) is placed by a matrix from the voxels of the one to those of the other.

Only foreground tokens count. Between foreground and background the features are those of the foreground alone, and a weight
says how much foreground there is: ``features * weight`` is what interpolating zero-filled features would give (the published
form), ``features`` with ``weight`` as a mask has no artificial edge.

Cost for a grid of s x h x w tokens of C channels, c components and m cells: 2 s h w C c for the projection and at most
2 c m (s + h + w) for the interpolation; memory 4 c (s h w + m) bytes a volume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from dinoreg.config import PcaConfig
from dinoreg.encoding import EncodedVolume
from dinoreg.grid import Shape, apply_axes, linear_weights, resize_disp, warp
from dinoreg.pca import Basis, fit_basis
from dinoreg.slices import TokenGeometry
from dinoreg.volume import Volume


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
class Placement:
    """Where a volume lies on another grid.

    Attributes:
        matrix: 4x4, voxel of the other grid -> voxel of the volume.
        shape: voxels (i, j, k) of the other grid.
    """

    matrix: npt.NDArray[np.float64]
    shape: Shape


@dataclass(frozen=True, eq=False)
class ProjectedGrid:
    """Projected tokens of one volume; ``features`` (slices, h, w, c) float32 and ``foreground`` (slices, h, w) bool.

    ``placed`` says on which grid they are wanted; None: on that of the volume itself.
    """

    features: Tensor
    foreground: Tensor
    geometry: TokenGeometry
    placed: Placement | None = None

    def sample(self, lattice: Shape) -> LatticeFeatures:
        """Features on a lattice that covers the whole volume, or the whole grid on which it is placed.

        Cell a of m over an axis of n voxels has its centre at voxel (a + 1/2) n / m - 1/2. Within a cell the linear
        interpolation of the tokens is averaged over points (a single one, the centre, where cells are small), which keeps
        lattices coarser than the tokens free of aliasing and reproduces linear functions exactly. Within the extent of the tokens
        the outermost ones are replicated; beyond it the weight is zero.

        Args:
            lattice: cells along (i, j, k).
        """
        geometry = self.geometry
        order = [geometry.axes.index(axis) for axis in range(3)]
        weight = self.foreground.to(self.features)
        stacked = torch.cat([self.features * weight[..., None], weight[..., None]], dim=-1).permute(3, *order)  # (c + 1, i, j, k)
        if self.placed is None:
            lines = zip(geometry.positions, geometry.extent, geometry.shape, lattice, strict=True)
            summed = apply_axes(stacked, [_lattice_matrix(*line) for line in lines])
        else:
            summed = _gathered(stacked, geometry, self.placed, lattice)
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


def pair_features(fixed: EncodedVolume, moving: EncodedVolume, config: PcaConfig, device: torch.device | str = "cpu", *,
                  basis: Basis | None = None, placed: tuple[Placement | None, Placement | None] = (None, None)) -> ProjectedPair:
    """Both volumes projected: on the joint principal components of their foreground tokens, or on given ones.

    Args:
        fixed, moving: from the same encoder; with moments, or in the given basis already.
        config: number of components, and whether the mean token is subtracted.
        device: where products are computed and where the result lies.
        basis: in which both volumes are.
        placed: of each volume on the grid where features are wanted, see :func:`placement`.

    Raises:
        RegistrationError: when the foreground tokens are too few or all the same.
    """
    if basis is None:
        assert fixed.moments is not None and moving.moments is not None
        basis = fit_basis(fixed.moments + moving.moments, config.components)
        fixed, moving = (one.project(basis, config.center, device) for one in (fixed, moving))
    first, second = (ProjectedGrid(one.grid.tokens.to(device), one.grid.foreground.to(device), one.grid.geometry, where)
                     for one, where in zip((fixed, moving), placed, strict=True))
    return ProjectedPair(basis, first, second)


def placement(volume: Volume, grid: Volume) -> Placement | None:
    """Where a volume lies on another grid, by both headers; None if that is its own."""
    matrix = np.asarray(np.linalg.solve(volume.affine, grid.affine), dtype=np.float64)
    return None if volume.same_grid(grid) else Placement(matrix, grid.shape)


def _gathered(tokens: Tensor, geometry: TokenGeometry, placed: Placement, lattice: Shape) -> Tensor:
    """Means over the cells of a lattice of another grid of tokens (c, i, j, k) in the order of the volume's axes: (c, *lattice).

    The points of a cell are no farther apart than tokens along any axis.
    """
    def along(line: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
        return line.reshape([-1 if axis == n else 1 for n in range(3)])

    matrix, cells = placed.matrix, [n / m for n, m in zip(placed.shape, lattice, strict=True)]  # voxels of the other grid a cell
    apart = [np.abs(np.diff(at)).min() if len(at) > 1 else np.inf for at in geometry.positions]  # voxels of the volume
    points = [max(1, math.ceil(max(abs(matrix[a, axis]) * cells[axis] / apart[a] for a in range(3)) - 1e-6)) for axis in range(3)]
    total: Tensor = tokens.new_zeros((len(tokens), *lattice))
    for part in np.ndindex(*points):
        lines = [(np.arange(m) + (number + 0.5) / n) * cell - 0.5
                 for m, number, n, cell in zip(lattice, part, points, cells, strict=True)]  # voxels of the other grid
        inside = np.ones(lattice, dtype=bool)
        disp = np.empty((3, *lattice), dtype=np.float32)
        for a, (positions, (low, high), m) in enumerate(zip(geometry.positions, geometry.extent, lattice, strict=True)):
            at = matrix[a, 3] + sum(matrix[a, axis] * along(line, axis) for axis, line in enumerate(lines))  # its voxels
            inside &= (at >= low) & (at <= high)
            ascending = np.argsort(positions)
            index = np.interp(at, positions[ascending], ascending)
            disp[a] = (index + 0.5) * (m / len(positions)) - 0.5 - along(np.arange(m), a)  # in cells, as ``warp`` wants it
        total = total + warp(tokens, torch.from_numpy(disp).to(tokens)) * torch.from_numpy(inside).to(tokens)
    mean: Tensor = total / math.prod(points)
    return mean


def _lattice_matrix(positions: npt.NDArray[np.float64], extent: tuple[float, float], voxels: int, cells: int) -> Tensor:
    """(cells, tokens) weights along one axis: the mean over each cell of the linear interpolation between token positions."""
    points = math.ceil(voxels / cells)  # a cell
    at = (np.arange(cells * points) + 0.5) * (voxels / (cells * points)) - 0.5  # voxel coordinates
    ascending = np.argsort(positions)  # positions are monotonic: this is their order, or its reverse
    matrix = linear_weights(torch.from_numpy(np.interp(at, positions[ascending], ascending)), len(positions))
    matrix[torch.from_numpy((at < extent[0]) | (at > extent[1]))] = 0
    return matrix.reshape(cells, points, -1).mean(1)
