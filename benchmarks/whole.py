"""What a whole pair of 256x192x192 costs through the container's door: time, memory, shares of the stages, the encoder's rate.

    python benchmarks/whole.py [--runs mind,vits14] [--slices N] [--threads N]

The pair is synthetic, and an encoder has seeded random weights: they cost what DINOv2 costs and say nothing of accuracy. It sees
every 6th slice at 448 px. Each run is a process of its own. README.md says more.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits in a loop would count as work
import numpy as np
import torch
from cost import resident_mib  # also makes the package importable
from torch import Tensor

from dinoreg.grid import resize, warp
from dinoreg.io import write_volume
from dinoreg.pca import fit_basis, project, token_moments
from dinoreg.registration import Registrar
from dinoreg.vit import PATCH, VitSpec, get_spec
from dinoreg.volume import Volume
from dinoreg.weights import Encoder, random_encoder

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (256, 192, 192)
TOKENS, GAP_MM = 32, 6.0  # 448 px along the longer side; voxels of 1 mm


def write_pair(folder: Path) -> None:
    """A textured ellipsoid in noise, and the same moved by up to 6 voxels, as the container finds a pair."""
    generator = torch.Generator().manual_seed(0)
    lines = [torch.linspace(-1, 1, n) for n in SHAPE]
    i, j, k = (line.square() for line in lines)
    inside = i[:, None, None] + j[:, None] + k < 0.8
    coarse, fine = (resize(torch.rand(1, *(n // size for n in SHAPE), generator=generator), SHAPE) for size in (32, 8))
    texture = coarse + fine
    image = (texture * 300 + 200) * inside
    motion = torch.randn(3, 4, 4, 4, generator=generator)
    disp = resize(motion * (6 / motion.abs().max()), SHAPE)
    for name, values in (("fixed", image), ("moving", warp(image, disp))):
        place = folder / "images" / name
        place.mkdir(parents=True)
        noisy = values[0] + 8 * torch.randn(SHAPE, generator=generator).abs()
        write_volume(place / f"{name}.mha", Volume(noisy.numpy().astype(np.int16), np.eye(4)))


class Timed:
    """An encoder that counts its work. With ``slices`` it encodes so many only, and gives their tokens for all others too."""

    def __init__(self, encoder: Encoder, slices: int | None) -> None:
        self.encoder, self.slices = encoder, slices
        self.seconds, self.wall, self.encoded, self.asked, self.flops = 0.0, 0.0, 0, 0, 0.0
        self.grid: tuple[int, ...] = ()
        self.kept: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def patch_tokens(self, images: Tensor, last_layers: int) -> Tensor:
        self.asked += len(images)
        if self.slices is not None and self.encoded >= self.slices and self.kept is not None:
            return self.kept[:1].expand(len(images), -1, -1, -1)
        cpu, wall = time.process_time(), time.perf_counter()
        self.kept = self.encoder.patch_tokens(images, last_layers)
        self.seconds, self.wall = self.seconds + time.process_time() - cpu, self.wall + time.perf_counter() - wall
        self.encoded += len(images)
        self.grid = tuple(self.kept.shape[1:])
        self.flops = flops(get_spec(self.encoder.arch), self.grid[0] * self.grid[1])
        return self.kept


def flops(spec: VitSpec, patches: int) -> float:
    """Of a slice: matrices of the blocks, attention, embedding of the patches; for a model with a plain feed-forward part."""
    n, d = patches + 1 + spec.registers, spec.dim
    return float(spec.depth * (24 * n * d**2 + 4 * n**2 * d) + 2 * patches * 3 * PATCH**2 * d)


def best(work: Callable[[], object], times: int = 5) -> float:
    """CPU seconds of the quickest of some calls."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def peak_rate(rows: int, width: int) -> float:
    """FLOP per CPU second of torch.mm on the shapes of the encoder's blocks: their mean, weighted by their work."""
    flops = seconds = 0.0
    for k, n in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
        a, b = torch.rand(rows, k), torch.rand(k, n)
        flops += 2.0 * rows * k * n
        seconds += best(functools.partial(torch.mm, a, b))
    return flops / seconds


