"""Does high confidence mean low error? Landmarks of Learn2Reg sets, by the confidence of the registration at each of them.

    python benchmarks/confidence.py DATA_DIR [--sets A,B] [--features mind] [--threads 1]

Every pair of a set with key points is registered with the preset that its name and modalities choose, with its masks. Its
landmarks are sorted by confidence into quarters; the table has the mean error (TRE) of each quarter, the mean over the pairs of
a set, and Spearman's rank correlation of confidence and error: -1 would be perfect, 0 worthless. Progress goes to standard
error, the table to standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dinoreg.config import FEATURES, auto_preset, get_preset, modality  # noqa: E402
from dinoreg.errors import DinoRegError, InputError  # noqa: E402
from dinoreg.evaluate import read_points  # noqa: E402
from dinoreg.io import read_volume  # noqa: E402
from dinoreg.learn2reg import Dataset, Pair, load_dataset  # noqa: E402
from dinoreg.metrics import tre_mm  # noqa: E402
from dinoreg.registration import Registrar  # noqa: E402

Array = npt.NDArray[np.float64]
HEAD = ("Set", "Pairs", "TRE mm", "lowest quarter", "second", "third", "highest quarter", "Rank correlation", "worst pair")


@dataclass(frozen=True)
class Row:
    """A pair: mean error in mm of all landmarks and of the quarters by rising confidence, and Spearman's correlation."""

    tre: float
    quarters: tuple[float, ...]
    correlation: float


def by_confidence(errors: Array, confidence: Array) -> Row:
    """Errors (n,) in mm, sorted by confidence (n,).

    Raises:
        InputError: fewer than 8 landmarks.
    """
    if len(errors) < 8:
        raise InputError(f"expected at least 8 landmarks; got {len(errors)}")
    order = np.argsort(confidence, kind="stable")
    quarters = tuple(float(errors[part].mean()) for part in np.array_split(order, 4))
    return Row(float(errors.mean()), quarters, float(stats.spearmanr(confidence, errors).statistic))


def measure(dataset: Dataset, pair: Pair, features: str, threads: int) -> Row:
    """Register a pair and sort its landmarks.

    Raises:
        DinoRegError: the pair cannot be read or registered, or has no landmarks.
    """
    points = read_points(pair, "keypoints")
    if points is None:
        raise InputError(f"{pair.name}: expected key points of both images; got none")
    fixed, moving = read_volume(pair.fixed), read_volume(pair.moving)
    masks = [None if path is None else read_volume(path)
             for path in (pair.companion(image, "masks") for image in (pair.fixed, pair.moving))]
    kinds = [modality(text) for text in pair.modalities]
    config = replace(get_preset(auto_preset(dataset.name, pair.modalities)), features=features)
    result = Registrar(config, threads=threads).register(fixed, replace(moving, affine=fixed.affine), fixed_mask=masks[0],
                                                         moving_mask=masks[1], modalities=kinds)
    assert result.confidence is not None  # no preset for a set has the solver "published"
    at = ndimage.map_coordinates(result.confidence, points[0].T, order=1, mode="nearest", output=np.float64)
    return by_confidence(tre_mm(points[0], points[1], result.disp, fixed.spacing), at)


def format_table(results: dict[str, list[Row]]) -> str:
    """Markdown, a line for each set."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for name, rows in results.items():
        quarters = np.mean([row.quarters for row in rows], axis=0)
        correlations = [row.correlation for row in rows]
        lines.append((name, str(len(rows)), f"{np.mean([row.tre for row in rows]):.2f}", *(f"{value:.2f}" for value in quarters),
                      f"{np.mean(correlations):+.2f}", f"{max(correlations):+.2f}"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0, or that of the first error."""
    parser = argparse.ArgumentParser(description="Error of landmarks by the confidence of the registration.")
    parser.add_argument("data", type=Path, help="folder with a folder for each Learn2Reg set")
    parser.add_argument("--sets", default="ThoraxCBCTsim,AbdomenMRCTsim", metavar="A,B")
    parser.add_argument("--features", choices=FEATURES, default="mind")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    results: dict[str, list[Row]] = {}
    try:
        for name in options.sets.split(","):
            dataset = load_dataset(options.data / name)
            for pair in dataset.pairs():
                row = measure(dataset, pair, options.features, options.threads)
                results.setdefault(name, []).append(row)
                quarters = ", ".join(f"{value:.2f}" for value in row.quarters)
                sys.stderr.write(f"{name} {pair.name}: TRE {quarters} mm, rank correlation {row.correlation:+.2f}\n")
    except DinoRegError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(format_table(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
