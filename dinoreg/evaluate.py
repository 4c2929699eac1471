"""Score displacement fields on a Learn2Reg folder: the official metrics under their own arithmetic, the plain ones beside them.

For each pair the field is looked for, read and refused as the official scorer does; labels, landmarks, masks and a true field are
used where the data set has them. Every metric is formed before (zero field) and after registration.

``plain`` metrics: tre_keypoints_mm, tre_landmarks_mm, dice, hd95_mm, sdlogj, folds_percent, endpoint_mm.
``official`` metrics, under the scorer's names: TRE_kp, TRE_lm, DSC, HD95 (voxels), LogJacDetStd (3 added to the determinant) and
num_foldings, which is 0 for any field because it is counted after the determinant was clipped above 0.
Both SDlogJ are taken inside the fixed image's mask where there is one (the masked evaluation of ThoraxCBCT); folds are counted in
the whole field. Labels that only one image has cannot be scored: they are left out of the means and named.
"""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError

from dinoreg import metrics
from dinoreg.errors import InputError
from dinoreg.io import read_volume
from dinoreg.learn2reg import Dataset, Pair, disp_filename
from dinoreg.volume import Volume

Array = npt.NDArray[Any]

POINT_KINDS = {"keypoints": "TRE_kp", "landmarks": "TRE_lm"}  # folder -> official name
HIGHER_IS_WORSE = ("TRE_kp", "TRE_lm", "LogJacDetStd")  # of the official metrics, as the scorer takes its quantiles
_OF_THE_FIELD = ("sdlogj", "folds_percent", "LogJacDetStd", "num_foldings")  # say nothing about the zero field

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What one field is worth on one pair: metric -> value, and the values that were averaged into them."""

    plain: Mapping[str, float]
    official: Mapping[str, float]
    detailed: Mapping[str, Mapping[int, float] | Sequence[float]]


@dataclass(frozen=True)
class CaseResult:
    """A scored pair.

    Attributes:
        name: of the pair, such as ``"0011_0001_0011_0000"``.
        field: the file's name.
        before, after: scores of the zero field and of the field.
        missing_labels: held by only one of the two label maps; scored nowhere.
        lost_labels: held by both, but warped out of the image: Dice 0, infinite HD95.
    """

    name: str
    field: str
    before: Scores
    after: Scores
    missing_labels: Sequence[int] = ()
    lost_labels: Sequence[int] = ()


@dataclass(frozen=True)
class Evaluation:
    """A scored folder of fields; ``problems`` has a line for each pair that could not be scored."""

    dataset: str
    split: str
    cases: Sequence[CaseResult]
    problems: Sequence[str]

    def aggregates(self, state: str, kind: str) -> dict[str, dict[str, float]]:
        """Mean, standard deviation and the scorer's quantile over the cases.

        Args:
            state: "before" or "after".
            kind: "plain" or "official".

        Returns:
            metric -> {"mean", "std", "n"}, and "30" for official metrics. Plain metrics leave NaN cases out, official ones pass
            NaN on as the scorer does.
        """
        scores = [getattr(getattr(case, state), kind) for case in self.cases]
        result = {}
        for metric in _names(scores):
            values = [score[metric] for score in scores if metric in score]
            if kind == "plain":
                values = [value for value in values if not math.isnan(value)]
            aggregate = metrics.aggregate(values, higher_is_worse=metric in HIGHER_IS_WORSE)
            if kind == "plain":
                del aggregate["30"]
            result[metric] = {**aggregate, "n": len(values)}
        return result

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for standard JSON: numbers that are not finite become null."""
        states = ("before", "after")
        content = {
            "dataset": self.dataset, "split": self.split, "problems": list(self.problems),
            "aggregates": {state: {kind: self.aggregates(state, kind) for kind in ("plain", "official")} for state in states},
            "cases": {case.name: {
                "field": case.field, "missing_labels": list(case.missing_labels), "lost_labels": list(case.lost_labels),
                **{state: {kind: getattr(getattr(case, state), kind) for kind in ("plain", "official", "detailed")}
                   for state in states},
            } for case in self.cases},
        }
        return {key: _finite(value) for key, value in content.items()}


