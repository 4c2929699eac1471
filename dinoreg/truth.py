"""What is known of a pair besides its images, labels or points of both sides, and how well a result agrees with it.

None of it is seen by the registration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoreg import metrics
from dinoreg.errors import InputError
from dinoreg.io import read_volume
from dinoreg.points import Points, read_points
from dinoreg.result import Registration
from dinoreg.volume import Volume

LABELS, POINTS = ("fixed_labels", "moving_labels"), ("fixed_points", "moving_points")
ROLES = (*LABELS, *POINTS)


@dataclass(frozen=True, eq=False)
class Truth:
    """Labels and points of a pair.

    Attributes:
        labels: of the fixed and the moving image, whole numbers, 0 is background; the fixed ones lie on the fixed image's grid.
        points: of the fixed and the moving image, (n, 3) RAS mm; row i of both is the same anatomy.
    """

    labels: tuple[Volume, Volume] | None = None
    points: tuple[Points, Points] | None = None

    def scores(self, result: Registration) -> dict[str, Any]:
        """Agreement before registration, as the images lie by their headers, and after.

        Returns:
            "dice" and "tre_mm", each where it can be formed: {"before", "after"} means over labels and points; and, of each
            label, "labels": {label: [before, after]}, of all points "largest": [before, after] and "points", their number. Labels
            that only one side has are left out and named under "missing_labels".
        """
        found: dict[str, Any] = {}
        if self.labels is not None:
            fixed, moving = self.labels
            shared, missing = metrics.shared_labels(fixed.array, moving.array)
            unmoved = Registration(np.zeros_like(result.disp), result.fixed_affine)
            each = [metrics.dice_per_label(fixed.array, state.warp(moving, order=0).array, shared) for state in (unmoved, result)]
            if shared:
                before, after = (float(np.mean(list(dice.values()))) for dice in each)
                pairs = {str(label): [round(dice[label], 4) for dice in each] for label in shared}
                found["dice"] = {"before": round(before, 4), "after": round(after, 4), "labels": pairs, "missing_labels": missing}
        if self.points is not None:
            fixed_points, moving_points = self.points
            distances = [np.linalg.norm(points - moving_points, axis=1)
                         for points in (fixed_points, result.map_points(fixed_points))]
            found["tre_mm"] = {"before": round(float(distances[0].mean()), 4), "after": round(float(distances[1].mean()), 4),
                               "largest": [round(float(distance.max()), 4) for distance in distances],
                               "points": len(fixed_points)}
        return found


def read_truth(files: Mapping[str, Path], space: str, fixed: Volume, moving: Volume) -> Truth:
    """Read and check what is known of a pair.

    Args:
        files: by role, of ``ROLES``; both of labels, both of points, or all four.
        space: of points in .csv: "voxel" (each of its own image), "ras" or "lps".
        fixed, moving: the images.

    Raises:
        InputError: one of two is missing, a file cannot be read, labels that are none or lie on another grid than the fixed
            image, or lists of different lengths.
    """
    for first, second in (LABELS, POINTS):
        if (first in files) != (second in files):
            given, missing = (first, second) if first in files else (second, first)
            raise InputError(f"{files[given]}: expected {missing.replace('_', ' ')} to compare the {given.replace('_', ' ')} "
                             "with; got none; give both or neither")
    labels, points = None, None
    if LABELS[0] in files:
        fixed_labels, moving_labels = (_read_labels(files[role]) for role in LABELS)
        if not fixed_labels.same_grid(fixed):
            raise InputError(f"{files[LABELS[0]]}: expected the grid of the fixed image, {fixed.shape}; got "
                             f"{fixed_labels.shape}, or another header; resample the labels with nearest neighbour")
        labels = fixed_labels, moving_labels
    if POINTS[0] in files:
        fixed_points, moving_points = (read_points(files[role], space).ras(image)
                                       for role, image in zip(POINTS, (fixed, moving), strict=True))
        if len(fixed_points) != len(moving_points):
            raise InputError(f"{files[POINTS[1]]}: expected {len(fixed_points)} points, as in {files[POINTS[0]]}; got "
                             f"{len(moving_points)}; row i of both must be the same point")
        points = fixed_points, moving_points
    return Truth(labels, points)


def _read_labels(path: Path) -> Volume:
    labels = read_volume(path)
    try:
        metrics.shared_labels(labels.array, labels.array)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return labels


def worse(scores: Mapping[str, Any]) -> list[str]:
    """What agrees less after registration than before, in words for the warnings of a result.

    Only a loss that shows in the digits of those words counts.
    """
    found = []
    if (dice := scores.get("dice")) and round(dice["after"], 3) < round(dice["before"], 3):
        found.append(f"the labels overlap less after registration (mean Dice {dice['after']:.3f}) than before "
                     f"({dice['before']:.3f})")
    if (tre := scores.get("tre_mm")) and round(tre["after"], 2) > round(tre["before"], 2):
        found.append(f"the points are further apart after registration (mean {tre['after']:.2f} mm) than before "
                     f"({tre['before']:.2f} mm)")
    return found


def in_words(scores: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The scores for people: what is measured -> before and after, with units; means over labels and points."""
    told = {}
    if dice := scores.get("dice"):
        n = len(dice["labels"])
        told[f"Overlap of {n} label{'' if n == 1 else 's'} (Dice)"] = f"{dice['before']:.3f}", f"{dice['after']:.3f}"
    if tre := scores.get("tre_mm"):
        n = tre["points"]
        told[f"Distance of {n} point{'' if n == 1 else 's'} (TRE)"] = f"{tre['before']:.2f} mm", f"{tre['after']:.2f} mm"
    return told
