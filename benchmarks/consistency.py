"""Known fields, equal images, both directions: what a solver has to hold whatever the images show.

    python benchmarks/consistency.py DATA_DIR [--sets A,B] [--features mind] [--threads 1]

On the first pair of every set, with the preset and the masks of the set:

- truth: the fixed image, warped by a smooth random diffeomorphism (the exponential of a velocity field with waves of about a
  third of the view) whose largest displacement is 10, 20 or 30 mm, and registered to itself: error of the field in the body, in
  voxels;
- identity: the fixed image registered to itself: length of the field, in voxels;
- both ways: the pair registered in both directions: how far the way there and back ends from its start in the body, in voxels.

Progress goes to standard error, the table to standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dinoreg.config import FEATURES, auto_preset, get_preset, modality  # noqa: E402
from dinoreg.errors import DinoRegError  # noqa: E402
from dinoreg.grid import apply_axes, compose, gaussian_matrix, warp  # noqa: E402
from dinoreg.io import read_volume  # noqa: E402
from dinoreg.learn2reg import Dataset, find_dataset, load_dataset  # noqa: E402
from dinoreg.preprocess import body_mask, to_unit_range, valid_region  # noqa: E402
from dinoreg.registration import Registrar  # noqa: E402
from dinoreg.volume import Volume  # noqa: E402

Array = npt.NDArray[np.floating]
LARGEST_MM = (10.0, 20.0, 30.0)
SQUARINGS = 7
HEAD = ("Set", "Case", "before mean", "before max", "median", "mean", "p95", "max")


def exponential(velocity: Tensor) -> Tensor:
    """The field (3, i, j, k), voxels, that following a velocity for a unit of time leads to: scaling and squaring."""
    disp = velocity / 2**SQUARINGS
    for _ in range(SQUARINGS):
        disp = compose(disp, disp)
    return disp


def random_velocity(shape: Sequence[int], spacing: Sequence[float], largest_mm: float, seed: int) -> Tensor:
    """Smooth noise (3, i, j, k), voxels, whose exponential moves by ``largest_mm`` at most, and nearly as much somewhere."""
    longest = max(n * s for n, s in zip(shape, spacing, strict=True))
    blur = [gaussian_matrix(n, longest / 12 / s) for n, s in zip(shape, spacing, strict=True)]
    noise = apply_axes(torch.randn((3, *shape), generator=torch.Generator().manual_seed(seed)), blur)
    to_mm = torch.tensor(list(spacing), dtype=torch.float32)[:, None, None, None]
    velocity = noise / to_mm
    for _ in range(4):  # the exponential is not quite linear in its velocity
        velocity = velocity * (largest_mm / float((exponential(velocity) * to_mm).norm(dim=0).max()))
    return velocity


def row(name: str, case: str, before: Array, error: Array) -> str:
    """A line of the table from lengths in voxels."""
    values = (before.mean(), before.max(), np.median(error), error.mean(), np.percentile(error, 95), error.max())
    return f"| {name} | {case} | {' | '.join(f'{value:.3f}' for value in values)} |"


def measure(dataset: Dataset, features: str, threads: int) -> list[str]:
    """The lines of a set."""
    pair = dataset.pairs()[0]
    fixed, moving = read_volume(pair.fixed), read_volume(pair.moving)
    moving = replace(moving, affine=fixed.affine)
    masks = [None if path is None else read_volume(path)
             for path in (pair.companion(image, "masks") for image in (pair.fixed, pair.moving))]
    kinds = [modality(text) for text in pair.modalities]
    registrar = Registrar(replace(get_preset(auto_preset(dataset.name, pair.modalities)), features=features), threads=threads)
    unit = to_unit_range(fixed.array.astype(np.float32), kinds[0], registrar.config.intensity)
    body = body_mask(unit, valid_region(fixed.array.astype(np.float32)))

    def field(a: Volume, b: Volume, roles: Sequence[int]) -> Tensor:
        found = registrar.register(a, b, fixed_mask=masks[roles[0]], moving_mask=masks[roles[1]],
                                   modalities=[kinds[role] for role in roles])
        return torch.from_numpy(found.disp)

    def length(disp: Tensor) -> Array:
        return disp.norm(dim=0).numpy()[body]

    lines = []
    image = torch.from_numpy(fixed.array.astype(np.float32))[None]
    for largest in LARGEST_MM:
        velocity = random_velocity(fixed.shape, fixed.spacing, largest, seed=1)
        warped = Volume(warp(image, exponential(velocity))[0].numpy(), fixed.affine)
        truth = exponential(-velocity)  # warped(x + truth(x)) = fixed(x)
        lines.append(row(dataset.name, f"truth, {largest:.0f} mm", length(truth), length(field(fixed, warped, (0, 0)) - truth)))
        sys.stderr.write(lines[-1] + "\n")
    lines.append(row(dataset.name, "identity", np.zeros(1), length(field(fixed, fixed, (0, 0)))))
    forward, backward = field(fixed, moving, (0, 1)), field(moving, fixed, (1, 0))
    lines.append(row(dataset.name, "both ways", length(forward), length(compose(backward, forward))))
    sys.stderr.write("\n".join(lines[-2:]) + "\n")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0, or that of the first error."""
    parser = argparse.ArgumentParser(description="Known fields, equal images and both directions.")
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with a folder for each Learn2Reg set")
    parser.add_argument("--sets", metavar="A,B", help="only these; all by default")
    parser.add_argument("--features", choices=FEATURES, default="mind")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        folders = ([options.data / name for name in options.sets.split(",")] if options.sets
                   else [path.parent for path in find_dataset(options.data)])
        lines = [line for folder in folders for line in measure(load_dataset(folder), options.features, options.threads)]
    except DinoRegError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    table = [f"| {' | '.join(HEAD)} |", f"| {' | '.join('---' for _ in HEAD)} |", *lines]
    sys.stdout.write("\n".join(table) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
