"""Transforms as files that other programs read: ITK displacement fields in millimetres, ITK transforms, matrices.

Inside, points are RAS millimetres and a transform leads from a point of the fixed image to the same anatomy in the moving one.
ITK's files hold LPS; they are converted here and nowhere else. A transform on a grid is ``disp`` as everywhere (3, i, j, k):
voxels of the fixed grid, so that ``T(p) = F (F^-1 p + disp)`` with the grid's affine F.
"""

from __future__ import annotations

import subprocess
import sys
import zlib
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage
from scipy.io import loadmat

from dinoreg.errors import DinoRegError, InputError, OutputError
from dinoreg.io import (
    LPS_FROM_RAS,
    MAX_BYTES,
    atomic_write,
    image_suffix,
    itk_reader,
    set_header,
    whole_itk_image,
    write_vectors_nifti,
)
from dinoreg.itkfile import check_whole, voxel_place
from dinoreg.slabs import slabs
from dinoreg.volume import Volume

Disp = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]

TRANSFORM_SUFFIXES = (".tfm", ".txt", ".mat", ".h5", ".hdf5", ".xfm")
HDF5_SUFFIXES = (".h5", ".hdf5")
HDF5_SECONDS, HDF5_RATE = 10.0, 2e7  # to start, and bytes a second to read: what any machine manages
FIELD_SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")
MAX_FIELD_BYTES = 3 * MAX_BYTES


@dataclass(frozen=True, eq=False)
class Transform:
    """A transform from fixed to moving points.

    Attributes:
        itk: the same as ITK has it, in LPS mm.
    """

    itk: sitk.Transform

    def points(self, points: npt.ArrayLike) -> Matrix:
        """Points (n, 3) of the fixed image in RAS mm to the moving image, RAS mm. A field does not move what lies outside it."""
        flip = np.array([-1.0, -1.0, 1.0])
        moved = [self.itk.TransformPoint(point) for point in (np.asarray(points, dtype=np.float64) * flip).tolist()]
        return np.asarray(np.array(moved, dtype=np.float64).reshape(-1, 3) * flip)

    def points_back(self, points: npt.ArrayLike, tolerance_mm: float = 1e-3) -> Matrix:
        """Points (n, 3) of the moving image in RAS mm to the fixed image, by Newton's method; NaN where that finds none."""
        target = np.asarray(points, dtype=np.float64).reshape(-1, 3)
        found, step = target.copy(), 0.1  # mm, for the derivative
        for _ in range(50):
            error = self.points(found) - target
            if not target.size or np.abs(error).max() < tolerance_mm:
                break
            columns = [(self.points(found + offset) - self.points(found - offset)) / (2 * step) for offset in np.eye(3) * step]
            found -= np.einsum("nab,nb->na", np.linalg.pinv(np.stack(columns, axis=2)), error)
        found[np.abs(self.points(found) - target).max(1, initial=0) >= tolerance_mm] = np.nan
        return found

    def matrix(self) -> Matrix:
        """The transform as a 4x4 matrix, RAS mm, fixed -> moving.

        Raises:
            InputError: if it is no affine one.
        """
        if not self.itk.IsLinear():
            raise InputError("expected an affine (or rigid, or Euler) transform; got one that bends; give its affine part alone")
        corners = np.vstack([np.zeros(3), np.eye(3)])
        origin, *axes = self.points(corners)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack(axes, axis=1) - origin[:, None]
        matrix[:3, 3] = origin
        return matrix

    def field_on(self, grid: Volume) -> Disp:
        """The transform as ``disp`` (3, i, j, k) float32 in voxels of a grid."""
        reference = sitk.GetImageFromArray(np.zeros(grid.shape[::-1], dtype=np.uint8))
        set_header(reference, grid.affine)
        field = sitk.TransformToDisplacementField(self.itk, sitk.sitkVectorFloat64, reference.GetSize(), reference.GetOrigin(),
                                                  reference.GetSpacing(), reference.GetDirection())
        lps = sitk.GetArrayViewFromImage(field).transpose(3, 2, 1, 0)  # (3, i, j, k)
        to_voxels = np.linalg.inv((LPS_FROM_RAS @ grid.affine)[:3, :3])
        return np.asarray(np.einsum("ab,bijk->aijk", to_voxels, lps), dtype=np.float32)


