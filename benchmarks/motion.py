"""Does it matter where the moving image was put? Real pairs, moved by known transforms and registered again.

    python benchmarks/motion.py DATA_DIR [--sets A,B] [--pairs N] [--motions A,B] [--start-only] [--threads 1]

Every moving image (with its mask) is shifted by 60 mm, turned by 20 degrees or scaled by 15 % around its middle: "header" changes
its affine alone, "voxels" resamples it (cubic splines) on a grid that holds all of it. Each is registered as the command line
does it, with the initial transform "auto"; the field is led back through the known motion and scored with the untouched labels
and landmarks. So every row of a pair would equal its first one, the untouched pair, if motion did not matter. "start" scores the
initial transform alone. ``--start-only`` stops there and takes seconds. A line a pair and motion, on standard output.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dinoreg.align import align  # noqa: E402
from dinoreg.config import FEATURES, Config, auto_preset, get_preset, modality  # noqa: E402
from dinoreg.errors import DinoRegError  # noqa: E402
from dinoreg.evaluate import read_points  # noqa: E402
from dinoreg.initial import folded  # noqa: E402
from dinoreg.io import read_volume  # noqa: E402
from dinoreg.learn2reg import Dataset, Pair, load_dataset  # noqa: E402
from dinoreg.metrics import dice_per_label, shared_labels, tre_mm, warp_array  # noqa: E402
from dinoreg.registration import Registrar  # noqa: E402
from dinoreg.volume import Volume  # noqa: E402

Array = npt.NDArray[np.float64]
SETS = "ThoraxCBCTsim,AbdomenMRCTsim,AbdomenMRCTx,BrainMNIColin,BrainT1T2sim,HippocampusMR"
HEAD = ("Set", "Pair", "Motion", "Moved", "Start Dice", "Start TRE mm", "Dice", "TRE mm", "dDice", "dTRE mm", "CPU s")


@dataclass(frozen=True)
class Motion:
    """Rotation vector in degrees, shift in mm (both RAS) and scale, around the middle; of the header or of the voxels."""

    turn: tuple[float, float, float] = (0, 0, 0)
    shift: tuple[float, float, float] = (0, 0, 0)
    scale: float = 1.0
    voxels: bool = False

    def matrix(self, volume: Volume) -> Array:
        """4x4, RAS mm: where a point of the image goes."""
        middle = volume.affine[:3, :3] @ ((np.array(volume.shape) - 1) / 2) + volume.affine[:3, 3]
        matrix = np.eye(4)
        matrix[:3, :3] = self.scale * Rotation.from_rotvec(np.deg2rad(self.turn)).as_matrix()
        matrix[:3, 3] = middle - matrix[:3, :3] @ middle + self.shift
        return matrix

    def applied(self, volume: Volume, like: Volume, order: int) -> Volume:
        """An image in the space of ``like``, moved."""
        matrix = self.matrix(like)
        moved = Volume(volume.array, matrix @ volume.affine)
        return resampled(moved, volume.affine, order) if self.voxels else moved


MOTIONS = {
    "60 mm left, header": Motion(shift=(-60, 0, 0)),
    "60 mm up, voxels": Motion(shift=(0, 0, 60), voxels=True),
    "300 mm, header": Motion(shift=(0, 300, 0)),
    "20 degrees around x, header": Motion(turn=(20, 0, 0)),
    "20 degrees around y, voxels": Motion(turn=(0, -20, 0), voxels=True),
    "20 degrees around z, header": Motion(turn=(0, 0, 20)),
    "15 % larger, voxels": Motion(scale=1.15, voxels=True),
    "15 % smaller, header": Motion(scale=1 / 1.15),
    "all at once, header": Motion(turn=(0, 14, -14), shift=(40, -30, 30), scale=1.1),
}


def resampled(volume: Volume, affine: Array, order: int) -> Volume:
    """On a grid of ``affine``'s directions and spacing that holds all of the image; its lowest value around it."""
    corners = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in volume.shape), indexing="ij")).reshape(3, -1)
    inside = np.linalg.solve(affine, volume.affine @ np.vstack([corners, np.ones(8)]))[:3]
    low = np.floor(inside.min(1))
    grid = affine.copy()
    grid[:3, 3] = (affine @ [*low, 1])[:3]
    back = np.linalg.solve(volume.affine, grid)
    shape = tuple(np.ceil(inside.max(1) - low).astype(int))
    values = ndimage.affine_transform(volume.array.astype(np.float32), back[:3, :3], back[:3, 3], order=order, output_shape=shape,
                                      cval=float(volume.array.min()))
    return Volume(np.clip(values, volume.array.min(), volume.array.max()), grid)


@dataclass(frozen=True)
class Scores:
    """Mean Dice of the labels and mean error of the landmarks in mm; NaN where there are none."""

    dice: float
    tre: float


