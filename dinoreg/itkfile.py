"""Where a MetaImage or NRRD keeps its voxels, and whether all of them are there: asked before ITK reads the file.

Packed voxels that end early, or whose packed size the header does not give, come back from ITK 5.4 as zeros (MetaImage), or with
whatever a wrong checksum hides (NRRD); a header that declares gigabytes makes it take them before it looks for them; and a
MetaImage of 256 dimensions, or words of some hundred letters in either format, end the process.
"""

from __future__ import annotations

import bz2
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dinoreg.errors import InputError

HEADER = 2**16  # bytes within which a header has to end
BLOCK = 2**22  # bytes unpacked at a time
MAX_REST = 2**26  # bytes that may follow the voxels
MAX_DIMENSIONS = 10  # of ITK's MetaImage; nothing there holds more
MAX_WORD, MAX_LINE = 200, 500  # bytes of a text in a MetaImage's header, and of a field in a NRRD's
_WORDS = (rb"(?im)^(\w*Comment|Name|\w*Type\w*|\w*Date|Modality|\w*Units|AnatomicalOrientation|SequenceID)[ \t]*="
          rb"[^\r\n]{%d}" % MAX_WORD)
EXPORT = "the file is truncated or damaged: copy or export it again"


@dataclass(frozen=True)
class VoxelPlace:
    """Where the voxels of an image file lie.

    Attributes:
        file: name of the file beside the header that holds them; None: the header's own.
        offset: of their first byte there.
        packing: "zlib", "gzip", "bzip2", "raw", or "" (text).
        size: bytes that they take there, where the header says it.
    """

    file: str | None
    offset: int
    packing: str
    size: int | None = None


def voxel_place(path: Path, suffix: str) -> VoxelPlace:
    """Where the voxels of a .mha, .mhd or .nrrd lie, by its header.

    Raises:
        InputError: if the header has no end, more dimensions than its format, or a way of packing that cannot be checked.
    """
    with path.open("rb") as stream:
        start = stream.read(HEADER)
    return _nrrd(path, start) if suffix == ".nrrd" else _meta(path, start)


def _meta(path: Path, start: bytes) -> VoxelPlace:
    end = re.search(rb"(?im)^ElementDataFile[ \t]*=[ \t]*([^\r\n]*?)[ \t]*(\r?\n|\r|\Z)", start)
    if end is None:
        raise InputError(f"{path}: expected a MetaImage; got a header without ElementDataFile; {EXPORT}")
    header, name = start[: end.start()], end.group(1).decode("utf-8", "replace")
    for value in re.findall(rb"(?im)^NDims[ \t]*=[ \t]*([^\r\n]*)", header):
        if not re.fullmatch(rb"\d{1,2}[ \t]*", value) or not 1 <= int(value) <= MAX_DIMENSIONS:
            got = value[:20].decode("utf-8", "replace")
            raise InputError(f"{path}: expected a 3D image; got NDims = {got}; correct the header", "not-3d")
    if long := re.search(_WORDS, header):
        raise InputError(f"{path}: expected at most {MAX_WORD} letters of {long.group(1).decode()}; got more; shorten it")
    text = re.search(rb"(?im)^BinaryData[ \t]*=[ \t]*[f0]", header)
    packed = re.search(rb"(?im)^CompressedData[ \t]*=[ \t]*[t1]", header)
    size = re.findall(rb"(?m)^CompressedDataSize[ \t]*=[ \t]*(\d{1,15})[ \t]*\r?$", header) if packed else []
    if packed and len(size) != 1:
        raise InputError(f"{path}: expected the size of its packed voxels (CompressedDataSize); got {len(size) or 'none'}; "
                         "write the image again")
    inside = name.upper() == "LOCAL"
    return VoxelPlace(None if inside else name, end.end() if inside else 0, "zlib" if packed else "" if text else "raw",
                      int(size[0]) if packed else None)


def _nrrd(path: Path, start: bytes) -> VoxelPlace:
    end = re.search(rb"\r?\n\r?\n", start)
    header = start[: end.start()] if end else start
    file = re.search(rb"(?im)^data ?file:[ \t]*([^\r\n]*?)[ \t]*\r?$", header)
    if end is None and (file is None or len(start) == HEADER):
        raise InputError(f"{path}: expected a NRRD; got a header without an end; {EXPORT}")
    if any(len(line) > MAX_LINE and not line.startswith(b"#") and b":=" not in line for line in header.splitlines()):
        raise InputError(f"{path}: expected a NRRD; got a field of more than {MAX_LINE} bytes in its header; {EXPORT}")
    encoding = re.search(rb"(?im)^encoding:[ \t]*(\S+)", header)
    packing = {b"gzip": "gzip", b"gz": "gzip", b"bzip2": "bzip2", b"bz2": "bzip2", b"raw": "raw"}.get(
        encoding.group(1).lower() if encoding else b"", "")
    if packing and (skip := re.search(rb"(?im)^(line|byte) ?skip:[ \t]*-?\d*[1-9]\d*", header)):
        raise InputError(f"{path}: expected voxels from the beginning of their file; got {skip.group().decode()!r}; convert the "
                         "image to .nii.gz")
    return VoxelPlace(file.group(1).decode("utf-8", "replace") if file else None, end.end() if end and not file else 0, packing)


def check_whole(path: Path, place: VoxelPlace, declared: int) -> None:
    """Refuse a file that holds less than its header declares, or whose checksum is wrong; nothing of it is kept in memory.

    Args:
        path: the file named by the user.
        place: see :func:`voxel_place`.
        declared: bytes of voxels, by the header.

    Raises:
        InputError: see above.
        OSError, EOFError, zlib.error: the packed bytes are damaged.
    """
    source = path if place.file is None else path.parent / place.file
    if place.packing == "raw":
        found = source.stat().st_size - place.offset
    elif place.packing:
        with source.open("rb") as stream:
            stream.seek(place.offset)
            found = 0
            for block in _UNPACK[place.packing](stream, place.size):  # to the end, where the checksum is
                found += block
                if found > declared + MAX_REST:
                    raise InputError(f"{path}: expected {declared} bytes of voxels, as its header declares; got more; {EXPORT}")
    else:
        return
    if found < declared:
        raise InputError(f"{path}: expected {declared} bytes of voxels, as its header declares; got {found}; {EXPORT}")


def _unzlib(stream: BinaryIO, size: int | None) -> Iterator[int]:
    """Sizes of the unpacked blocks of a zlib stream; raises if it has no end within ``size`` bytes."""
    unpacker, left = zlib.decompressobj(), size or 0
    while not unpacker.eof:
        data = unpacker.unconsumed_tail
        if not data:
            data = stream.read(min(left, 2**16))
            left -= len(data)
        block = unpacker.decompress(data, BLOCK)
        if not data and not block:
            raise EOFError("the packed voxels end early")
        yield len(block)


def _ungzip(stream: BinaryIO, _: int | None) -> Iterator[int]:
    with gzip.open(stream) as unpacked:
        while block := unpacked.read(BLOCK):
            yield len(block)


def _unbzip2(stream: BinaryIO, _: int | None) -> Iterator[int]:
    with bz2.open(stream) as unpacked:
        while block := unpacked.read(BLOCK):
            yield len(block)


_UNPACK: dict[str, Callable[[BinaryIO, int | None], Iterator[int]]] = {"zlib": _unzlib, "gzip": _ungzip, "bzip2": _unbzip2}
