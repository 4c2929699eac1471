"""A DICOM series as a volume: one folder, one series of parallel slices at equal distances.

GDCM (through SimpleITK) finds the series, sorts the slices and rescales the values. What it passes over in silence is refused
here: several series in one folder, missing slices, unequal distances, and slices that are shifted against each other (a tilted
gantry), which no grid with a right-angled header can hold.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from dinoreg.errors import InputError

UNEVEN = 0.05  # of the distance of slices: positions are written with one or two decimals of a millimetre
TILT_MM = 0.5  # of shift from the first to the last slice, beyond which it is not rounding

_IMPLICIT, _OTHER_ORDER = b"1.2.840.10008.1.2", (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99")  # transfer syntaxes
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")  # lengths of 4 bytes, padded

Array = npt.NDArray[np.float64]


def read_series(folder: Path, limit: int) -> tuple[npt.NDArray[Any], Array]:
    """The only series of a folder.

    Args:
        folder: with the slices themselves; files that are no DICOM images are passed over.
        limit: refuse a series of more bytes of voxels than this, before reading them.

    Returns:
        The array (i, j, k), j along the columns of a slice and k along its normal, and the affine voxel -> LPS mm.

    Raises:
        InputError: no DICOM image, several series, files that are no single slices, slices that form no regular volume, or too
            much of it.
    """
    slices = sorted(path for path in folder.iterdir() if _should_be_a_slice(path))
    _refuse(folder, [path for path in slices if _ends_early(path)])
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    series = reader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise InputError(f"{folder}: expected a folder with a DICOM series; got no DICOM image in it; name the folder that holds "
                         "the slices themselves")
    names = {uid: list(reader.GetGDCMSeriesFileNames(str(folder), uid)) for uid in series}  # sorted by position
    if len(series) > 1:
        found = "; ".join(f"{_title(files[0])} ({len(files)} files, such as {Path(files[0]).name})" for files in names.values())
        raise InputError(f"{folder}: expected one DICOM series; got {len(series)}: {found}; move each series into a folder "
                         "of its own")
    (files,) = names.values()
    _refuse(folder, [path for path in slices if str(path) not in files])
    headers = [_header(name) for name in files]
    step = _distance(folder, files, headers)
    declared = len(files) * math.prod(headers[0].GetSize()) * 4  # rescaled values may need 4 bytes
    if declared > limit:
        raise InputError(f"{folder}: the series has {declared / 2**20:.0f} MiB; expected at most {limit / 2**20:.0f} MiB; "
                         "crop or resample it", "too-large")
    reader.SetFileNames(files)
    image = reader.Execute()
    rows, cols = _axes(headers[0])
    affine = np.eye(4)
    affine[:3, :3] = np.stack([rows, cols, np.cross(rows, cols)], axis=1) * [*headers[0].GetSpacing()[:2], step]
    affine[:3, 3] = headers[0].GetOrigin()
    return np.ascontiguousarray(sitk.GetArrayViewFromImage(image).T), affine


def _header(name: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(name)
    reader.ReadImageInformation()
    return reader


def _refuse(folder: Path, damaged: Sequence[Path]) -> None:
    if damaged:
        raise InputError(f"{folder}: {', '.join(path.name for path in damaged[:3])} cannot be read as a slice of the series "
                         f"({len(damaged)} such files); the file is truncated or damaged: copy or export it again")


def _ends_early(path: Path) -> bool:
    """Whether an element of a DICOM file says that it is longer than the rest of the file: GDCM takes the memory before it looks.

    What follows a sequence or packed pixels of undefined length is not looked at, nor are files in big-endian or deflated.
    """
    size, syntax = path.stat().st_size, b""
    with path.open("rb") as stream:
        stream.seek(132)
        while len(head := stream.read(8)) == 8:
            group, element = struct.unpack("<HH", head[:4])
            if group != 2 and syntax in _OTHER_ORDER:
                return False
            if group != 2 and syntax == _IMPLICIT:
                length = int.from_bytes(head[4:], "little")
            elif head[4:6] in _LONG:
                length = int.from_bytes(stream.read(4), "little")
            else:
                length = int.from_bytes(head[6:], "little")
            if length == 2**32 - 1:
                return False
            if length > size - stream.tell():
                return True
            if (group, element) == (2, 0x10):
                syntax = stream.read(length).rstrip(b"\0 ")
            else:
                stream.seek(length, 1)
    return False


def _should_be_a_slice(path: Path) -> bool:
    """Whether a file calls itself DICOM, by name or content; GDCM passes over what it cannot read, a truncated slice too."""
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _title(name: str) -> str:
    """Number and description of the series that a file belongs to."""
    header = _header(name)
    number, text = (header.GetMetaData(key).strip() if header.HasMetaDataKey(key) else "" for key in ("0020|0011", "0008|103e"))
    return f"series {number or '?'} {text!r}" if text else f"series {number or '?'}"


def _distance(folder: Path, files: Sequence[str], headers: Sequence[sitk.ImageFileReader]) -> float:
    """The distance of neighbouring slices in mm; refuses slices that are not parallel, equally far apart and right above each
    other."""
    first = headers[0]
    if first.GetSize()[2] > 1 or first.GetNumberOfComponents() > 1:
        raise InputError(f"{folder}: expected one grey slice a file; got many frames or colours in {Path(files[0]).name}; "
                         "convert the series to NIfTI, for example with dcm2niix")
    if len(files) < 2:
        raise InputError(f"{folder}: expected a series of slices; got a single one; name the folder of a whole volume",
                         "not-3d")
    for name, header in zip(files, headers, strict=True):
        for what, got, expected in (("size", header.GetSize(), first.GetSize()),
                                    ("pixel spacing", header.GetSpacing()[:2], first.GetSpacing()[:2]),
                                    ("orientation", _axes(header).ravel(), _axes(first).ravel())):
            if not np.allclose(got, expected, rtol=0, atol=1e-3):
                raise InputError(f"{folder}: expected slices of one {what}; got {_text(got)} in {Path(name).name} and "
                                 f"{_text(expected)} in {Path(files[0]).name}; take other images out of the folder")
    rows, cols = _axes(first)
    positions = np.array([header.GetOrigin() for header in headers])
    steps = np.diff(positions @ np.cross(rows, cols))
    usual = float(np.median(steps))
    worst = int(np.abs(steps - usual).argmax())
    if usual <= 0 or abs(steps[worst] - usual) > UNEVEN * usual:
        raise InputError(f"{folder}: expected slices at equal distances (mostly {usual:g} mm); got {steps[worst]:g} mm between "
                         f"{Path(files[worst]).name} and {Path(files[worst + 1]).name}: slices are missing or there twice; "
                         "export the series again")
    across = positions[-1] - positions[0]
    shift = math.hypot(float(across @ rows), float(across @ cols))
    if shift > TILT_MM:
        raise InputError(f"{folder}: expected slices right above each other; got a shift of {shift:.1f} mm from the first to the "
                         "last (a tilted gantry); resample the series to a straight grid, for example with dcm2niix")
    return float(steps.mean())


def _axes(header: sitk.ImageFileReader) -> Array:
    """(2, 3): directions of a slice's rows and columns, LPS."""
    return np.array(header.GetDirection()).reshape(3, 3).T[:2]


def _text(values: Iterable[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
