"""Labels and points of a pair: agreement is measured before and after, told in words, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_pair import SHIFT_MM, small_pair

from dinoreg.errors import InputError
from dinoreg.io import write_volume
from dinoreg.result import Registration
from dinoreg.truth import Truth, in_words, read_truth, worse
from dinoreg.volume import Volume

FIXED, MOVING = small_pair()
POINTS = np.array([[-6.0, 4.0, 2.0], [5.0, -7.0, -4.0], [1.0, 2.0, 9.0]])  # RAS mm, inside both images


def shifted(mm: np.ndarray) -> Registration:
    """The result that moves everything by so much, RAS mm."""
    voxels = np.linalg.solve(FIXED.affine[:3, :3], mm)
    return Registration(np.broadcast_to(voxels[:, None, None, None], (3, *FIXED.shape)).astype(np.float32), FIXED.affine)


def halves(image: Volume, at_mm: float) -> Volume:
    """1 to the left and 2 to the right of a plane across the image."""
    centres = np.einsum("a,aijk->ijk", image.affine[0, :3], np.indices(image.shape)) + image.affine[0, 3]
    return Volume(np.where(centres < at_mm, 1, 2).astype(np.uint8), image.affine)


def write(folder: Path, fixed_labels: Volume | None = None, moving_labels: Volume | None = None,
          points: tuple[np.ndarray, np.ndarray] | None = None) -> dict[str, Path]:
    files = {}
    for role, labels in (("fixed_labels", fixed_labels), ("moving_labels", moving_labels)):
        if labels is not None:
            files[role] = folder / f"{role}.nii.gz"
            write_volume(files[role], labels)
    for role, rows in zip(("fixed_points", "moving_points"), points or (), strict=False):
        files[role] = folder / f"{role}.csv"
        np.savetxt(files[role], rows, delimiter=",")
    return files


def test_the_right_motion_brings_points_together_and_the_wrong_one_apart() -> None:
    truth = Truth(points=(POINTS, POINTS + SHIFT_MM))
    length = np.linalg.norm(SHIFT_MM)
    right = truth.scores(shifted(SHIFT_MM))
    assert right["tre_mm"]["before"] == pytest.approx(length, abs=1e-4) and right["tre_mm"]["points"] == 3
    assert right["tre_mm"]["after"] < 1e-4 and worse(right) == []  # written with four decimals
    wrong = truth.scores(shifted(-SHIFT_MM))
    assert wrong["tre_mm"]["after"] == pytest.approx(2 * length, abs=1e-4)
    (warning,) = worse(wrong)
    assert "further apart after registration" in warning and f"{length:.2f} mm" in warning


def test_labels_of_other_grids_overlap_as_far_as_the_motion_is_right() -> None:
    truth = Truth(labels=(halves(FIXED, 0.0), halves(MOVING, SHIFT_MM[0])))
    right, wrong = truth.scores(shifted(SHIFT_MM))["dice"], truth.scores(shifted(-SHIFT_MM))
    assert right["before"] < 0.95 < right["after"] and set(right["labels"]) == {"1", "2"} and right["missing_labels"] == []
    assert wrong["dice"]["after"] < right["before"] and "overlap less" in worse(wrong)[0]


def test_a_loss_too_small_for_the_digits_shown_is_no_warning() -> None:
    assert worse({"dice": {"before": 0.7891, "after": 0.7889}, "tre_mm": {"before": 1.231, "after": 1.234}}) == []
    assert len(worse({"dice": {"before": 0.789, "after": 0.788}, "tre_mm": {"before": 1.23, "after": 1.24}})) == 2


def test_labels_of_one_side_are_named_and_left_out() -> None:
    fixed = halves(FIXED, 0.0)
    fixed.array[:2] = 7
    found = Truth(labels=(fixed, halves(MOVING, 0.0))).scores(shifted(np.zeros(3)))["dice"]
    assert set(found["labels"]) == {"1", "2"} and found["missing_labels"] == [7]
    nothing = Volume(np.zeros(MOVING.shape, np.uint8), MOVING.affine)
    assert Truth(labels=(fixed, nothing)).scores(shifted(np.zeros(3))) == {}


def test_nothing_known_is_nothing_said() -> None:
    assert read_truth({}, "ras", FIXED, MOVING).scores(shifted(SHIFT_MM)) == {} and worse({}) == [] and in_words({}) == {}


@pytest.mark.parametrize("space", ["voxel", "ras", "lps"])
def test_points_of_every_space_are_the_same(tmp_path: Path, space: str) -> None:
    pair = [POINTS, POINTS + SHIFT_MM]
    if space == "lps":
        pair = [points * (-1, -1, 1) for points in pair]
    elif space == "voxel":
        pair = [np.linalg.solve(image.affine, np.c_[points, np.ones(3)].T)[:3].T
                for image, points in zip((FIXED, MOVING), pair, strict=True)]
    files = write(tmp_path, points=(pair[0], pair[1]))
    found = read_truth(files, space, FIXED, MOVING).scores(shifted(SHIFT_MM))["tre_mm"]
    assert found["before"] == pytest.approx(np.linalg.norm(SHIFT_MM), abs=1e-4) and found["after"] < 1e-4


HALF = halves(FIXED, 0.0)


@pytest.mark.parametrize(("fixed_labels", "moving_labels", "points", "message"), [
    (HALF, None, None, "fixed_labels.nii.gz: expected moving labels"),
    (halves(MOVING, 0.0), HALF, None, "fixed_labels.nii.gz: expected the grid of the fixed image"),
    (Volume(HALF.array + np.float32(0.5), HALF.affine), HALF, None, "fixed_labels.nii.gz: a label map holds whole numbers"),
    (None, None, (POINTS, POINTS[:2]), "moving_points.csv: expected 3 points")])
def test_what_cannot_be_compared_is_refused_by_its_file(tmp_path: Path, fixed_labels: Volume | None, moving_labels: Volume | None,
                                                        points: tuple[np.ndarray, np.ndarray] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_truth(write(tmp_path, fixed_labels, moving_labels, points), "ras", FIXED, MOVING)


def test_scores_are_told_with_their_units_and_numbers() -> None:
    scores = Truth(labels=(halves(FIXED, 0.0), halves(MOVING, SHIFT_MM[0])), points=(POINTS[:1], POINTS[:1])).scores(
        shifted(np.zeros(3)))
    told = in_words(scores)
    assert list(told) == ["Overlap of 2 labels (Dice)", "Distance of 1 point (TRE)"]
    assert told["Distance of 1 point (TRE)"] == ("0.00 mm", "0.00 mm")
