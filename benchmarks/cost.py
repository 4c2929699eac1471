"""What the solver costs beside the published package ConvexAdam at equal settings: CPU seconds, memory, and is it the same field?

    python benchmarks/cost.py [--cases small,large,search] [--iterations 10] [--markdown] [--check]

Both get the same 24 feature channels at the voxels and give a dense field. Every figure comes from a process of its own, on one
thread: CPU seconds of the call, without imports, loading of compiled loops and making of features; and how far the memory of the
process rose above what it held before the call. ``pip install -r benchmarks/requirements.txt`` first. README.md says more.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dinoreg import compiled, published  # noqa: E402
from dinoreg.config import PublishedConfig, QuirksConfig  # noqa: E402
from dinoreg.grid import Shape, apply_axes, area_matrix, resize, resize_disp, shape3, warp  # noqa: E402

CHANNELS = 24
PER_CHANNEL = 12  # ConvexAdam's loss is 12 times the mean over channels: features are scaled by its root for ours
ADAM_SPACING, SMOOTHNESS = 2, 1.25
CASES: dict[str, tuple[Shape, int, int, bool]] = {  # voxels, voxels a cell, largest displacement in cells, with Adam
    "small": ((128, 128, 128), 6, 4, True), "large": ((256, 192, 192), 6, 4, True), "search": ((192, 160, 192), 4, 6, False)}
# The coordinate arithmetic of ConvexAdam, which decides its field.
QUIRKS = QuirksConfig(truncated_pooling=True, untied_start=True, zero_border=True, short_displacement=True)


def features(shape: Shape, noise: float) -> tuple[Tensor, Tensor]:
    """Smooth random channels and the same moved by up to 5 voxels, a tenth of it new; with ``noise`` on the fixed ones."""
    generator = torch.Generator().manual_seed(0)
    coarse = tuple(max(2, n // 6) for n in shape)
    fixed, moving = torch.empty(CHANNELS, *shape), torch.empty(CHANNELS, *shape)
    disp = torch.randn(3, 4, 4, 4, generator=generator)
    disp = resize(disp * (5 / disp.abs().max()), shape)
    for c in range(CHANNELS):  # one at a time: the peak of making them is not to hide that of the solver
        values, new = resize(torch.rand(2, *coarse, generator=generator), shape)
        fixed[c] = warp(values[None], disp)[0]
        moving[c] = values + 0.1 * new
        if noise:
            fixed[c] += noise * torch.randn(shape, generator=generator)
    return fixed, moving


def ours(fixed: Tensor, moving: Tensor, spacing: int, half_width: int, iterations: int) -> Tensor:
    """The solver ``published`` with ConvexAdam's settings: Adam at half the resolution, three 3^3 boxes, rate 1."""
    config = PublishedConfig(pool=spacing, half_width=half_width, iterations=iterations, rate=1.0, boxes=3, box_width=3,
                             regularity=SMOOTHNESS)
    disp, _ = published.discrete(fixed, moving, config, QUIRKS)
    if not iterations:
        return disp
    shape = shape3(fixed)
    half: Shape = tuple(n // ADAM_SPACING for n in shape)  # type: ignore[assignment]
    down = [area_matrix(n, m) for n, m in zip(shape, half, strict=True)]
    halved = (apply_axes(x, down).mul_(PER_CHANNEL**0.5) for x in (fixed, moving))
    disp = resize_disp(disp, half)
    disp, _ = published.refine(halved, disp, config, QUIRKS)
    return resize_disp(disp, shape)


def convexadam(fixed: Tensor, moving: Tensor, spacing: int, half_width: int, iterations: int) -> Tensor:
    """The package's own function, given the features in place of those that it would make."""
    package = importlib.import_module("convexAdam.convex_adam_MIND")
    package.extract_features = lambda **_: (fixed[None], moving[None])
    image = torch.zeros(shape3(fixed))
    found = package.convex_adam_pt(image, image, grid_sp=spacing, disp_hw=half_width, selected_niter=iterations,
                                   lambda_weight=SMOOTHNESS if iterations else 0, grid_sp_adam=ADAM_SPACING, dtype=torch.float32,
                                   device=torch.device("cpu"))
    return torch.from_numpy(np.moveaxis(found, 3, 0).astype(np.float32))


METHODS: dict[str, Callable[[Tensor, Tensor, int, int, int], Tensor]] = {"DINO-Reg": ours, "ConvexAdam": convexadam}


def resident_mib(what: str) -> float:
    match = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def measure(method: str, case: str, iterations: int, noise: float, out: Path) -> None:
    """Run in a process of its own: one field and what it cost."""
    torch.set_num_threads(1)
    shape, spacing, half_width, _ = CASES[case]
    pair = features(shape, noise)
    METHODS[method](*(x[:, :24, :24, :24].contiguous() for x in pair), 4, 1, min(iterations, 1))  # loads what is loaded once
    ctypes.CDLL(None).malloc_trim(0)  # what is free already must not take what the call asks for
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = resident_mib("VmRSS"), time.process_time()
    with torch.no_grad() if method == "DINO-Reg" else torch.enable_grad():
        disp = METHODS[method](*pair, spacing, half_width, iterations)
    seconds = time.process_time() - start
    np.save(out.with_suffix(".npy"), disp.detach().numpy())
    out.write_text(json.dumps({"seconds": seconds, "mib": resident_mib("VmHWM") - before}))


def child(method: str, case: str, iterations: int, folder: Path, noise: float = 0.0) -> tuple[dict[str, float], np.ndarray]:
    """What a run in a new process cost, and its field."""
    out = folder / f"{method}_{case}_{iterations}_{noise}.json"
    command = [sys.executable, __file__, "--measure", method, case, str(iterations), str(noise), str(out)]
    subprocess.run(command, check=True)
    print(f"{method}, {case}, {iterations} iterations: {out.read_text()}", file=sys.stderr)
    return json.loads(out.read_text()), np.load(out.with_suffix(".npy"))


def row(cells: list[str], markdown: bool) -> str:
    return f"| {' | '.join(cells)} |" if markdown else "  ".join(f"{cell:>14}" for cell in cells)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="The solver's cost beside that of ConvexAdam.")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--iterations", type=int, default=10, help="of Adam")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 if a field is not ConvexAdam's")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        method, case, iterations, noise, out = options.measure
        measure(method, case, int(iterations), float(noise), Path(out))
        return 0
    columns = ["voxels", "stages", "CPU s", "ConvexAdam", "ratio", "added MiB", "ConvexAdam", "ratio", "mean diff.", "max diff."]
    print(row(columns, options.markdown))
    if options.markdown:
        print(row(["---"] * len(columns), True))
    compiled.kernels()  # compiled and kept before the first process needs them
    same = True
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases.split(","):
            shape, _, _, with_adam = CASES[case]
            runs = [(0, "search"), (options.iterations, f"search and {options.iterations} iterations")]
            for iterations, stages in runs[: 1 + with_adam]:
                (our, disp), (their, expected) = (child(method, case, iterations, Path(folder)) for method in METHODS)
                difference = np.abs(disp - expected)
                same &= bool(difference.max() < 1e-5 if iterations == 0 else difference.mean() < 0.05)
                cells = ["x".join(map(str, shape)), stages]
                for name, digits in (("seconds", 2), ("mib", 0)):
                    cells += [f"{our[name]:.{digits}f}", f"{their[name]:.{digits}f}", f"{their[name] / our[name]:.1f}"]
                print(row([*cells, f"{difference.mean():.1e}", f"{difference.max():.1e}"], options.markdown), flush=True)
            if case == "small":  # how far ConvexAdam is from itself, with noise of 1e-6 of the features' range
                _, other = child("ConvexAdam", case, options.iterations, Path(folder), 1e-6)
                difference = np.abs(other - expected)
                cells = ["x".join(map(str, shape)), "ConvexAdam, noise 1e-6", *["-"] * 6]
                print(row([*cells, f"{difference.mean():.1e}", f"{difference.max():.1e}"], options.markdown), flush=True)
    return 1 if options.check and not same else 0


if __name__ == "__main__":
    sys.exit(main())
