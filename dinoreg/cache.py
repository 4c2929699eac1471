"""What the encoder saw of volumes, kept on disk by the hash of everything it follows from: each volume is encoded once.

A file an entry: a line with the sha256 of the rest, then safetensors. Entries appear whole or not at all, so any number of
processes, on any number of machines with a common file system, may share a folder and be killed at any moment. An entry is
verified whenever it is read; one that is damaged is removed and made again. When the folder outgrows its limit, the entries that
were not used for longest go.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dinoreg.encoding import EncodedVolume
from dinoreg.errors import ConfigError
from dinoreg.io import atomic_write, check_writable
from dinoreg.pca import Moments
from dinoreg.slices import TokenGeometry, TokenGrid

SUFFIX = ".tokens"
ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's any more
LARGEST_SHARE = 0.5  # of the limit that one entry may take

log = logging.getLogger(__name__)


class TokenCache:
    """A folder of encoded volumes.

    Args:
        folder: is made if it is missing.
        limit_bytes: how large it may grow; at the moment of writing it holds one entry more.

    Raises:
        ConfigError: a limit that is not positive.
        OutputError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        if limit_bytes <= 0:
            raise ConfigError(f"the cache needs a size above 0; got {limit_bytes} bytes")
        check_writable(folder)
        self.folder = folder
        self.limit_bytes = limit_bytes

    def get(self, key: str) -> EncodedVolume | None:
        """The entry of a key (see :func:`dinoreg.encoding.encoding_key`), or None."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: cannot be read (%s): the volume is encoded again", path, error.strerror or error)
            return None
        head, _, payload = content.partition(b"\n")
        try:
            if head != hashlib.sha256(payload).hexdigest().encode():
                raise ValueError("its content is not what its sha256 says")
            entry = _from_tensors(safetensors.torch.load(payload))
        except (ValueError, KeyError, SafetensorError) as error:
            log.warning("%s: damaged (%s): removed, the volume is encoded again", path, error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return entry

    def put(self, key: str, entry: EncodedVolume) -> None:
        """Keep an entry, and remove others if they are too many.

        Raises:
            OutputError: if it cannot be written.
        """
        payload = safetensors.torch.save(_to_tensors(entry))
        with atomic_write(self._path(key)) as temporary, temporary.open("wb") as stream:
            stream.write(hashlib.sha256(payload).hexdigest().encode() + b"\n")
            stream.write(payload)
        self._shrink(key)

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _shrink(self, newest: str) -> None:
        """Bring the folder under its limit; another process may be doing the same."""
        entries, now = [], time.time()
        for item in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                found = item.stat()
                if item.name.startswith(".") and item.name.endswith(SUFFIX) and now - found.st_mtime > ABANDONED:
                    Path(item.path).unlink(missing_ok=True)
                elif item.name.endswith(SUFFIX) and not item.name.startswith("."):
                    entries.append((found.st_mtime, item.path, found.st_size))
        total = sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if total <= self.limit_bytes:
                break
            if path == str(self._path(newest)) and size <= LARGEST_SHARE * self.limit_bytes:
                continue
            with contextlib.suppress(OSError):
                Path(path).unlink(missing_ok=True)
            total -= size


def _to_tensors(entry: EncodedVolume) -> dict[str, Tensor]:
    geometry = entry.grid.geometry
    tensors = {"tokens": entry.grid.tokens.contiguous(), "foreground": entry.grid.foreground.to(torch.uint8),
               "shape": torch.tensor(geometry.shape), "axes": torch.tensor(geometry.axes),
               "extent": torch.tensor(geometry.extent, dtype=torch.float64)}
    tensors |= {f"positions{axis}": torch.from_numpy(at.copy()) for axis, at in enumerate(geometry.positions)}
    if entry.moments is not None:
        moments = entry.moments
        tensors |= {"count": torch.tensor(moments.count), "mean": moments.mean, "scatter": moments.scatter.contiguous()}
    return tensors


def _from_tensors(tensors: dict[str, Tensor]) -> EncodedVolume:
    i, j, k = (int(n) for n in tensors["shape"])
    s, h, w = (int(n) for n in tensors["axes"])
    lines = [np.asarray(tensors[f"positions{axis}"].numpy(), dtype=np.float64) for axis in range(3)]
    ends = [(float(low), float(high)) for low, high in tensors["extent"]]
    geometry = TokenGeometry((i, j, k), (s, h, w), (lines[0], lines[1], lines[2]), (ends[0], ends[1], ends[2]))
    moments = Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"]) if "count" in tensors else None
    return EncodedVolume(TokenGrid(tensors["tokens"], tensors["foreground"].bool(), geometry), moments)
