"""Files in and out: volumes and displacement fields, whole or not at all.

In memory everything is (i, j, k) in the order of the file's voxels with an affine to RAS millimetres. ITK keeps its arrays the
other way round and its physical space in LPS; the transposition and the flip happen in this module and nowhere else.

NIfTI is read through nibabel and not through ITK, which gives a truncated NIfTI back as zeros without a word; MetaImage and NRRD
are read through SimpleITK, which raises on truncation. Whatever a reader raises becomes one InputError that names the file.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from nibabel.spatialimages import HeaderDataError

from dinoreg.dicom import read_series
from dinoreg.errors import ConfigError, InputError, OutputError, RegistrationError
from dinoreg.itkfile import BLOCK, EXPORT, MAX_REST, check_whole, voxel_place
from dinoreg.volume import Volume

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
MAX_BYTES = 2**31  # of voxels as the header declares them, at 4 bytes and more each: 512 x 512 x 2048

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse
_TEMPORARY = re.compile(r"\.\d+-(.+)", re.DOTALL)  # the name of a file that is being written: see ``atomic_write``
_log = logging.getLogger(__name__)


def image_suffix(path: Path) -> str | None:
    """The suffix among ``SUFFIXES`` with which the file's name ends, in lower case, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def path_inside(root: Path, relative: str | Path) -> Path:
    """The file that a path in a JSON means, once it is certain that it lies inside ``root``.

    Args:
        root: the input folder; may itself be a symbolic link.
        relative: the path as written, relative to ``root``.

    Returns:
        ``root / relative``. Whether it exists is not looked at.

    Raises:
        InputError: if the path is absolute, climbs with ``..`` or leads out of the folder through a symbolic link.
    """
    relative = Path(relative)
    if relative.is_absolute() or ".." in relative.parts or "\0" in str(relative):
        raise InputError(f"{str(relative)!r}: expected a path inside {root}, relative and without '..'; correct the path")
    try:
        inside = (root / relative).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # a loop of symbolic links
        raise InputError(f"{root / relative}: cannot be followed ({error}); check its symbolic links") from error
    if not inside:
        raise InputError(f"{root / relative}: leads out of {root} through a symbolic link; copy the file into the folder")
    return root / relative


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8.

    Raises:
        InputError: if the file is missing, unreadable, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:  # both JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{path}: expected JSON in UTF-8; got something else ({error}); correct the file") from error


def read_volume(path: Path, *, max_bytes: int | None = None) -> Volume:
    """Read a 3D image.

    Args:
        path: .nii, .nii.gz, .mha, .mhd or .nrrd with one number a voxel (further dimensions of length 1 are dropped), or a folder
            with one DICOM series.
        max_bytes: refuse a file whose header declares more bytes of voxels than this, before reading them; ``MAX_BYTES`` if None.

    Returns:
        The volume: array (i, j, k) in native byte order and C layout, of the file's type, or float32 where the NIfTI header
        scales the stored numbers; affine to RAS mm (sform before qform).

    Raises:
        InputError: if the file is missing, of another format, truncated, corrupt (a .gz with a wrong checksum too), not 3D, of
            more than one value a voxel, larger than allowed, or without a usable spacing; for a series see ``dinoreg.dicom``.
    """
    suffix = "DICOM" if path.is_dir() else image_suffix(path)
    if suffix is None:
        raise InputError(f"{path}: expected one of {', '.join(SUFFIXES)}, or a folder with a DICOM series; convert the image")
    if suffix != "DICOM" and not path.is_file():
        raise InputError(f"{path}: no such file; check the path and that the data set is complete")
    limit = MAX_BYTES if max_bytes is None else max_bytes
    try:
        if suffix == "DICOM":
            array, lps = read_series(path, limit)
            affine = LPS_FROM_RAS @ lps
        else:
            array, affine = (_read_nifti if suffix.startswith(".nii") else _read_itk)(path, suffix, limit)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # given damaged bytes, a reader raises OSError, EOFError, zlib.error, HeaderDataError...
        raise InputError(f"{path}: cannot be read as {suffix} ({_reason(error)}); the file is truncated, damaged or of another "
                         "format: copy or export it again") from error
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or (spacing <= 0).any() or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        raise InputError(f"{path}: expected three positive spacings along independent directions; got spacing "
                         f"{_numbers(spacing)} mm and the affine {affine[:3].tolist()}; correct the header", "affine")
    return Volume(array, affine)