def pca_cost(slices: int, grid: tuple[int, ...]) -> tuple[float, float]:
    """CPU seconds and MiB beyond the tokens for the components of two volumes of random tokens, all of them foreground."""
    generator = torch.Generator().manual_seed(0)
    volumes = [torch.empty(slices // 2, *grid, dtype=torch.float16).copy_(torch.randn(slices // 2, *grid, generator=generator))
               for _ in range(2)]
    every = torch.ones(volumes[0].shape[:3], dtype=torch.bool)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = resident_mib("VmRSS"), time.process_time()
    first, second = (token_moments(tokens, every) for tokens in volumes)
    basis = fit_basis(first + second, 24)
    for tokens in volumes:
        project(tokens, every, basis, True)
    return time.process_time() - start, resident_mib("VmHWM") - before


def measure(run: str, slices: int | None, threads: int, folder: Path) -> dict[str, Any]:
    """Register the pair and say what it cost; in a process of its own."""
    import process

    timed = None if run == "mind" else Timed(random_encoder(f"{run}_reg4", 0), slices)

    def registrar(config: Any, **options: Any) -> Registrar:
        encoder = replace(config.encoder, long_side_tokens=TOKENS, gap_mm=GAP_MM, crop=False)
        return Registrar(replace(config, encoder=encoder), **options, encoder=timed)

    cpu, wall, out = time.process_time(), time.perf_counter(), folder / run
    arguments = ["--input", str(folder), "--output", str(out), "--mode", "single", "--preset", "generic", "--device", "cpu",
                 "--features", "mind" if timed is None else "dinov2", "--threads", str(threads)]
    if process.main(arguments, registrar):
        raise SystemExit("the registration failed")
    found: dict[str, Any] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "mib": resident_mib("VmHWM")}
    report = json.loads((out / "report.json").read_text())
    found["stages"] = {name: stage["seconds"] for name, stage in report["pairs"][0]["stages"].items()}
    if timed is not None:
        skipped = timed.asked / timed.encoded
        more = timed.wall * (skipped - 1)
        found["wall"], found["cpu"] = found["wall"] + more, found["cpu"] + timed.seconds * (skipped - 1)
        found["stages"]["encode"] += more
        seconds, (h, w, width) = timed.seconds * skipped, timed.grid
        spent, mib = pca_cost(timed.asked, timed.grid)
        rates = [timed.flops * timed.encoded / timed.seconds / 1e9, peak_rate(max(1, 1024 // (h * w)) * h * w, width) / 1e9]
        found["encoder"] = {"slices": timed.asked, "encoded": timed.encoded, "cpu": seconds, "gflop": timed.flops / 1e9,
                            "rate": rates[0], "peak": rates[1], "pca": spent, "pca_mib": mib}
    return found


def import_seconds() -> tuple[float, float]:
    """CPU seconds of importing torch, and of dinoreg's registration after it: the less of three processes each."""
    code = ("import time, numpy; a = time.process_time(); import torch; b = time.process_time(); import dinoreg; "
            "dinoreg.register; c = time.process_time(); print(b - a, c - b)")
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
            for _ in range(3)]
    return min(float(run[0]) for run in runs), min(float(run[1]) for run in runs)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What a whole pair costs.")
    parser.add_argument("--runs", default="mind,vits14", help="of mind, vits14, vitb14, vitl14")
    parser.add_argument("--slices", type=int, help="encode so many slices only and extrapolate; all if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        run, folder = options.measure
        found = measure(run, options.slices, options.threads, Path(folder))
        (Path(folder) / f"{run}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder))
        for run in options.runs.split(","):
            extra = ["--slices", str(options.slices)] if options.slices else []
            subprocess.run([sys.executable, __file__, "--threads", str(options.threads), *extra, "--measure", run, folder],
                           check=True, stdout=sys.stderr)
            found = json.loads((Path(folder) / f"{run}.json").read_text())
            total = sum(found["stages"].values())
            print(f"{run}: {found['wall']:.1f} s, {found['cpu']:.1f} CPU s, peak {found['mib']:.0f} MiB; shares of the time: "
                  + ", ".join(f"{name} {100 * seconds / total:.1f} %" for name, seconds in found["stages"].items()), flush=True)
            if encoder := found.get("encoder"):
                print("  encoder: {slices} slices of {gflop:.0f} GFLOP ({encoded} encoded, the rest extrapolated), {cpu:.1f} "
                      "CPU s, {rate:.0f} GFLOP a CPU second; torch.mm of its shapes {peak:.0f}; PCA {pca:.2f} CPU s, "
                      "{pca_mib:.0f} MiB beyond the tokens".format(**encoder), flush=True)
    print("import: torch {:.2f} CPU s, dinoreg after it {:.2f}".format(*import_seconds()))


if __name__ == "__main__":
    main()
