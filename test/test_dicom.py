"""DICOM series: what is written comes back where it lies, and folders that hold no regular volume are refused by name."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from dinoreg.dicom import _ends_early
from dinoreg.errors import InputError
from dinoreg.io import read_volume

SHAPE, SPACING, ORIGIN = (10, 12, 8), (1.5, 0.75, 2.5), (-10.0, -20.0, 5.0)  # LPS
STRAIGHT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
OBLIQUE = ((0.8, 0.6, 0.0), (-0.6, 0.8, 0.0))
ARRAY = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


def write_series(folder: Path, numbers: Sequence[int] = range(SHAPE[2]), axes: tuple[Sequence[float], ...] = STRAIGHT,
                 uid: str = "1.2.3", shift: Sequence[float] = (0, 0, 0), prefix: str = "", array: np.ndarray = ARRAY) -> Path:
    """Slices of an array, named so that sorting by name gives the wrong order; ``shift`` is added to each position from slice to
    slice."""
    folder.mkdir(exist_ok=True)
    rows, cols = np.array(axes)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for n in numbers:
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, n].T)[None])
        image.SetSpacing(SPACING)
        position = np.array(ORIGIN) + n * (SPACING[2] * np.cross(rows, cols) + np.array(shift))
        tags = {"0008|0060": "CT", "0008|0018": f"{uid}.{n}", "0020|000d": "1.2", "0020|000e": uid, "0020|0011": uid[-1],
                "0008|103e": f"series of {uid}", "0020|0013": str(n), "0020|0032": "\\".join(f"{x:.6g}" for x in position),
                "0020|0037": "\\".join(f"{x:g}" for x in (*rows, *cols))}
        for key, value in tags.items():
            image.SetMetaData(key, value)
        image.SetOrigin(position.tolist())
        image.SetDirection(np.stack([rows, cols, np.cross(rows, cols)], axis=1).ravel().tolist())
        writer.SetFileName(str(folder / f"{prefix}{99 - n}.dcm"))
        writer.Execute(image)
    return folder


@pytest.mark.parametrize("axes", [STRAIGHT, OBLIQUE], ids=["straight", "oblique"])
def test_series_comes_back_where_it_lies(tmp_path: Path, axes: tuple[Sequence[float], ...]) -> None:
    volume = read_volume(write_series(tmp_path / "ct", axes=axes))
    assert np.array_equal(volume.array, ARRAY)
    assert volume.spacing == pytest.approx(SPACING, abs=1e-5)  # positions are written with six digits
    rows, cols = np.array(axes)
    last = np.array(ORIGIN) + 9 * 1.5 * rows + 11 * 0.75 * cols + 7 * 2.5 * np.cross(rows, cols)
    found = volume.affine @ (9, 11, 7, 1)
    np.testing.assert_allclose(found[:3], last * (-1, -1, 1), rtol=0, atol=1e-4)


def test_other_files_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct")
    (folder / "readme.txt").write_text("no image")
    assert np.array_equal(read_volume(folder).array, ARRAY)


def test_several_series_are_named(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", uid="1.2.3")
    write_series(tmp_path / "ct", uid="1.2.4", prefix="b")
    with pytest.raises(InputError, match=r"expected one DICOM series; got 2: series 3 'series of 1.2.3' \(8 files.*series 4"):
        read_volume(tmp_path / "ct")


@pytest.mark.parametrize("numbers", [(0, 1, 2, 4, 5, 6, 7), (0, 1, 2, 3, 4, 5, 7)])
def test_a_missing_slice_is_refused(tmp_path: Path, numbers: Sequence[int]) -> None:
    with pytest.raises(InputError, match=r"slices at equal distances \(mostly 2.5 mm\); got 5 mm between .*missing"):
        read_volume(write_series(tmp_path / "ct", numbers))


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a shift of 7\.0 mm .* tilted gantry"):
        read_volume(write_series(tmp_path / "ct", shift=(0, 1.0, 0)))


def test_slices_of_two_sizes_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", range(7))
    write_series(tmp_path / "ct", [7], array=ARRAY[:, :-1])
    with pytest.raises(InputError, match=r"slices of one size|expected one DICOM series"):  # GDCM may take them for two series
        read_volume(tmp_path / "ct")


def test_a_single_slice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a series of slices; got a single one"):
        read_volume(write_series(tmp_path / "ct", [0]))


def test_a_folder_without_a_series_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no DICOM image in it"):
        read_volume(tmp_path)


@pytest.mark.parametrize("name", ["99.dcm", "95.dcm", "92.dcm"])
def test_a_truncated_slice_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_series(tmp_path / "ct")
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"ct: {name} cannot be read as a slice .* truncated"):
        read_volume(folder)


@pytest.mark.parametrize("size", [0, 2, 100, 131])
def test_a_slice_cut_before_it_says_that_it_is_dicom_is_refused(tmp_path: Path, size: int) -> None:
    folder = write_series(tmp_path / "ct")
    path = folder / "99.dcm"  # the first slice: the others are equally far apart
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"ct: 99\.dcm cannot be read as a slice"):
        read_volume(folder)


@pytest.mark.parametrize("syntax", [b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2"])
def test_an_element_that_is_longer_than_its_file_takes_no_memory(tmp_path: Path, syntax: bytes) -> None:
    folder = write_series(tmp_path / "ct")
    meta = b"\x02\0\x10\0UI" + (len(syntax) + len(syntax) % 2).to_bytes(2, "little") + syntax + b"\0" * (len(syntax) % 2)
    pixels = b"\xe0\x7f\x10\0" + (b"OW\0\0" if syntax.endswith(b".1") else b"") + (9 * 10**8).to_bytes(4, "little")
    (folder / "99.dcm").write_bytes(bytes(128) + b"DICM" + meta + pixels + b"few")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"ct: 99\.dcm cannot be read as a slice"):
        read_volume(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB, of 900 MB


@pytest.mark.parametrize("syntax", [b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"])
def test_other_byte_orders_are_left_to_gdcm(tmp_path: Path, syntax: bytes) -> None:
    path = tmp_path / "x.dcm"
    value = syntax + b"\0" * (len(syntax) % 2)
    path.write_bytes(bytes(128) + b"DICM\x02\0\x10\0UI" + len(value).to_bytes(2, "little") + value + b"\0" * 6 + b"\xff" * 8)
    assert not _ends_early(path)


def test_a_series_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected at most 0 MiB"):
        read_volume(write_series(tmp_path / "ct"), max_bytes=1000)
