"""The stages of a run: what they cost in time and memory, how far they are, and what is said where memory runs out.

Whoever wants to see how far a run is opens :func:`watched` around it; the code that does the work calls :func:`advance`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from dinoreg.errors import RegistrationError
from dinoreg.memory import give_back, peak_bytes

log = logging.getLogger(__name__)

# CUDA; the two of torch's CPU allocator; cuBLAS
_OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED")

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all
_NO_STAGE: tuple[str, int] = ("", 1)
_watcher: ContextVar[Progress | None] = ContextVar("watcher", default=None)
_stage: ContextVar[tuple[str, int]] = ContextVar("stage", default=_NO_STAGE)  # its name and number of steps


@contextmanager
def watched(progress: Progress | None) -> Iterator[None]:
    """Have ``progress`` called through the stages within: with (stage, 0, 1) at the beginning of each, with its steps where it
    has any, and with (stage, n, n) at its end. An exception in it ends the run; None: nobody looks."""
    token = _watcher.set(progress)
    try:
        yield
    finally:
        _watcher.reset(token)


def advance(done: int, total: int, *, part: int = 0, parts: int = 1) -> None:
    """Say how far the present stage is: ``done`` of ``total`` steps of one of several equal parts."""
    done, total = part * total + done, parts * total
    name, _ = _stage.get()
    _stage.set((name, total))
    if (progress := _watcher.get()) is not None:
        progress(name, done, total)


@contextmanager
def stage(name: str, stages: dict[str, dict[str, float]]) -> Iterator[None]:
    """Time a stage, log it and note it under its name with the peak memory so far, in MiB: of the process and of the GPU.

    Raises:
        RegistrationError: if memory runs out in the stage.
    """
    start = time.monotonic()
    token = _stage.set((name, 1))
    try:
        advance(0, 1)
        yield
        total = _stage.get()[1]
        advance(total, total)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; numpy's is a MemoryError
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        gpu = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error) or "CUBLAS" in str(error)
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise RegistrationError(f"{'GPU ' if gpu else ''}memory ran out in stage {name} ({reason}); "
                                f"{'use --device cpu or a larger GPU' if gpu else 'give the process more memory'}, "
                                "take a smaller encoder, or resample the images to a coarser grid") from error
    finally:
        _stage.reset(token)
        give_back()
    stages[name] = {"seconds": round(time.monotonic() - start, 3), "peak_rss_mb": peak_memory_mb()}
    if torch.cuda.is_available():
        stages[name]["peak_cuda_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    log.info("%s: %.1f s, peak %.0f MB", name, stages[name]["seconds"], stages[name]["peak_rss_mb"])


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MiB."""
    return round(peak_bytes() / 2**20, 1)