def from_disp(disp: npt.NDArray[np.floating], affine: Matrix) -> Transform:
    """The transform of a displacement field (3, i, j, k) in voxels of the grid with this affine (voxel -> RAS mm)."""
    return Transform(sitk.DisplacementFieldTransform(_field_image(disp.astype(np.float64), affine)))


def from_matrix(matrix: Matrix) -> Transform:
    """The transform of a 4x4 matrix, RAS mm, fixed point -> moving point."""
    lps = LPS_FROM_RAS @ matrix @ LPS_FROM_RAS
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(lps[:3, :3].ravel().tolist())
    affine.SetTranslation(lps[:3, 3].tolist())
    return Transform(affine)


def _field_image(disp: npt.NDArray[np.floating], affine: Matrix) -> sitk.Image:
    """Displacements in LPS mm as an ITK vector image, of the type of ``disp``."""
    lps = np.empty((*disp.shape[:0:-1], 3), dtype=disp.dtype)
    for slab in slabs(disp.shape[1:]):
        lps[:, :, slab] = np.einsum("ab,bijk->kjia", (LPS_FROM_RAS @ affine)[:3, :3], disp[:, slab])
    image = sitk.GetImageFromArray(lps, isVector=True)
    set_header(image, affine)
    return image


def write_field_mm(path: Path, disp: Disp, fixed_affine: Matrix) -> None:
    """Write a field as ITK, ANTs and 3D Slicer read it: a 3-vector a voxel of the fixed grid, LPS mm, float32.

    Args:
        path: .nii.gz or .nii (five dimensions, intent "vector"), .mha or .nrrd.
        disp: (3, i, j, k), voxels of the fixed grid, fixed -> moving.
        fixed_affine: of that grid, voxel -> RAS mm.

    Raises:
        OutputError: another suffix, or the file cannot be written.
    """
    if image_suffix(path) not in FIELD_SUFFIXES:
        raise OutputError(f"{path}: expected a name that ends in {', '.join(FIELD_SUFFIXES)} for a field; choose another")
    image = _field_image(disp.astype(np.float32, copy=False), fixed_affine)
    if ".nii" in str(image_suffix(path)):
        write_vectors_nifti(path, sitk.GetArrayViewFromImage(image).transpose(3, 2, 1, 0), fixed_affine)
        return
    with atomic_write(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), True)
            # on a full disk, the writer of NRRD does not miss what the last buffer held
            check_whole(temporary, voxel_place(temporary, str(image_suffix(path))), disp.size * 4)
        except (RuntimeError, InputError, EOFError, zlib.error) as error:
            raise OutputError(f"{path}: cannot be written ({_reason(error)}); check space and permissions") from error


