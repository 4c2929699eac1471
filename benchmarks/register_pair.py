"""Registers the one pair of a folder and notes what it cost: the process that accuracy.py starts for each pair.

    python benchmarks/register_pair.py dinoreg|convexadam INPUT OUTPUT [--features F] [--encoder ARCH:SEED [--by-itself]] ...

Both methods read a Learn2Reg folder with a single pair and write its field by the same name and in the same convention, so that
one scorer serves both and the cost of either holds reading and writing. ``usage.json`` beside the field has the CPU seconds that
passed before the method began (interpreter and imports) and the peak memory. Nothing of this process was used before: a peak or
a cache of another pair cannot show.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def register_dinoreg(options: argparse.Namespace) -> tuple[int, float]:
    """Through process.main, as the container runs it, with the preset that the data set's name and modalities choose.

    Returns:
        Its exit status and the CPU seconds before it.
    """
    import process
    from dinoreg.cache import TokenCache
    from dinoreg.registration import Registrar
    from dinoreg.weights import random_encoder

    factory: Callable[..., Registrar] = Registrar
    start = time.process_time()
    if options.encoder is not None:
        arch, seed = options.encoder.split(":")
        factory = functools.partial(factory, encoder=random_encoder(arch, int(seed)))
    if options.by_itself:
        factory = functools.partial(factory, cache=TokenCache(options.output / "cache", 2**40))
    arguments = ["--input", str(options.input), "--output", str(options.output), "--mode", "learn2reg", "--split", "val",
                 "--features", options.features, "--device", "cpu", "--threads", str(options.threads)]
    return process.main(arguments, factory), start


def register_convexadam(options: argparse.Namespace) -> tuple[int, float]:
    """Through the package's Python function with its defaults: MIND radius 1 and dilation 2, grid 6, half-width 4, inverse
    consistency, Adam on grid 2 for 80 iterations, lambda 1.25; float32, as always on a CPU.

    Its field is in voxels of the fixed grid, components in axis order, and pulls back, as ours; only the component comes last.
    """
    import numpy as np
    import torch

    from dinoreg.io import read_volume, write_disp_nifti
    from dinoreg.learn2reg import disp_filename, load_dataset

    package = importlib.import_module("convexAdam.convex_adam_MIND")
    torch.set_num_threads(options.threads)
    start = time.process_time()
    pair, = load_dataset(options.input).pairs("val")
    fixed, moving = read_volume(pair.fixed), read_volume(pair.moving)
    disp = package.convex_adam_pt(fixed.array.astype(np.float32), moving.array.astype(np.float32), dtype=torch.float32,
                                  device=torch.device("cpu"))
    write_disp_nifti(options.output / disp_filename(pair), np.moveaxis(disp, 3, 0).astype(np.float32), fixed.affine)
    return 0, start


METHODS = {"dinoreg": register_dinoreg, "convexadam": register_convexadam}


def peak_mib() -> float:
    """The most memory this program has held. getrusage would also count what the process that started it held."""
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def main() -> int:
    """Command line; the exit status is that of the method."""
    parser = argparse.ArgumentParser(description="Register one pair and note what it cost.")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("input", type=Path, help="Learn2Reg folder with one pair under registration_val")
    parser.add_argument("output", type=Path, help="an empty folder")
    parser.add_argument("--features", default="mind")
    parser.add_argument("--encoder", metavar="ARCH:SEED", help="random weights in place of a checkpoint")
    parser.add_argument("--by-itself", action="store_true", help="encode each image by itself, as for a cache")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    status, start = METHODS[options.method](options)
    if status == 0:
        usage = {"startup_cpu_seconds": round(start, 3), "peak_mib": round(peak_mib(), 1)}
        (options.output / "usage.json").write_text(json.dumps(usage))
    return status


if __name__ == "__main__":
    sys.exit(main())
