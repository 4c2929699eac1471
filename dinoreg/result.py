"""What a registration gives: the displacement field of a pair, and what can be done with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dinoreg.convert import Image, like, to_volume
from dinoreg.errors import ConfigError, InputError
from dinoreg.io import write_disp_nifti, write_volume
from dinoreg.metrics import jacobian_determinant
from dinoreg.preprocess import within
from dinoreg.slabs import slabs
from dinoreg.transforms import invert, write_composite, write_field_mm
from dinoreg.volume import Volume

OF_MOVING = ("warped.nii.gz", "inverse.nii.gz", "inverse_residual.nii.gz")  # what needs the moving image
CONFIDENCE = "confidence.nii.gz"  # written when it is asked for
FILES = ("displacement.nii.gz", "transform.h5", "disp_voxels.nii.gz", "jacobian.nii.gz", *OF_MOVING)  # of ``Registration.save``


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
        colours: what the encoder saw: (2, i', j', k', 3) uint8, the first three principal components of the tokens as colours, of
            the fixed and of the warped moving image, on a lattice over the fixed image; None unless asked for.
    """

    disp: npt.NDArray[np.float32]
    fixed_affine: npt.NDArray[np.float64]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    initial: npt.NDArray[np.float64] = field(default_factory=lambda: np.eye(4))
    confidence: npt.NDArray[np.float32] | None = None
    colours: npt.NDArray[np.uint8] | None = None

    @overload
    def warp(self, image: Volume, order: int = 1) -> Volume: ...

    @overload
    def warp(self, image: Image, order: int = 1) -> Any: ...

    def warp(self, image: Image, order: int = 1) -> Any:
        """An image of the moving image's space on the fixed grid.

        Args:
            image: of any kind that :func:`dinoreg.convert.to_volume` takes, on any grid: its header says where it lies.
            order: 1 linear, 0 nearest neighbour (labels). The type of the values is kept.

        Returns:
            The image on the fixed grid, of the kind that was given (a ``Volume`` for a path); 0 (or the smallest value, for
            images with negative values) where the given one has nothing.

        Raises:
            InputError: if the image is none, or cannot be read.
        """
        volume = to_volume(image)
        fill = min(0.0, float(volume.array.min())) if order else 0
        source = volume.array.astype(np.float32) if order and volume.array.dtype == bool else volume.array
        warped = np.empty(self.disp.shape[1:], dtype=volume.array.dtype)
        for slab, where in self._where(volume):
            values = ndimage.map_coordinates(source, where, output=np.float64 if order else None, order=order, mode="nearest")
            for at, n in zip(where, volume.shape, strict=True):
                values[~within(at, n)] = fill
            warped[slab] = np.rint(values) if order and np.issubdtype(warped.dtype, np.integer) else values
        return like(image, Volume(warped, self.fixed_affine))

    def _where(self, volume: Volume) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """For each slab of the fixed grid, the voxel coordinates (3, i, j, k) in a volume from which its voxels are taken."""
        matrix, shape = np.linalg.solve(volume.affine, self.fixed_affine), self.disp.shape[1:]
        for slab in slabs((shape[0], shape[1], shape[2])):
            points = self.disp[:, slab].astype(np.float64)  # on the fixed grid, voxels
            for axis, index in enumerate(np.ogrid[slab, : shape[1], : shape[2]]):
                points[axis] += index
            yield slab, np.einsum("ab,bijk->aijk", matrix[:3, :3], points) + matrix[:3, 3, None, None, None]

    @overload
    def warp_labels(self, labels: Volume) -> Volume: ...

    @overload
    def warp_labels(self, labels: Image) -> Any: ...

    def warp_labels(self, labels: Image) -> Any:
        """A label map of the moving image's space on the fixed grid, with smoother borders than ``warp(labels, order=0)``.

        Each voxel takes the label with the largest share of the eight voxels around its place, weighted as for linear
        interpolation (of two equal ones, the smaller); 0 where the label map has nothing.

        Args:
            labels: as for :meth:`warp`.

        Returns:
            As for :meth:`warp`; the type of the values is kept.

        Raises:
            InputError: if it is none, or cannot be read.
        """
        volume = to_volume(labels)
        found = np.zeros(self.disp.shape[1:], dtype=volume.array.dtype)
        for slab, where in self._where(volume):
            lower = np.floor(where)
            share = [(lower + 1 - where), (where - lower)]  # of the lower and the upper neighbour along each axis
            corners, weights = [], []
            for corner in itertools.product((0, 1), repeat=3):
                index = tuple((lower[axis] + step).clip(0, n - 1).astype(np.intp)
                              for axis, (step, n) in enumerate(zip(corner, volume.shape, strict=True)))
                corners.append(volume.array[index])
                weights.append(share[corner[0]][0] * share[corner[1]][1] * share[corner[2]][2])
            best = np.zeros(where.shape[1:])
            for label in corners:
                total = sum((weight * (other == label) for weight, other in zip(weights, corners, strict=True)), np.zeros(()))
                better = (total > best) | ((total == best) & (label < found[slab]))
                best, found[slab] = np.where(better, total, best), np.where(better, label, found[slab])
            for at, n in zip(where, volume.shape, strict=True):
                found[slab][~within(at, n)] = 0
        return like(labels, Volume(found, self.fixed_affine))

    def map_points(self, points_ras_mm: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points of the fixed image to where the same anatomy lies in the moving image.

        Args:
            points_ras_mm: (n, 3), RAS mm. Beyond the fixed grid the displacement is that of its border.

        Returns:
            (n, 3), RAS mm.

        Raises:
            InputError: if they are not (n, 3) finite numbers.
        """
        points = np.asarray(points_ras_mm, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
            raise InputError(f"expected points as (n, 3) finite numbers, RAS mm; got shape {points.shape}")
        to_voxels = np.linalg.inv(self.fixed_affine)
        at = to_voxels[:3, :3] @ points.T + to_voxels[:3, 3:]  # (3, n)
        at = at + np.stack([ndimage.map_coordinates(component, at, order=1, mode="nearest") for component in self.disp])
        return np.asarray((self.fixed_affine[:3, :3] @ at + self.fixed_affine[:3, 3:]).T)

    def jacobian(self) -> Volume:
        """Change of volume, the determinant of the transform's derivative: above 1 where tissue is larger in the moving image, 0
        and below where the field folds. float32, on the fixed grid."""
        return Volume(jacobian_determinant(self.disp).astype(np.float32), self.fixed_affine)

    def inverse(self, moving: Image) -> Registration:
        """The way back: from points of the moving image to the fixed image.

        Args:
            moving: any image (or its path) on the grid on which the inverse is wanted, such as the moving image itself.

        Returns:
            The inverse as a result of its own, with the moving image's grid as its fixed grid: ``warp`` brings images of the
            fixed image's space onto it, ``map_points`` points of the moving image to the fixed one. ``info`` holds "residual_mm",
            (i, j, k) float32: how far from each voxel the way there and back ends.
        """
        grid = to_volume(moving)
        disp, residual = invert(self.disp, self.fixed_affine, grid)
        return Registration(disp, grid.affine, info={"residual_mm": residual},
                            initial=np.asarray(np.linalg.inv(self.initial), dtype=np.float64))

    def save(self, folder: str | Path, moving: Image | None = None, *, warped: Volume | None = None,
             confidence: bool = False) -> list[Path]:
        """Write everything that there is into a folder, under the names of ``FILES``.

        Args:
            folder: is made if it is missing; files of these names are replaced.
            moving: the moving image; without it, neither the warped image nor the inverse is written.
            warped: what ``warp(moving)`` gave, if that is at hand.
            confidence: also write the confidence, as ``CONFIDENCE``.

        Returns:
            The files.

        Raises:
            ConfigError: the confidence is asked for, but the solver "published" gives none.
            OutputError: if one cannot be written.
            RegistrationError: if the field holds values that are not finite.
        """
        folder = Path(folder)
        paths = {name: folder / name for name in FILES}
        extra = []
        if confidence:
            if self.confidence is None:
                raise ConfigError("the solver 'published' gives no confidence; take another preset, or do not ask for it")
            extra.append(folder / CONFIDENCE)
            write_volume(extra[0], Volume(self.confidence, self.fixed_affine))
        write_disp_nifti(paths["disp_voxels.nii.gz"], self.disp, self.fixed_affine)
        write_field_mm(paths["displacement.nii.gz"], self.disp, self.fixed_affine)
        write_composite(paths["transform.h5"], self.disp, self.fixed_affine, self.initial)
        write_volume(paths["jacobian.nii.gz"], self.jacobian())
        if moving is None:
            return [*(paths[name] for name in FILES if name not in OF_MOVING), *extra]
        volume = to_volume(moving)
        write_volume(paths["warped.nii.gz"], warped or self.warp(volume))
        back = self.inverse(volume)
        write_field_mm(paths["inverse.nii.gz"], back.disp, back.fixed_affine)
        write_volume(paths["inverse_residual.nii.gz"], Volume(back.info["residual_mm"], back.fixed_affine))
        return [*paths.values(), *extra]