def write_composite(path: Path, disp: Disp, fixed_affine: Matrix, initial: Matrix) -> None:
    """Write an ITK composite transform: the initial affine and what the field adds to it, ``T(p) = A(p + u(p))``.

    Args:
        path: .h5.
        disp: the whole transform, (3, i, j, k), voxels of the fixed grid.
        fixed_affine: of that grid, voxel -> RAS mm.
        initial: A, 4x4, RAS mm, fixed -> moving; the identity if there was none.

    Raises:
        OutputError: another suffix, or the file cannot be written.
    """
    if path.suffix != ".h5":
        raise OutputError(f"{path}: expected a name that ends in .h5 for a composite transform; choose another")
    in_voxels = np.linalg.solve(fixed_affine, np.linalg.solve(initial, fixed_affine))  # A^-1 between fixed voxels
    shape = disp.shape[:0:-1]  # (k, j, i), as ITK's arrays
    to_mm = (LPS_FROM_RAS @ fixed_affine)[:3, :3]
    affine, header = from_matrix(initial).itk, sitk.Image([1, 1, 1], sitk.sitkUInt8)
    set_header(header, fixed_affine)
    grid = (*disp.shape[1:], *header.GetOrigin(), *header.GetSpacing(), *header.GetDirection())
    # Not through ITK, which writes the time of day into the file: the same transform gives the same bytes.
    with atomic_write(path) as temporary, _Unfailing(temporary, "w+") as stream:
        with h5py.File(stream, "w") as file:
            file["ITKVersion"], file["HDFVersion"] = _text(sitk.Version.ITKVersionString()), _text(h5py.version.hdf5_version)
            file["TransformGroup/0/TransformType"] = _text("CompositeTransform_double_3_3")
            parts = (("AffineTransform", affine.GetFixedParameters(), len(affine.GetParameters())),
                     ("DisplacementFieldTransform", grid, disp.size))  # the last one comes first
            for number, (kind, fixed, count) in enumerate(parts, 1):
                group = file.create_group(f"TransformGroup/{number}")
                group["TransformType"] = _text(f"{kind}_double_3_3")
                group["TransformFixedParameters"] = np.asarray(fixed, dtype=np.float64)
                parameters = group.create_dataset("TransformParameters", (count,), np.float64)
            file["TransformGroup/1/TransformParameters"][:] = affine.GetParameters()
            for slab in slabs(shape):
                voxels = np.stack(np.broadcast_arrays(*np.ogrid[: shape[2], : shape[1], slab])).astype(np.float64)
                moved = np.einsum("ab,bijk->aijk", in_voxels[:3, :3], voxels + disp[..., slab])
                rest = moved + in_voxels[:3, 3, None, None, None] - voxels
                plane = 3 * shape[1] * shape[2]
                parameters[slab.start * plane : slab.stop * plane] = np.einsum("ab,bijk->kjia", to_mm, rest).ravel()
        if stream.error is not None:
            raise stream.error


class _Unfailing(FileIO):
    """A file for HDF5, which crashes the process some time after a write that failed: the error is kept for its user instead."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:  # a call takes 2 GB at most
                rest = rest[super().write(rest):]
        except OSError as error:
            self.error = self.error or error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


def _text(text: str) -> npt.NDArray[Any]:
    """A string as ITK's reader wants it: in an array of one, of variable length, ASCII."""
    return np.array([text], dtype=h5py.string_dtype("ascii"))


