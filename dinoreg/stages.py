"""What the stages of a run cost in time and memory, and what is said where memory runs out."""

from __future__ import annotations

import logging
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dinoreg.errors import RegistrationError

log = logging.getLogger(__name__)

# CUDA; the two of torch's CPU allocator; cuBLAS
_OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED")


@contextmanager
def stage(name: str, stages: dict[str, dict[str, float]]) -> Iterator[None]:
    """Time a stage, log it and note it under its name with the peak memory so far, in MiB: of the process and of the GPU.

    Raises:
        RegistrationError: if memory runs out in the stage.
    """
    start = time.monotonic()
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; numpy's is a MemoryError
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        gpu = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error) or "CUBLAS" in str(error)
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise RegistrationError(f"{'GPU ' if gpu else ''}memory ran out in stage {name} ({reason}); "
                                f"{'use --device cpu or a larger GPU' if gpu else 'give the process more memory'}, "
                                "take a smaller encoder, or resample the images to a coarser grid") from error
    stages[name] = {"seconds": round(time.monotonic() - start, 3), "peak_rss_mb": peak_memory_mb()}
    if torch.cuda.is_available():
        stages[name]["peak_cuda_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    log.info("%s: %.1f s, peak %.0f MB", name, stages[name]["seconds"], stages[name]["peak_rss_mb"])


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