class Sample:
    """A pair of a set with all that is needed to register and score it."""

    def __init__(self, dataset: Dataset, pair: Pair, features: str) -> None:
        self.fixed = read_volume(pair.fixed)
        self.moving = self._on_grid(pair.moving)
        self.masks = [None if path is None else self._on_grid(path)
                      for path in (pair.companion(image, "masks") for image in (pair.fixed, pair.moving))]
        self.kinds = [modality(text) for text in pair.modalities]
        self.config: Config = replace(get_preset(auto_preset(dataset.name, pair.modalities)), features=features)
        self.points = read_points(pair, "keypoints")
        found = [pair.companion(image, "labels") for image in (pair.fixed, pair.moving)]
        self.labels = [read_volume(path).array for path in found if path is not None]

    def _on_grid(self, path: Path) -> Volume:
        """An image of a Learn2Reg pair: its voxels are the fixed image's, whatever its header says."""
        return Volume(read_volume(path).array, self.fixed.affine)

    def score(self, disp: npt.NDArray[np.float32]) -> Scores:
        """Of a field onto the untouched moving image."""
        dice = tre = float("nan")
        if len(self.labels) == 2:
            shared, _ = shared_labels(self.labels[0], self.labels[1])
            warped = warp_array(self.labels[1], disp, order=0)
            dice = float(np.mean(list(dice_per_label(self.labels[0], warped, shared).values())))
        if self.points is not None:
            tre = float(tre_mm(*self.points, disp, self.fixed.spacing).mean())
        return Scores(dice, tre)


def measure(sample: Sample, motion: Motion, *, start_only: bool, threads: int) -> tuple[bool, Scores, Scores, float]:
    """Move, register and score a pair.

    Returns:
        Whether a start was needed, the scores of the start and of the registration (of the start again with ``start_only``), and
        the CPU seconds of the registration.
    """
    fixed, moving = sample.fixed, motion.applied(sample.moving, sample.moving, 3)
    mask = sample.masks[1] and motion.applied(sample.masks[1], sample.moving, 0)
    back = np.linalg.inv(motion.matrix(sample.moving))
    none = np.zeros((3, *fixed.shape), np.float32)
    started = time.process_time()
    if start_only:
        found = align(fixed, moving, sample.masks[0], mask, sample.kinds, sample.config.intensity)
        start = sample.score(folded(none, back @ found.matrix, fixed.affine))
        return found.needed, start, start, time.process_time() - started
    result = Registrar(sample.config, threads=threads).register(fixed, moving, fixed_mask=sample.masks[0], moving_mask=mask,
                                                                modalities=sample.kinds, initial="auto")
    seconds = time.process_time() - started
    start = sample.score(folded(none, back @ result.initial, fixed.affine))
    return (not np.array_equal(result.initial, np.eye(4)), start, sample.score(folded(result.disp, back, fixed.affine)), seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0, or that of the first error."""
    parser = argparse.ArgumentParser(description="Scores of pairs that were moved, beside those of the untouched pairs.")
    parser.add_argument("data", type=Path, help="folder with a folder for each Learn2Reg set")
    parser.add_argument("--sets", default=SETS, metavar="A,B")
    parser.add_argument("--pairs", type=int, default=1, metavar="N", help="first pairs of each set (default: 1)")
    parser.add_argument("--motions", metavar="A,B", help="only those with one of these words (default: all); the untouched pair "
                        "always comes first")
    parser.add_argument("--features", choices=FEATURES, default="mind")
    parser.add_argument("--start-only", action="store_true", help="find the start, do not register")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    words = options.motions.split(",") if options.motions else [""]
    motions = {name: motion for name, motion in MOTIONS.items() if any(word in name for word in words)}
    sys.stdout.write("\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, ("---",) * len(HEAD))) + "\n")
    try:
        for name in options.sets.split(","):
            dataset = load_dataset(options.data / name)
            for pair in dataset.pairs()[:options.pairs]:
                sample = Sample(dataset, pair, options.features)
                untouched: Scores | None = None
                for title, motion in {"none": Motion(), **motions}.items():
                    moved, start, end, seconds = measure(sample, motion, start_only=options.start_only, threads=options.threads)
                    untouched = untouched or end
                    cells = (name, pair.name, title, "yes" if moved else "no", f"{start.dice:.3f}", f"{start.tre:.2f}",
                             f"{end.dice:.3f}", f"{end.tre:.2f}", f"{end.dice - untouched.dice:+.3f}",
                             f"{end.tre - untouched.tre:+.2f}", f"{seconds:.1f}")
                    sys.stdout.write(f"| {' | '.join(cells).replace('+nan', '-').replace('nan', '-')} |\n")
                    sys.stdout.flush()
    except DinoRegError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