def read_transform(path: Path) -> Transform:
    """Read a transform from fixed to moving image.

    Args:
        path: an ITK transform (.tfm, .txt, .mat, .h5, .xfm); 4x4 numbers as text (.txt; RAS mm); an ITK displacement field
            (.nii.gz, .nii, .mha, .nrrd with a 3-vector a voxel, LPS mm); or the challenge's field (4D, last size 3, voxels of its
            own grid).

    Raises:
        InputError: no such file, another format, or a transform that is not finite or cannot be inverted.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a transform; got no such file; check the path")
    suffix = image_suffix(path)
    try:
        if suffix in FIELD_SUFFIXES:
            return _read_field(path)
        if path.suffix not in TRANSFORM_SUFFIXES:
            raise InputError(f"{path}: expected one of {', '.join((*TRANSFORM_SUFFIXES, *FIELD_SUFFIXES))} for a transform; got "
                             f"{path.suffix or 'no suffix'}; convert it")
        if path.suffix == ".txt" and (matrix := _matrix(path)) is not None:
            return from_matrix(matrix)
        if path.suffix in HDF5_SUFFIXES:
            _try_in_a_process(path)
        if path.suffix == ".mat":
            _check_mat(path)
        transform = sitk.ReadTransform(str(path))
        if transform.GetDimension() != 3:
            raise InputError(f"{path}: expected a 3D transform; got {transform.GetDimension()} dimensions")
        if not all(map(_finite, _parts(transform))):
            raise InputError(f"{path}: expected finite parameters; got NaN or infinite ones; write the transform again")
        moved = Transform(transform).points(np.vstack([np.zeros(3), 1000 * np.eye(3)]))  # raises if it is not complete
        if not np.isfinite(moved).all():
            raise InputError(f"{path}: expected a transform that gives finite points; got {moved.tolist()}; write it again")
    except DinoRegError:
        raise
    except Exception as error:  # RuntimeError, mostly; damaged bytes make packed ones raise others, and messages that are no text
        wanted = "an ITK transform, or 4x4 numbers" if path.suffix == ".txt" else "an ITK transform or field"
        raise InputError(f"{path}: expected {wanted}; got a file that cannot be read ({_reason(error)}); "
                         "write it again") from error
    return Transform(transform)


def _parts(transform: sitk.Transform) -> list[sitk.Transform]:
    """A composite transform's parts, or the transform itself."""
    if transform.GetName() != "CompositeTransform":
        return [transform]
    whole = sitk.CompositeTransform(transform)
    return [whole.GetNthTransform(n) for n in range(whole.GetNumberOfTransforms())]


def _finite(transform: sitk.Transform) -> bool:
    """Whether all parameters of a transform are finite."""
    if transform.GetName() == "DisplacementFieldTransform":  # its parameters as a tuple would fill the memory
        field = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        return bool(np.isfinite(sitk.GetArrayViewFromImage(field)).all())
    return bool(np.isfinite([*transform.GetParameters(), *transform.GetFixedParameters()]).all())


def _try_in_a_process(path: Path) -> None:
    """Read an HDF5 file in another process first: a damaged one can make the library crash, or never come back."""
    code = "import sys, SimpleITK; SimpleITK.ReadTransform(sys.argv[1])"
    try:
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False,
                              timeout=HDF5_SECONDS + path.stat().st_size / HDF5_RATE)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("HDF5 does not come to an end") from error
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        raise RuntimeError(last if done.returncode > 0 else "HDF5 crashes")


def _check_mat(path: Path) -> None:
    """Refuse a MATLAB file that ends early: ITK goes without the centre of rotation, its second matrix, if that is missing."""
    content = loadmat(path)
    if sorted(np.size(value) for name, value in content.items() if not name.startswith("__"))[:1] != [3]:
        raise RuntimeError("the centre of rotation is missing")


def _matrix(path: Path) -> Matrix | None:
    """A 4x4 matrix of a text file; None if the file holds something else."""
    try:
        matrix = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except ValueError:
        return None
    right = matrix.shape == (4, 4) and np.isfinite(matrix).all() and np.allclose(matrix[3], [0, 0, 0, 1])
    if not right or abs(np.linalg.det(matrix[:3, :3])) < 1e-6:
        raise InputError(f"{path}: expected a 4x4 matrix in RAS mm that can be inverted and ends in 0 0 0 1; got "
                         f"{matrix.tolist()}; correct it")
    return matrix


def _read_field(path: Path) -> Transform:
    suffix = image_suffix(path)
    assert suffix is not None  # the caller looked
    image = whole_itk_image(path, suffix, itk_reader(path, suffix), MAX_FIELD_BYTES)
    size, parts = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    if len(size) == 3 and parts == 3:
        field = sitk.Cast(image, sitk.sitkVectorFloat64)
    elif len(size) == 4 and size[3] == 3 and parts == 1:
        voxels = sitk.GetArrayFromImage(image).transpose(0, 3, 2, 1).astype(np.float64)  # (3, i, j, k)
        affine = np.eye(4)
        affine[:3, :3] = (np.array(image.GetDirection()).reshape(4, 4) * np.array(image.GetSpacing()))[:3, :3]
        affine[:3, 3] = image.GetOrigin()[:3]
        field = _field_image(voxels, LPS_FROM_RAS @ affine)
    else:
        raise InputError(f"{path}: expected a field of 3-vectors (LPS mm), or 4D with 3 as the last size (voxels); got size "
                         f"{size} with {parts} value{'' if parts == 1 else 's'} a voxel")
    if not np.isfinite(sitk.GetArrayViewFromImage(field)).all():
        raise InputError(f"{path}: expected finite displacements; got NaN or infinite ones; make the field again")
    return Transform(sitk.DisplacementFieldTransform(field))


