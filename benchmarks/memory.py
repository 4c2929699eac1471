"""The planner's memory of each stage (dinoreg/plan.py) beside what is measured, over sizes, features and presets.

    python benchmarks/memory.py [CASE ...] [--threads N] [--keep DIR] [--paper]

A case is SIZE:PRESET:FEATURES, with :ARCH for a random encoder and @SHARE for a share of the iterations, which memory does not
depend on: 256x192x192:brain-mr:mind@0.1. Each is a pair of made-up images, registered by process.py in a process of its own; the
peak of each stage is the kernel's (VmHWM, reset at the stage's beginning), less what the process held before the images were
read. ``--paper`` prints plans for what cannot be run here, such as ViT-L on a GPU. The exit status is 1 if a case's peak is not
within 25 % of its plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CASES = ("96x96x96:generic:mind@0.1", "160x192x160:brain-mr:mind@0.05", "256x192x192:thorax-cbct:mind@0.05",
         "192x160x192:abdomen-mrct:mind@0.05", "256x192x192:generic:mind@0.02", "128x128x96:generic:dinov2+mind:vits14_reg4@0.05",
         "192x160x64:abdomen-mrct:dinov2:vits14_reg4@0.02", "300x300x200:thorax-cbct:mind@0.02")
WITHIN = 0.25
PAPER = (("512x512x400", "thorax-cbct", "mind", None), ("512x512x400", "thorax-cbct", "dinov2+mind", "vitl14_reg4"),
         ("512x512x400", "generic", "dinov2+mind", "vitl14_reg4"), ("256x192x192", "generic", "dinov2+mind", "vitl14_reg4"))


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run."""

    shape: tuple[int, int, int]
    preset: str
    features: str
    arch: str | None
    share: float

    @staticmethod
    def parse(text: str) -> Case:
        """Out of SIZE:PRESET:FEATURES[:ARCH][@SHARE]."""
        rest, _, share = text.partition("@")
        size, preset, features, *arch = rest.split(":")
        i, j, k = (int(n) for n in size.split("x"))
        return Case((i, j, k), preset, features, arch[0] if arch else None, float(share or 1))