def _read_nifti(path: Path, suffix: str, limit: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    with open_nifti(path, suffix) as (stream, header):
        if not (np.isfinite(header["pixdim"][1:4]).all() and header["pixdim"][1:4].all()):  # nibabel would set a zero to 1
            raise InputError(f"{path}: expected a positive spacing along each axis; got {_numbers(header['pixdim'][1:4])} mm; "
                             "correct the header", "affine")
        header.check_fix(logger=_log)
        dtype = header.get_data_dtype()
        shape = _spatial_shape(path, header.get_data_shape(), 1 if dtype.kind in "biuf" else 2)
        _check_size(path, shape, dtype.itemsize, limit, offset=int(header["vox_offset"]))
        stored = header.raw_data_from_fileobj(stream).reshape(shape, order="F")
        array = np.array(stored, dtype=dtype.newbyteorder("="), order="C")
        _to_the_end(path, suffix, stream)
    slope, inter = header.get_slope_inter()
    if slope is not None and abs(slope) < np.finfo(np.float32).tiny:  # nearly all values would be rounded to zero
        raise InputError(f"{path}: expected a factor of the stored numbers (scl_slope); got {slope:g}; correct the header")
    if slope is not None and (slope, inter) != (1.0, 0.0):
        scaled = np.empty(shape, dtype=np.float32)
        with np.errstate(over="ignore"):  # infinite values are found by the checks
            for plane, values in zip(scaled, array, strict=True):  # one by one: in double precision
                plane[...] = values * np.float64(slope) + np.float64(inter or 0.0)
        array = scaled
    return array, np.asarray(header.get_best_affine(), dtype=np.float64)


@contextlib.contextmanager
def open_nifti(path: Path, suffix: str) -> Iterator[tuple[Any, Any]]:
    """The (unpacked) stream of a NIfTI, right after its header, and nibabel's header, unchecked and without extensions, whose
    size nobody has checked."""
    with gzip.open(path) if suffix.endswith(".gz") else path.open("rb") as stream:
        size_field = stream.read(4)
        stream.seek(0)
        kind = nib.Nifti2Header if 540 in (int.from_bytes(size_field, order) for order in ("little", "big")) else nib.Nifti1Header
        yield stream, kind(stream.read(kind.sizeof_hdr), check=False)


def _to_the_end(path: Path, suffix: str, stream: BinaryIO) -> None:
    """Read what follows the voxels of a .gz: the checksum is compared at the end of the stream."""
    left = MAX_REST if suffix.endswith(".gz") else 0
    while left > 0 and (block := stream.read(BLOCK)):
        left -= len(block)
        if left <= 0:
            raise InputError(f"{path}: expected an end after its voxels; got {MAX_REST / 2**20:.0f} MiB more; {EXPORT}")


def _read_itk(path: Path, suffix: str, limit: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    reader = itk_reader(path, suffix)
    shape = _spatial_shape(path, reader.GetSize(), reader.GetNumberOfComponents())
    array, affine = from_itk(whole_itk_image(path, suffix, reader, limit))
    return array.reshape(shape), affine


def from_itk(image: sitk.Image) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Array (i, j, k ...) and affine voxel -> RAS mm of a SimpleITK image of three dimensions or more."""
    array = np.ascontiguousarray(sitk.GetArrayViewFromImage(image).T)
    n, affine = image.GetDimension(), np.eye(4)
    if n >= 3:
        affine[:3, :3] = (np.array(image.GetDirection()).reshape(n, n) * np.array(image.GetSpacing()))[:3, :3]
        affine[:3, 3] = image.GetOrigin()[:3]
    return array, LPS_FROM_RAS @ affine


def to_itk(volume: Volume) -> sitk.Image:
    """A volume as a SimpleITK image."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.T))
    set_header(image, volume.affine)
    return image


def itk_reader(path: Path, suffix: str) -> sitk.ImageFileReader:
    """An ITK reader that has read the header of a .mha, .mhd, .nrrd, .nii or .nii.gz. The name decides, not a guess from the
    content.

    Raises:
        InputError: if the voxels are not in one file beside the header, or the header is none.
        RuntimeError: if ITK cannot read it.
    """
    if not suffix.startswith(".nii"):
        place = voxel_place(path, suffix)
        if place.file is not None and not path_inside(path.parent, place.file).is_file():
            raise InputError(f"{path}: expected its voxels in one file beside it; got {place.file!r}; convert to .mha or .nii.gz")
    reader = sitk.ImageFileReader()
    reader.SetImageIO({".nrrd": "NrrdImageIO", ".nii": "NiftiImageIO", ".nii.gz": "NiftiImageIO"}.get(suffix, "MetaImageIO"))
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def whole_itk_image(path: Path, suffix: str, reader: sitk.ImageFileReader, limit: int = MAX_BYTES) -> sitk.Image:
    """The image of a reader from :func:`itk_reader`, once it is certain that the file holds all of it.

    Raises:
        InputError: if the header declares more than ``limit`` bytes, or the file holds less than it declares.
        Exception: what unpacking raises for damaged bytes.
    """
    itemsize = int(sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent())
    values = (*reader.GetSize(), reader.GetNumberOfComponents())
    _check_size(path, values, itemsize, limit)
    if not suffix.startswith(".nii"):
        check_whole(path, voxel_place(path, suffix), math.prod(values) * itemsize)
        return reader.Execute()
    with open_nifti(path, suffix) as (stream, header):
        stream.seek(int(header["vox_offset"]))
        left = math.prod(values) * itemsize
        while left > 0 and (block := stream.read(min(left, BLOCK))):
            left -= len(block)
        if left:
            raise InputError(f"{path}: expected {left} more bytes of values, as its header declares; {EXPORT}")
        _to_the_end(path, suffix, stream)
    return reader.Execute()


def _spatial_shape(path: Path, shape: Sequence[int], components: int) -> tuple[int, int, int]:
    """The three lengths of a 3D image; dimensions beyond the third may have length 1."""
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or any(n < 1 for n in shape[:3]) or components != 1:
        values = "" if components == 1 else " with more than one value a voxel"
        raise InputError(f"{path}: expected a 3D image; got shape {tuple(int(n) for n in shape)}{values}; extract one 3D volume",
                         "not-3d")
    i, j, k = (int(n) for n in shape[:3])
    return i, j, k


def _check_size(path: Path, shape: Sequence[int], itemsize: int, limit: int, offset: int = 0) -> None:
    voxels = math.prod(shape)
    declared = max(voxels * itemsize + max(0, offset), voxels * 4)  # an image is registered in single precision
    if declared > limit:
        raise InputError(f"{path}: the header declares {declared / 2**20:.0f} MiB; expected at most {limit / 2**20:.0f} MiB; "
                         "crop or resample the image", "too-large")


def _numbers(values: npt.NDArray[Any]) -> str:
    return "(" + ", ".join(f"{float(value):g}" for value in values) + ")"


def _reason(error: Exception) -> str:
    """One line of what a reader or writer complained about, without ITK's source lines and memory addresses."""
    text = str(error).rsplit("ITK ERROR:", 1)[-1]
    return " ".join(re.sub(r"\w+\(0x[0-9a-f]+\):", "", text).split())[:300] or type(error).__name__


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Let a file appear under its name whole or not at all.

    Gives the path of a temporary file beside the target, with the same suffix. When the block ends, that file is brought to disk
    and takes the target's name; when the block raises, it is removed and the target stays as it was.

    Args:
        path: the target; missing folders are made.

    Raises:
        OutputError: if the file system refuses (no such folder, no permission, no space, read-only).
    """
    temporary = path.with_name(f".{secrets.randbits(48)}-{path.name}")  # another for each thread, process and machine
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); check space and permissions of "
                          f"{path.parent}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove(paths: Iterable[Path]) -> None:
    """Remove files, as far as they are there, and what writes of them left that were cut off: see :func:`atomic_write`.

    Whoever calls this is the only one that writes these files.

    Raises:
        OutputError: if one cannot be removed.
    """
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, wanted in names.items():
        if not folder.is_dir():
            continue
        try:
            for path in folder.iterdir():
                if path.name in wanted or ((left := _TEMPORARY.fullmatch(path.name)) and left[1] in wanted):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be cleared of an earlier run ({error.strerror or error}); choose another output "
                              "folder") from error


def check_apart(output: Path, *inputs: Path | None) -> None:
    """See that a file to be written is none of those that it is made from; None is no file.

    Raises:
        ConfigError: if it is, also by way of a link.
    """
    places = {output.parent.resolve() / output.name, output.resolve()}
    for path in inputs:
        if path is not None and places & {path.parent.resolve() / path.name, path.resolve()}:
            raise ConfigError(f"{output}: is an input and would be replaced by the result; choose another name")


def check_writable(folder: Path) -> None:
    """Make the folder if it is missing and see that a file can be created in it.

    Raises:
        OutputError: if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder}: expected a folder that can be written to; got: {error.strerror or error}; "
                          "choose another output folder or change its permissions") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically. Raises OutputError."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON (standard: NaN and infinity are refused), atomically. Raises OutputError, and ValueError for NaN."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, atomically. Raises OutputError."""
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume with its own type as .nii.gz, .nii or .mha (compressed), by the suffix.

    The same volume gives the same bytes.

    Raises:
        OutputError: if the suffix is another one, the format cannot hold the type, or the file cannot be written.
    """
    suffix = image_suffix(path)
    if suffix in (".nii", ".nii.gz"):
        _write_nifti(path, volume.array, volume.affine)
    elif suffix == ".mha":
        _write_itk(path, to_itk(volume), compress=True)
    else:
        raise OutputError(f"{path}: expected .nii.gz, .nii or .mha for an image; choose another name")