def invert(disp: Disp, fixed_affine: Matrix, moving: Volume, iterations: int = 50,
           tolerance: float = 0.01) -> tuple[Disp, npt.NDArray[np.float32]]:
    """The inverse of a field, on the grid of the moving image: from a point of it to the fixed image.

    Fixed-point iteration as in Chen et al. 2008, preconditioned by the affine part of the transform, so that a turn or a change
    of scale is no obstacle; each point goes on until it is met.

    Args:
        disp: (3, i, j, k), voxels of the fixed grid, fixed -> moving; continued beyond the grid as at its border.
        fixed_affine: of that grid, voxel -> RAS mm.
        moving: the grid of the result.
        iterations: at most.
        tolerance: fixed voxels within which a point counts as met.

    Returns:
        The inverse in voxels of the moving grid (3, i', j', k'), and how far from each of its voxels the way there and back ends,
        in mm (i', j', k'): more than the tolerance only where the field folds or nearly does.
    """
    lines = [np.arange(n, dtype=np.float64) for n in disp.shape[1:]]
    steps = [slice(None, None, max(1, n // 16)) for n in disp.shape[1:]]
    points = np.stack(np.meshgrid(*(line[step] for line, step in zip(lines, steps, strict=True)), indexing="ij"))
    moved = points + disp[:, steps[0], steps[1], steps[2]]
    design = np.vstack([points.reshape(3, -1), np.ones(points[0].size)])
    affine = np.linalg.lstsq(design.T, moved.reshape(3, -1).T, rcond=None)[0].T  # (3, 4): moved = affine (x, 1)
    back = np.linalg.pinv(affine[:, :3])

    def forward(x: Matrix) -> Matrix:
        return np.asarray(x + np.stack([ndimage.map_coordinates(part, x, order=1, mode="nearest") for part in disp]))

    to_fixed = np.linalg.solve(fixed_affine, moving.affine)
    from_fixed = np.linalg.inv(to_fixed)
    inverse, residual = np.empty((3, *moving.shape), dtype=np.float32), np.empty(moving.shape, dtype=np.float32)
    for slab in slabs(moving.shape):
        index = np.ogrid[slab, : moving.shape[1], : moving.shape[2]]
        voxels = np.stack(np.broadcast_arrays(*index)).reshape(3, -1).astype(np.float64)
        target = to_fixed[:3, :3] @ voxels + to_fixed[:3, 3:]
        found = back @ (target - affine[:, 3:])
        error = forward(found) - target
        left = np.flatnonzero(np.abs(error).max(0) > tolerance)
        for _ in range(iterations):
            if not left.size:
                break
            found[:, left] -= back @ error[:, left]
            error[:, left] = forward(found[:, left]) - target[:, left]
            left = left[np.abs(error[:, left]).max(0) > tolerance]
        residual[slab] = np.linalg.norm(fixed_affine[:3, :3] @ error, axis=0).reshape(residual[slab].shape)
        inverse[:, slab] = (from_fixed[:3, :3] @ found + from_fixed[:3, 3:] - voxels).reshape(inverse[:, slab].shape)
    return inverse, residual


def _reason(error: Exception) -> str:
    return " ".join(str(error).rsplit("ITK ERROR:", 1)[-1].split())[:200]
