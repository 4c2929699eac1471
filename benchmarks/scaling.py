"""How time and memory of the stages grow with what they are given: fitted exponents beside the expected ones.

    python benchmarks/scaling.py

One thread, CPU seconds, the best of three calls; added memory is the peak above what was held before the call. Exponents are the
slopes of straight lines through the logarithms. README.md says more.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cost import resident_mib  # also makes the package importable

from dinoreg.convex import FeatureVolume, cost_volume, coupled_convex
from dinoreg.convex import candidates as steps_up_to
from dinoreg.mind import mind_ssc
from dinoreg.pca import token_moments
from dinoreg.refine import LNCC, FeatureSSD, Similarity, refine
from dinoreg.weights import random_encoder

CALLS = 3
Case = tuple[float, Callable[[], object]]  # the size, and what is done with it


def cube(n: int, channels: int = 12) -> tuple[FeatureVolume, FeatureVolume]:
    generator = torch.Generator().manual_seed(0)
    fixed, moving = (FeatureVolume(torch.rand(channels, n, n, n, generator=generator) / 5, torch.ones(n, n, n)) for _ in range(2))
    return fixed, moving


def mind(n: int) -> Case:
    return n**3, partial(mind_ssc, torch.rand(n, n, n))


def search(n: int, half_width: int) -> Callable[[], object]:
    fixed, moving = cube(n)
    coarse = (n // 2,) * 3
    return lambda: coupled_convex(cost_volume(fixed, moving, half_width, coarse), steps_up_to(half_width))


def steps(n: int, iterations: int, term: str) -> Callable[[], object]:
    if term == "features":
        similarity: Similarity = FeatureSSD(*cube(n))
    else:
        similarity = LNCC(torch.rand(n, n, n), torch.rand(n, n, n), torch.ones(n, n, n), torch.ones(n, n, n), 7)
    return lambda: refine(similarity, torch.zeros(3, n, n, n), (1.0, 1.0, 1.0), iterations, rate=0.25, regularity=0.5,
                          step_sigma=1.0, damping=0.01)


def moments(slices: int, side: int) -> Callable[[], object]:
    tokens = torch.rand(slices, side, side, 384).half()
    return partial(token_moments, tokens, torch.ones(tokens.shape[:3], dtype=torch.bool))


def encode(images: int, side: int) -> Callable[[], object]:
    encoder = random_encoder("vits14_reg4", 0)

    def every() -> None:
        for _ in range(images):
            encoder.patch_tokens(torch.rand(1, 3, 14 * side, 14 * side), 1)

    return every


# What is measured against what, the expected exponents of time and memory ("-": too little to tell), and the cases.
TABLE: list[tuple[str, str, str, str, Callable[[], list[Case]]]] = [
    ("MIND", "voxels", "1", "1", lambda: [mind(n) for n in (64, 96, 128)]),
    ("search", "cells", "1", "1", lambda: [(n**3, search(n, 4)) for n in (32, 48, 64)]),
    ("search", "candidates", "1", "1", lambda: [((2 * w + 1) ** 3, search(40, w)) for w in (3, 5, 7)]),
    ("Adam on features", "cells", "1", "1", lambda: [(n**3, steps(n, 5, "features")) for n in (48, 72, 96)]),
    ("Adam on LNCC", "cells", "1", "1", lambda: [(n**3, steps(n, 5, "lncc")) for n in (48, 72, 96)]),
    ("Adam on LNCC", "iterations", "1", "0", lambda: [(count, steps(64, count, "lncc")) for count in (5, 10, 20)]),
    ("moments of PCA", "slices", "1", "0", lambda: [(count, moments(count, 24)) for count in (8, 16, 32)]),
    ("moments of PCA", "tokens a slice", "1", "-", lambda: [(side**2, moments(16, side)) for side in (16, 24, 32)]),
    ("encoder ViT-S", "slices", "1", "0", lambda: [(count, encode(count, 12)) for count in (1, 2, 4)]),
    ("encoder ViT-S", "tokens a slice", "1 to 2", "1", lambda: [(side**2, encode(1, side)) for side in (12, 18, 27)]),
]


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds and added MiB of a call."""
    work()  # what is loaded once
    seconds, mib = [], []
    for _ in range(CALLS):
        ctypes.CDLL(None).malloc_trim(0)  # what is free already must not take what the call asks for
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, start = resident_mib("VmRSS"), time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
        mib.append(resident_mib("VmHWM") - before)
        del result
    return min(seconds), max(mib)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> str:
    """The slope of a straight line through the logarithms."""
    return f"{np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-4)), 1)[0]:.2f}"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    columns = ["stage", "against", "sizes", "CPU s", "exponent", "expected", "added MiB", "exponent", "expected"]
    print(f"| {' | '.join(columns)} |\n| {' | '.join(['---'] * len(columns))} |", flush=True)
    for stage, against, time_grows, memory_grows, cases in TABLE:
        sizes, works = zip(*cases(), strict=True)
        with torch.no_grad():
            seconds, mib = zip(*map(measure, works), strict=True)
        cells = [stage, against, ", ".join(f"{size:.0f}" for size in sizes), ", ".join(f"{s:.2g}" for s in seconds),
                 exponent(sizes, seconds), time_grows, ", ".join(f"{m:.0f}" for m in mib),
                 exponent(sizes, mib) if memory_grows != "-" else "-", memory_grows]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