def write_disp_nifti(path: Path, disp: npt.NDArray[np.float32], affine: npt.NDArray[np.float64]) -> None:
    """Write a displacement field as the Learn2Reg evaluator reads it: plain 4D (X, Y, Z, 3) float32, voxels of the fixed grid.

    Component c displaces along array axis c: warped = map_coordinates(moving, identity + disp).

    Args:
        path: .nii.gz or .nii.
        disp: (3, i, j, k) float32, voxels of the fixed grid, fixed -> moving.
        affine: of the fixed image.

    Raises:
        RegistrationError: if the field holds a value that is not finite.
        OutputError: if the file cannot be written.
    """
    _check_field(path, disp)
    _write_nifti(path, np.moveaxis(disp, 0, -1), affine)


def write_disp_mha(path: Path, disp: npt.NDArray[np.float32], affine: npt.NDArray[np.float64], *, vector: bool) -> None:
    """Write a displacement field for grand-challenge.org; values in voxels, as in :func:`write_disp_nifti`.

    Args:
        path: .mha.
        disp: (3, i, j, k) float32, voxels of the fixed grid, fixed -> moving.
        affine: of the fixed image.
        vector: False for the scalar 4D image of ITK size (X, Y, Z, 3) that the platform's socket asks for; True for a 3D image of
            3-vectors, as the organisers' own baselines of 2023 wrote.

    Raises:
        RegistrationError: if the field holds a value that is not finite.
        OutputError: if the file cannot be written.
    """
    _check_field(path, disp)
    order = (3, 2, 1, 0) if vector else (0, 3, 2, 1)  # (k, j, i, 3) or (3, k, j, i)
    image = sitk.GetImageFromArray(np.ascontiguousarray(disp.transpose(order)), isVector=vector)
    set_header(image, affine)
    _write_itk(path, image, compress=False)