def evaluate_dataset(dataset: Dataset, fields_dir: Path, split: str = "auto") -> Evaluation:
    """Score the fields of all pairs of a split. A pair without a usable field or image is reported as a problem, not scored.

    Args:
        dataset: from :func:`dinoreg.learn2reg.load_dataset`.
        fields_dir: holds ``disp_*.npz`` or ``disp_*.nii.gz``.
        split: as for ``Dataset.pairs``.

    Raises:
        ConfigError, InputError: for a split that does not exist or is empty, or if ``fields_dir`` is no folder.
    """
    if not fields_dir.is_dir():
        raise InputError(f"{fields_dir}: expected a folder with disp_*.nii.gz; got no folder; name the output of a registration")
    cases, problems = [], []
    for pair in dataset.pairs(split):
        try:
            if pair.problem is not None:
                raise InputError(pair.problem)
            path = find_field(pair, fields_dir)
            if path is None:
                raise InputError(f"{fields_dir}: no {disp_filename(pair)} and no .npz of that name; register this pair first")
            cases.append(evaluate_pair(pair, read_disp(path), path.name))
            _log.info("scored %s", path.name)
        except InputError as error:
            problems.append(str(error))
            _log.error("%s", error)
    return Evaluation(dataset.name, dataset.split(split), cases, problems)


def evaluate_pair(pair: Pair, disp: Array, field_name: str) -> CaseResult:
    """Score one field.

    Args:
        pair: the images; labels, landmarks, mask and true field are found beside them.
        disp: (3, i, j, k), voxels of the fixed image's grid.
        field_name: the field's file, for messages and the result.

    Raises:
        InputError: if the field does not fit the fixed image, or one of the files beside the images is unusable.
    """
    fixed, moving = read_volume(pair.fixed), read_volume(pair.moving)
    if disp.shape != (3, *fixed.shape):
        raise InputError(f"{field_name}: expected shape {(*fixed.shape, 3)} as of {pair.fixed.name}; got {(*disp.shape[1:], 3)}; "
                         "write the field at the fixed image's full resolution")
    mask = _companion(pair, pair.fixed, "masks", fixed)
    fixed_labels, moving_labels = _companion(pair, pair.fixed, "labels", fixed), _companion(pair, pair.moving, "labels", moving)
    points = {kind: found for kind in POINT_KINDS if (found := read_points(pair, kind)) is not None}
    truth = read_true_disp(pair, fixed.shape)
    shared: list[int] = []
    missing: list[int] = []
    if fixed_labels is not None and moving_labels is not None:
        shared, missing = metrics.shared_labels(fixed_labels, moving_labels)

    def score(field: Array) -> Scores:
        determinant = metrics.jacobian_determinant(field)
        plain: dict[str, float] = {}
        official: dict[str, float] = {}
        detailed: dict[str, Mapping[int, float] | Sequence[float]] = {}
        for kind, (fixed_points, moving_points) in points.items():
            tre = metrics.tre_mm(fixed_points, moving_points, field, moving.spacing)
            plain[f"tre_{kind}_mm"] = float(tre.mean())
            detailed[f"tre_{kind}_mm"] = tre.tolist()
            official[POINT_KINDS[kind]] = float(metrics.tre_official(fixed_points, moving_points, field, moving.spacing).mean())
        if fixed_labels is not None and moving_labels is not None and shared:
            warped = metrics.warp_array(moving_labels, field, order=0)
            dice = metrics.dice_per_label(fixed_labels, warped, shared)
            hd95 = metrics.hd95_mm(fixed_labels, warped, fixed.spacing, shared)
            plain |= {"dice": float(np.mean(list(dice.values()))), "hd95_mm": float(np.mean(list(hd95.values())))}
            detailed |= {"dice": dice, "hd95_mm": hd95}
            official["DSC"] = plain["dice"]
            official["HD95"] = float(np.mean(list(metrics.hd95_official(fixed_labels, warped, shared).values())))
        plain |= {"sdlogj": metrics.sdlogj(determinant, mask), "folds_percent": metrics.folds_percent(determinant)}
        official |= {"LogJacDetStd": metrics.sdlogj_official(determinant, mask), "num_foldings": 0.0}
        if truth is not None:
            plain["endpoint_mm"] = metrics.endpoint_error_mm(field, truth, fixed.spacing, mask)
        return Scores(plain, official, detailed)

    before, after = score(np.zeros_like(disp)), score(disp)
    after_dice = after.detailed.get("dice", {})
    lost = [label for label, value in after_dice.items() if value == 0.0] if isinstance(after_dice, Mapping) else []
    return CaseResult(pair.name, field_name, before, after, missing, lost)