def write_pair(folder: Path, shape: tuple[int, int, int]) -> None:
    """A Learn2Reg folder with one pair: a texture in a cylinder, int16, and the same some voxels farther."""
    import numpy as np
    import torch
    from torch.nn.functional import interpolate

    from dinoreg.io import write_volume
    from dinoreg.volume import Volume

    noise = torch.randn(1, 1, *(max(4, n // 12) for n in shape), generator=torch.Generator().manual_seed(0))
    whole = interpolate(noise, size=[n + 8 for n in shape], mode="trilinear")[0, 0].numpy()
    i, j = (np.linspace(-1, 1, n) for n in whole.shape[:2])
    whole = np.where((i[:, None] ** 2 + j**2 < 0.8)[..., None], 40 + 200 * whole, -1000).astype(np.int16)
    for name, (a, b, c) in (("0001_0001", (4, 4, 4)), ("0001_0000", (6, 3, 5))):
        part = whole[a : a + shape[0], b : b + shape[1], c : c + shape[2]]
        write_volume(folder / "imagesTr" / f"Made_{name}.nii.gz", Volume(part, np.diag([0.7, 0.7, 0.8, 1.0])))
    pair = {role: f"./imagesTr/Made_0001_{modality}.nii.gz" for role, modality in (("fixed", "0001"), ("moving", "0000"))}
    (folder / "Made_dataset.json").write_text(json.dumps(
        {"name": "Made", "modality": {"0": "CT", "1": "CT"}, "registration_val": [pair], "registration_test": []}))


def status(name: str) -> int:
    """Bytes by the kernel's account of this process: VmRSS or VmHWM."""
    match = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def child(case: Case, source: Path, output: Path, threads: int) -> int:
    """Register, and write the peak of each stage to peaks.json."""
    import process
    from dinoreg import config
    from dinoreg.registration import Registrar
    from dinoreg.stages import watched
    from dinoreg.weights import random_encoder

    preset = config.get_preset(case.preset)
    levels = tuple((cell, max(1, round(n * case.share))) for cell, n in preset.refine.levels)
    config.PRESETS[case.preset] = dataclasses.replace(preset, refine=dataclasses.replace(preset.refine, levels=levels))
    factory: Callable[..., Registrar] = Registrar
    if case.arch is not None:
        factory = functools.partial(Registrar, encoder=random_encoder(case.arch, 0))
    peaks: dict[str, int] = {}

    def look(stage: str, done: int, total: int) -> None:
        if done:
            peaks[stage] = max(peaks[stage], status("VmHWM"))
        else:
            peaks[stage] = 0
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

    arguments = ["--input", str(source), "--output", str(output), "--mode", "learn2reg", "--split", "val", "--device", "cpu",
                 "--preset", case.preset, "--features", case.features, "--threads", str(threads)]
    with watched(look):
        result = process.main(arguments, factory)
    (output / "peaks.json").write_text(json.dumps(peaks))
    return result


def measured(case: Case, text: str, threads: int, keep: Path | None) -> tuple[dict[str, int], dict[str, Any]]:
    """Peak of each stage beyond the base, and the plan, of a case that runs in a process of its own."""
    with tempfile.TemporaryDirectory(dir=keep) as folder:
        source, output = Path(folder) / "in", Path(folder) / "out"
        write_pair(source, case.shape)
        command = [sys.executable, __file__, text, "--child", str(source), str(output), "--threads", str(threads)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        plan = json.loads((output / "report.json").read_text())["pairs"][0]["plan"]
        peaks = json.loads((output / "peaks.json").read_text())
    return {stage: peak - plan["base"] for stage, peak in peaks.items()}, plan


def paper() -> None:
    """Plans alone, in GiB."""
    import numpy as np

    from dinoreg.config import get_preset
    from dinoreg.plan import Pair, plan
    from dinoreg.volume import Volume

    print("| plan for | features | encoder | on | peak GiB | stage | host GiB |\n|---|---|---|---|---|---|---|")
    for size, preset, features, arch in PAPER:
        image = Volume(np.broadcast_to(np.int16(0), [int(n) for n in size.split("x")]), np.diag([0.7, 0.7, 0.8, 1.0]))
        config = dataclasses.replace(get_preset(preset), features=features)
        for gpu in (False, True):
            found = plan(config, Pair.of(image, image), arch=arch, gpu=gpu, output="field")
            stages = found.gpu if gpu else found.host
            dearest, on = max(stages, key=lambda name: stages[name]), "GPU" if gpu else "CPU"
            print(f"| {size}, {preset} | {features} | {arch or '-'} | {on} | {stages[dearest] / 2**30:.2f} | {dearest} | "
                  f"{found.peak / 2**30:.2f} |")


def main() -> int:
    """Command line; the exit status is 1 if a plan is off."""
    parser = argparse.ArgumentParser(description="Planned and measured memory of each stage.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="SIZE:PRESET:FEATURES[:ARCH][@SHARE]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the images are made (some GB for large cases)")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(Case.parse(options.cases[0]), *options.child, options.threads)
    if options.paper:
        paper()
        return 0
    off = 0
    print("| case | base MiB | planned MiB | measured MiB | planned / measured | by stage: planned / measured MiB |\n"
          "|---|---|---|---|---|---|")
    for text in options.cases or CASES:
        peaks, plan = measured(Case.parse(text), text, options.threads, options.keep)
        planned, peak = max(plan["stages"].values()), max(peaks.values())
        off += not math.isclose(planned, peak, rel_tol=0, abs_tol=WITHIN * peak)
        stages = ", ".join(f"{stage} {plan['stages'].get(stage, 0) >> 20} / {found >> 20}" for stage, found in peaks.items())
        print(f"| {text} | {plan['base'] >> 20} | {planned >> 20} | {peak >> 20} | {planned / peak:.2f} | {stages} |", flush=True)
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