def write_vectors_nifti(path: Path, vectors: npt.NDArray[np.float32], affine: npt.NDArray[np.float64]) -> None:
    """Write an image of vectors as ITK does: five dimensions (X, Y, Z, 1, 3), intent "vector".

    (On a full disk, ITK itself leaves half a file without a word.)

    Args:
        path: .nii.gz or .nii.
        vectors: (3, i, j, k), in the unit and frame in which they are to be read: ITK takes LPS mm.
        affine: of the grid, voxel -> RAS mm.

    Raises:
        OutputError: if the file cannot be written.
    """
    _write_nifti(path, np.moveaxis(vectors, 0, -1)[..., None, :], affine, intent="vector")


def _check_field(path: Path, disp: npt.NDArray[np.float32]) -> None:
    if disp.ndim != 4 or disp.shape[0] != 3 or disp.dtype != np.float32:
        raise ValueError(f"a displacement field is float32 of shape (3, i, j, k); got {disp.dtype} of shape {disp.shape}")
    if not np.isfinite([disp.min(initial=0), disp.max(initial=0)]).all():
        raise RegistrationError(f"{path.name}: expected finite displacements; got {int((~np.isfinite(disp)).sum())} values that "
                                "are not, so the field is not written; check the intensities of both images")


def _write_nifti(path: Path, array: npt.NDArray[Any], affine: npt.NDArray[np.float64], intent: str = "none") -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as raw:
        try:
            image = nib.Nifti1Image(array, affine, dtype=array.dtype)
        except HeaderDataError as error:
            raise OutputError(f"{path}: NIfTI cannot hold this image ({_reason(error)}); use int16 or float32") from error
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)  # a quaternion: cannot hold a shear
        if not np.allclose(image.get_qform(), affine, atol=1e-3):
            image.set_qform(None, code=0)
        image.header.set_xyzt_units("mm")
        image.header.set_intent(intent)
        if image_suffix(path) == ".nii":
            image.to_stream(raw)
        else:  # neither name nor time in the gzip header: the same array gives the same bytes
            with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0) as compressed:
                image.to_stream(compressed)


def set_header(image: sitk.Image, affine: npt.NDArray[np.float64]) -> None:
    """Give an ITK image of three dimensions or more the place of an affine (voxel -> RAS mm)."""
    n = image.GetDimension()
    lps = LPS_FROM_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = np.eye(n)
    direction[:3, :3] = lps[:3, :3] / spacing
    image.SetSpacing([*spacing.tolist(), 1.0][:n])
    image.SetOrigin([*lps[:3, 3].tolist(), 0.0][:n])
    image.SetDirection(direction.ravel().tolist())


def _write_itk(path: Path, image: sitk.Image, *, compress: bool) -> None:
    with atomic_write(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), compress)
        except RuntimeError as error:
            raise OutputError(f"{path}: cannot be written ({_reason(error)}); check space and permissions of "
                              f"{path.parent}") from error

