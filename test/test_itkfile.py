"""MetaImage and NRRD: what ITK itself would fill with zeros, or crash on, is refused before it reads."""

from __future__ import annotations

import bz2
import gzip
import re
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dinoreg.errors import InputError
from dinoreg.io import read_volume
from dinoreg.itkfile import VoxelPlace, voxel_place

ARRAY = np.arange(1, 9 * 8 * 7 + 1, dtype=np.int16).reshape(9, 8, 7)  # (k, j, i), no zero


def written(path: Path, compress: bool) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY), str(path), compress)
    return path


def repacked(path: Path, body: bytes) -> Path:
    """The image with other voxels behind its header, whatever their number, well packed."""
    content = path.read_bytes()
    if path.suffix == ".nrrd":
        path.write_bytes(content[: content.index(b"\n\n") + 2] + gzip.compress(body))
    else:
        packed = zlib.compress(body)
        header = content[: content.index(b"LOCAL\n") + 6]
        path.write_bytes(re.sub(rb"CompressedDataSize = \d+", b"CompressedDataSize = %d" % len(packed), header) + packed)
    return path


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_well_packed_voxels_that_end_early_are_refused(tmp_path: Path, name: str, share: float) -> None:
    body = ARRAY.tobytes()
    path = repacked(written(tmp_path / name, True), body)
    assert np.array_equal(read_volume(path).array, ARRAY.T)
    repacked(path, body[: int(share * len(body))])
    with pytest.raises(InputError, match=rf"{name}: .*(truncated|damaged)"):
        read_volume(path)


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
@pytest.mark.parametrize("end", [-1, -4, -9])
def test_packed_voxels_whose_checksum_is_cut_or_wrong_are_refused(tmp_path: Path, name: str, end: int) -> None:
    path = written(tmp_path / name, True)
    content = path.read_bytes()
    path.write_bytes(content[:end])
    with pytest.raises(InputError, match=rf"{name}: .*(truncated|damaged)"):
        read_volume(path)
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(InputError, match=rf"{name}: .*(truncated|damaged)"):
        read_volume(path)


@pytest.mark.parametrize("line", [b"", b"CompressedDataSize = %d\n", b"CompressedDataSize = 0\n", b"CompressedDataSize = -1\n",
                                  b"CompressedDataSize = 1\nCompressedDataSize = 2\n"])
def test_a_packed_metaimage_without_its_packed_size_is_refused(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path / "x.mha", True)
    content = path.read_bytes()
    found = re.search(rb"CompressedDataSize = (\d+)\n", content)
    assert found is not None
    path.write_bytes(content.replace(found.group(), line % (int(found.group(1)) - 20) if b"%" in line else line))
    with pytest.raises(InputError, match=r"x\.mha: .*(CompressedDataSize|truncated)"):
        read_volume(path)


@pytest.mark.parametrize(("name", "line"), [
    ("x.mha", b"Name = "), ("x.mha", b"Comment = "), ("x.nrrd", b""), ("x.nrrd", b"content: ")])
def test_words_of_a_header_on_which_itk_crashes_are_refused(tmp_path: Path, name: str, line: bytes) -> None:
    path = written(tmp_path / name, False)
    content = path.read_bytes()
    at = content.index(b"BinaryData = " if name.endswith("mha") else b"type: ")
    path.write_bytes(content[:at] + line + 1500 * b"x" + b"\n" + content[at:])
    with pytest.raises(InputError, match=r"at most 200 letters|more than 500 bytes"):
        read_volume(path)


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd", "x.nii.gz"])
def test_packed_voxels_that_go_on_after_their_number_are_compared_with_the_checksum(tmp_path: Path, name: str) -> None:
    """A damaged stream may unpack to more than there was: what is behind the last voxel must not hide the checksum."""
    longer = ARRAY.tobytes() + bytes(300)
    path = tmp_path / name
    if name == "x.nii.gz":
        nib.Nifti1Image(ARRAY.T, np.eye(4)).to_filename(path)
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(300)))
    else:
        repacked(written(path, True), longer)
    assert np.array_equal(read_volume(path).array, ARRAY.T)
    content = bytearray(path.read_bytes())
    content[-6 if name.endswith(("gz", "nrrd")) else -2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="truncated"):
        read_volume(path)


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd", "x.nii.gz"])
def test_packed_voxels_without_an_end_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.io.MAX_REST", 2000)
    monkeypatch.setattr("dinoreg.itkfile.MAX_REST", 2000)
    path = tmp_path / name
    if name == "x.nii.gz":
        nib.Nifti1Image(ARRAY.T, np.eye(4)).to_filename(path)
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(3000)))
    else:
        repacked(written(path, True), ARRAY.tobytes() + bytes(3000))
    with pytest.raises(InputError, match=r"got .*more; .*truncated or damaged"):
        read_volume(path)


@pytest.mark.parametrize("dimensions", ["256", "-1", "11", "0", "3.5", "", "3 3"])
def test_a_metaimage_of_impossible_dimensions_is_refused(tmp_path: Path, dimensions: str) -> None:
    path = written(tmp_path / "x.mha", False)  # 256 dimensions end the process in ITK 5.4
    path.write_bytes(path.read_bytes().replace(b"NDims = 3", f"NDims = {dimensions}".encode()))
    with pytest.raises(InputError, match="NDims"):
        read_volume(path)


@pytest.mark.parametrize("name", ["x.mha", "x.mhd", "x.nrrd"])
def test_declared_voxels_that_are_not_there_take_no_memory(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, False)
    header = path.read_bytes()
    path.write_bytes(header.replace(b"9 8 7"[::-1], b"700 800 900").replace(b"7 8 9", b"700 800 900"))
    with pytest.raises(InputError, match=r"expected 1008000000 bytes of voxels, as its header declares; got 1008; .* truncated"):
        read_volume(path)


def test_packed_voxels_beside_their_header_are_read_and_checked(tmp_path: Path) -> None:
    path = written(tmp_path / "x.mhd", True)
    assert np.array_equal(read_volume(path).array, ARRAY.T)
    voxels = tmp_path / "x.zraw"
    voxels.write_bytes(voxels.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"x\.mhd: .*truncated"):
        read_volume(path)


def test_nrrd_with_bzip2_is_read_and_checked(tmp_path: Path) -> None:
    path = written(tmp_path / "x.nrrd", False)
    header = path.read_bytes()[: -ARRAY.nbytes].replace(b"encoding: raw", b"encoding: bzip2")
    packed = bz2.compress(ARRAY.tobytes())
    path.write_bytes(header + packed)
    assert voxel_place(path, ".nrrd") == VoxelPlace(None, len(header), "bzip2")
    path.write_bytes(header + packed[:-3])
    with pytest.raises(InputError, match="truncated"):
        read_volume(path)


def test_text_voxels_are_left_to_itk(tmp_path: Path) -> None:
    (tmp_path / "x.mha").write_text("ObjectType = Image\nNDims = 3\nBinaryData = False\nDimSize = 2 2 2\n"
                                    "ElementType = MET_SHORT\nElementDataFile = LOCAL\n1 2 3 4 5 6 7 8\n")
    assert read_volume(tmp_path / "x.mha").array.ravel(order="F").tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.mha", b"ObjectType = Image\nNDims = 3\n", "without ElementDataFile"),
    ("x.nrrd", b"NRRD0004\ntype: short\n", "without an end"),
    ("x.nrrd", b"NRRD0004\nencoding: gzip\nbyte skip: 10\n\n", "byte skip: 10"),
])
def test_headers_that_say_too_little_or_too_much_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_volume(tmp_path / name)