def find_field(pair: Pair, folder: Path) -> Path | None:
    """The field's file, in the scorer's order: for fixed 0000 with moving 0001 the short name first; of each name .npz first."""
    names = [f"disp_{pair.name}"] + ([f"disp_{pair.short_name}"] if pair.short_name else [])
    if (pair.fixed_id[1], pair.moving_id[1]) == ("0000", "0001"):
        names.reverse()
    return next((path for name in names for suffix in (".npz", ".nii.gz") if (path := folder / (name + suffix)).is_file()), None)


def read_disp(path: Path) -> npt.NDArray[np.float32]:
    """Read a field as the scorer does: plain 4D (X, Y, Z, 3) .nii.gz, or an .npz with one such array.

    Returns:
        (3, i, j, k) float32, voxels.

    Raises:
        InputError: if the file cannot be read, has another shape or holds values that are not finite.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                if len(archive.files) != 1:
                    raise InputError(f"{path}: expected one array; got {len(archive.files)}; write the field alone")
                stored = np.asarray(archive[archive.files[0]])
        else:
            stored = np.asarray(nib.load(path).dataobj)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, ImageFileError) as error:
        raise InputError(f"{path}: cannot be read as a displacement field ({error}); write it again") from error
    if stored.ndim != 4 or stored.shape[3] != 3:
        raise InputError(f"{path}: expected a field of shape (X, Y, Z, 3), the component last; got {stored.shape}; an ITK vector "
                         "image is 5D on disk and is refused by the official scorer too")
    disp = np.moveaxis(stored, 3, 0).astype(np.float32)
    if not np.isfinite(disp).all():
        raise InputError(f"{path}: expected finite displacements; got {int((~np.isfinite(disp)).sum())} values that are not; "
                         "register the pair again")
    return np.ascontiguousarray(disp)


def read_points(pair: Pair, kind: str) -> tuple[Array, Array] | None:
    """Corresponding points of a pair, fixed and moving, each (n, 3) in voxels; None if the data set has none.

    Where keypoints were found for each pair of modalities, their folder carries both, smaller first: ``keypoints00000001Tr``.

    Args:
        pair: the images.
        kind: "keypoints" or "landmarks".

    Raises:
        InputError: if a file does not hold rows of x,y,z, or the two differ in length.
    """
    first, second = sorted((pair.fixed_id[1], pair.moving_id[1]))
    for folder in (f"{kind}{first}{second}", kind):
        paths = pair.companion(pair.fixed, folder), pair.companion(pair.moving, folder)
        if paths[0] is not None and paths[1] is not None:
            fixed, moving = _read_csv(paths[0]), _read_csv(paths[1])
            if len(fixed) != len(moving):
                raise InputError(f"{paths[0]}: expected as many points as in {paths[1].name} ({len(moving)}); got {len(fixed)}; "
                                 "row i of both must be the same point")
            return fixed, moving
    return None


def read_true_disp(pair: Pair, shape: tuple[int, int, int]) -> npt.NDArray[np.float32] | None:
    """The true field from ``gt_dispTr`` or ``gt_dispTs``, for data made with a known motion; None if there is none.

    Stored as .npz (X', Y', Z', 3), voxels of the full grid, at every voxel or at every second one (the value at voxel 2i).

    Returns:
        (3, i, j, k) float32, voxels; between stored values linear, beyond the last constant.

    Raises:
        InputError: if the file is unusable or fits neither grid.
    """
    path = pair.fixed.parent.parent / pair.fixed.parent.name.replace("images", "gt_disp") / f"disp_{pair.name}.npz"
    if not path.is_file():
        return None
    stored = read_disp(path)
    if stored.shape[1:] == shape:
        return stored
    if stored.shape[1:] != tuple((n + 1) // 2 for n in shape):
        raise InputError(f"{path}: expected the shape {shape} or half of it; got {stored.shape[1:]}; it belongs to another grid")
    for axis, n in enumerate(shape, start=1):
        position = np.minimum(np.arange(n) / 2, stored.shape[axis] - 1)
        low = position.astype(np.int64)
        weight = (position - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
        high = np.minimum(low + 1, stored.shape[axis] - 1)
        stored = stored.take(low, axis) * (1 - weight) + stored.take(high, axis) * weight
    return stored


def format_table(evaluation: Evaluation) -> str:
    """The evaluation as text for a terminal: a row a pair, then the aggregates; first plain metrics, then the official ones."""
    count = len(evaluation.cases)
    lines = [f"{evaluation.dataset}, split {evaluation.split}: {count} {'pair' if count == 1 else 'pairs'} scored"]
    titles = {"plain": "Metrics in mm, true Jacobian determinant", "official": "Official Learn2Reg arithmetic, HD95 in voxels"}
    for kind, title in titles.items() if count else ():
        rows = [(case.name, getattr(case.before, kind), getattr(case.after, kind)) for case in evaluation.cases]
        if count > 1:
            before, after = (evaluation.aggregates(state, kind) for state in ("before", "after"))
            for name in ("mean", "std", "30") if kind == "official" else ("mean", "std"):
                first, second = ({metric: values[name] for metric, values in part.items()} for part in (before, after))
                rows.append((name, first, second))
        columns = {metric: metric in _OF_THE_FIELD for metric in _names([after for _, _, after in rows])}
        width = max(len(name) for name, _, _ in rows)
        lines += ["", f"{title} ({'' if all(columns.values()) else 'before -> '}after)",
                  " " * width + "".join(f"  {metric:>{_width(single)}}" for metric, single in columns.items())]
        for name, first, second in rows:
            line = f"{name:<{width}}"
            for metric, single in columns.items():
                text = _number(second.get(metric))
                line += f"  {text if single else f'{_number(first.get(metric))} -> {text:>7}':>{_width(single)}}"
            lines.append(line)
    for case in evaluation.cases:
        for labels, what in ((case.missing_labels, "in one image only, not scored"), (case.lost_labels, "warped off the image")):
            if labels:
                lines.append(f"{case.name}: labels {', '.join(map(str, labels))} {what}")
    return "\n".join(lines)


def _companion(pair: Pair, image: Path, kind: str, volume: Volume) -> Array | None:
    path = pair.companion(image, kind)
    if path is None:
        return None
    array = read_volume(path).array
    if array.shape != volume.shape:
        raise InputError(f"{path}: expected the shape {volume.shape} of {image.name}; got {array.shape}; resample it")
    return array


def _read_csv(path: Path) -> Array:
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
        points = np.loadtxt(rows, delimiter=",", ndmin=2) if rows else np.empty((0, 3))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected rows x,y,z without a header ({error}); correct the file") from error
    if points.shape[1] != 3 or len(points) == 0 or not np.isfinite(points).all():
        raise InputError(f"{path}: expected rows of three finite numbers x,y,z; got shape {points.shape}; correct the file")
    return points


def _names(scores: Sequence[Mapping[str, float]]) -> list[str]:
    """All metrics of some cases, in their order."""
    return list(dict.fromkeys(name for score in scores for name in score))


def _width(single: bool) -> int:
    return 13 if single else 19


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
