"""How much memory this process has, holds and may hold."""

from __future__ import annotations

import ctypes
import re
import sys
from functools import lru_cache
from pathlib import Path

from dinoreg.errors import ConfigError


def parse_bytes(text: str) -> int:
    """"8G", "1.5GiB", "900M" or plain bytes; K, M and G are powers of 1024.

    Raises:
        ConfigError: anything else, or nothing above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    if size <= 0:
        raise ConfigError(f"memory {text!r}: expected a size such as 8G or 900M")
    return size


def cgroup_limit(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The memory limit, in bytes, of the control group (v1 or v2) that this process is in, or of one above it; None if there is
    none, or it cannot be read.

    A container sees its own group as the root of the file system of groups, whatever its path says: both places are looked at.
    """
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for controllers, path in ((line[1], line[2]) for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # no such file, or "max"
                continue
    return min((limit for limit in limits if limit < 2**60), default=None)  # v1 writes a huge number for none


def resident_bytes() -> int:
    """What this process holds now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that this process has held so far. (getrusage would also count what the process that started it held.)"""
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def give_back() -> None:
    """Return to the system what was freed and is kept for later (glibc): up to some 30 MB an array."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)
