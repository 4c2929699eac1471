"""What a run writes about itself: ``report.json``, the last file of a run. Its presence means that the run came to its end."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinoreg import __version__, metrics
from dinoreg.errors import DinoRegError, InputError
from dinoreg.slabs import slabs
from dinoreg.stages import peak_memory_mb

PACKAGES = ("torch", "numpy", "scipy", "nibabel", "SimpleITK", "h5py", "safetensors", "matplotlib", "evalutils")


def file_record(path: Path, root: Path | None) -> dict[str, Any]:
    """Name, size and sha256 of a file, or of all files of a folder (a DICOM series), one after the other by name.

    Args:
        path: the file or folder.
        root: what the name is relative to; None: the path as it is.

    Raises:
        InputError: if it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        for part in sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]:
            with part.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
                size += stream.tell()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check that it is still there") from error
    name = path if root is None else path.relative_to(root)
    return {"file": name.as_posix(), "bytes": size, "sha256": digest.hexdigest()}


def field_metrics(disp: npt.NDArray[np.float32], spacing: Sequence[float]) -> dict[str, float | None]:
    """How far and how smoothly a field displaces; no ground truth is needed.

    Args:
        disp: (3, i, j, k), voxels of the fixed grid.
        spacing: millimetres per voxel along (i, j, k).

    Returns:
        ``folds_percent`` (determinant <= 0), ``sdlogj`` (true), ``sdlogj_official`` (the scorer's arithmetic, + 3),
        ``jacobian_min``, ``jacobian_max``, ``displacement_mean_mm``, ``displacement_max_mm``; None where there is no value.
    """
    determinant = metrics.jacobian_determinant(disp)
    total, largest = 0.0, 0.0  # of the lengths
    for slab in slabs(disp.shape[1:]):
        squared = np.zeros(disp[0, slab].shape, dtype=np.float32)
        for component, length in zip(disp[:, slab], spacing, strict=True):
            squared += (component * np.float32(length)) ** 2
        distance = np.sqrt(squared)
        total, largest = total + float(distance.sum(dtype=np.float64)), max(largest, float(distance.max()))
    values = {
        "folds_percent": metrics.folds_percent(determinant),
        "sdlogj": metrics.sdlogj(determinant),
        "sdlogj_official": metrics.sdlogj_official(determinant),
        "jacobian_min": float(determinant.min()),
        "jacobian_max": float(determinant.max()),
        "displacement_mean_mm": total / disp[0].size,
        "displacement_max_mm": largest,
    }
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in values.items()}


def summary_line(field: Mapping[str, float | None], warnings: int) -> str:
    """What :func:`field_metrics` found, and the number of warnings, in one line for people."""
    texts = {"displacement_mean_mm": "mean displacement {:.1f} mm", "displacement_max_mm": "largest {:.1f} mm",
             "folds_percent": "folds {:.3f} %", "sdlogj": "SDlogJ {:.3f}"}
    parts = [text.format(value) for name, text in texts.items() if (value := field[name]) is not None]
    return f"whole field: {', '.join(parts)}; {warnings or 'no'} warning{'' if warnings == 1 else 's'}"


def failure_record(error: BaseException) -> dict[str, Any]:
    """What went wrong with a case: kind, exit code, message in one line."""
    if isinstance(error, DinoRegError):
        return {"kind": type(error).__name__, "exit_code": error.exit_code, "message": one_line(str(error))}
    message = f"unexpected {type(error).__name__}: {error}; please report it with the log"
    return {"kind": type(error).__name__, "exit_code": 1, "message": one_line(message)}


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


def environment() -> dict[str, Any]:
    """Versions of the program and of what it stands on, and the machine: what is needed to repeat a run."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return {"dinoreg": __version__, "python": platform.python_version(), "packages": installed, "platform": platform.platform(),
            "code": code_sha256(), "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}


@functools.cache
def code_sha256() -> str:
    """The sha256 of the package's source files, each with its name: a version number does not tell a changed line."""
    root, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def run_record(run: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """The whole report.

    Args:
        run: what holds for all pairs: contract, data set, split, preset, configuration, device...
        pairs: one record a pair, with an "error" where it failed, and "resumed" where it was done by an earlier run.
        seconds: wall time of the run.
    """
    failed = [pair for pair in pairs if "error" in pair]
    return {"status": "failed" if failed else "complete", "exit_code": failed[0]["error"]["exit_code"] if failed else 0,
            "pairs_registered": len(pairs) - len(failed), "pairs_failed": len(failed),
            "pairs_resumed": sum(bool(pair.get("resumed")) for pair in pairs), "seconds": round(seconds, 3),
            "peak_rss_mb": peak_memory_mb(), **run, "environment": environment(), "pairs": list(pairs)}
