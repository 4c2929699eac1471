"""What a displacement field is worth: overlap, surface distance, landmark error and regularity.

Two arithmetics stand side by side. The names without a suffix say what a reader expects (millimetres, true determinant); the
names ending in ``_official`` repeat the Learn2Reg/OncoReg scorer to the last digit, quirks included, so that a local number can
be compared with a leaderboard. The quirks: distances in voxels, 3 added to the determinant before the logarithm, points sampled
by a cubic spline that falls to 0 outside the grid.

Arrays are (i, j, k) as in the file. ``disp`` is (3, i, j, k) in voxels of the fixed grid, component c along array axis c, and
pulls back: warped(x) = moving(x + disp(x)). Labels are whole numbers 0..65535 with 0 as background.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dinoreg.errors import InputError
from dinoreg.slabs import slabs, wider

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

_MAX_LABEL = 65535
_OFFICIAL_CROP = 2  # voxels a side that the official SDlogJ leaves out


def warp_array(moving: Array, disp: Array, order: int = 1) -> Array:
    """Resample the moving array on the fixed grid: warped(x) = moving(x + disp(x)).

    Args:
        moving: (i', j', k'), any numeric type.
        disp: (3, i, j, k), voxels.
        order: 0 nearest neighbour (labels; the type is kept), 1 linear (images; the result is float32).

    Returns:
        (i, j, k); 0 where x + disp(x) lies outside the moving array, as the official scorer has it.

    Raises:
        InputError: if ``disp`` is not of shape (3, i, j, k).
    """
    shape = _grid_shape(disp)
    warped = np.empty(shape, dtype=moving.dtype if order == 0 else np.float32)
    for slab in slabs(shape):
        coordinates = disp[:, slab].astype(np.float64)
        for axis, index in enumerate(np.ogrid[slab, 0:shape[1], 0:shape[2]]):
            coordinates[axis] += index
        ndimage.map_coordinates(moving, coordinates, output=warped[slab], order=order, mode="constant", cval=0.0)
    return warped


def shared_labels(fixed_labels: Array, moving_labels: Array) -> tuple[list[int], list[int]]:
    """The labels that both label maps hold, and those that only one of them holds (nobody can score these); 0 is left out."""
    in_fixed, in_moving = (set(np.flatnonzero(np.bincount(_codes(labels).ravel())).tolist()) - {0}
                           for labels in (fixed_labels, moving_labels))
    return sorted(in_fixed & in_moving), sorted(in_fixed ^ in_moving)


def dice_per_label(fixed_labels: Array, warped_labels: Array, labels: Iterable[int] | None = None) -> dict[int, float]:
    """Dice overlap 2|A and B| / (|A| + |B|) of each label.

    Args:
        fixed_labels: (i, j, k), whole numbers.
        warped_labels: moving labels on the same grid, warped with order 0.
        labels: which to score; by default all that occur in either map. Pass the first result of :func:`shared_labels` to leave
            out, as the official scorer does, what the fixed or the moving map never had.

    Returns:
        label -> Dice in [0, 1]; 0 for a label that only one of the two maps holds, NaN for one that neither holds.
    """
    fixed, warped = _same_shape(_codes(fixed_labels), _codes(warped_labels))
    size = 1 + int(max(fixed.max(initial=0), warped.max(initial=0)))
    count_fixed = np.bincount(fixed.ravel(), minlength=size)
    count_warped = np.bincount(warped.ravel(), minlength=size)
    count_both = np.bincount(fixed[fixed == warped], minlength=size)
    total = count_fixed + count_warped
    wanted = np.flatnonzero(total).tolist() if labels is None else sorted(labels)
    return {label: 2.0 * float(count_both[label]) / float(total[label]) if label < size and total[label] else float("nan")
            for label in wanted if label != 0}


def hd95_mm(fixed_labels: Array, warped_labels: Array, spacing: Sequence[float],
            labels: Iterable[int] | None = None) -> dict[int, float]:
    """95 % Hausdorff distance of each label, in millimetres.

    The surface of a label is the set of its voxels that have a face neighbour outside the label (the edge of the image counts as
    outside). From every surface voxel of one map the distance in mm to the nearest surface voxel of the other is taken; the
    result is the greater of the two directions' 95th percentiles (linear between ranks).

    Args:
        fixed_labels, warped_labels, labels: as for :func:`dice_per_label`.
        spacing: millimetres between voxel centres along (i, j, k).

    Returns:
        label -> distance in mm; infinite for a label that only one of the two maps holds, NaN for one that neither holds.
    """
    def of_one_label(fixed: Array, warped: Array) -> float:
        first, second = (mask & ~ndimage.binary_erosion(mask) for mask in (fixed, warped))
        return float(max(np.percentile(d, 95.0) for d in _directed_distances(first, second, spacing)))

    return _each_label(of_one_label, fixed_labels, warped_labels, labels)


def hd95_official(fixed_labels: Array, warped_labels: Array, labels: Iterable[int] | None = None) -> dict[int, float]:
    """95 % Hausdorff distance of each label as the official scorer computes it: in VOXELS, whatever the spacing.

    The scorer uses DeepMind's surface-distance with spacing 1: the surface consists of the 2x2x2 neighbourhoods that the label
    fills in part, each weighted by the area of the marching-cubes surface in it; per direction the smallest distance below which
    95 % of the area lies; then the greater of the two directions.

    Args and result as for :func:`hd95_mm`, the distance in voxels.
    """
    def of_one_label(fixed: Array, warped: Array) -> float:
        codes = [_neighbour_codes(mask) for mask in (fixed, warped)]
        first, second = ((code != 0) & (code != 255) for code in codes)
        distances = _directed_distances(first, second, (1.0, 1.0, 1.0))
        return max(_weighted_rank(d, _SURFACE_AREA[code[surface]])
                   for d, code, surface in zip(distances, codes, (first, second), strict=True))

    return _each_label(of_one_label, fixed_labels, warped_labels, labels)


def jacobian_determinant(disp: Array) -> npt.NDArray[np.float32]:
    """Determinant of I + grad(disp) at every voxel: the local change of volume from fixed to moving.

    Central differences, one-sided at the edge of the grid. A ratio of volumes on one grid, it is the same in voxels and in mm.

    Args:
        disp: (3, i, j, k), voxels; at least 2 voxels along each axis.

    Returns:
        (i, j, k) float32.

    Raises:
        InputError: if ``disp`` has another shape.
    """
    shape = _grid_shape(disp)
    if min(shape) < 2:
        raise InputError(f"a Jacobian needs at least 2 voxels along each axis; got a field of shape {disp.shape}")
    determinant = np.empty(shape, dtype=np.float32)
    for slab in slabs(shape):
        rows, inner = wider(slab, 1, shape[0])
        a, b, c = (np.gradient(component[rows].astype(np.float32, copy=False)) for component in disp)
        for diagonal in (a[0], b[1], c[2]):
            diagonal += 1.0
        found = a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])
        determinant[slab] = found[inner]
    return determinant


def folds_percent(determinant: Array, mask: Array | None = None) -> float:
    """Percentage of voxels (inside ``mask``, if given) where the field folds: determinant <= 0. NaN if there is no voxel."""
    values = determinant if mask is None else determinant[mask > 0]
    return 100.0 * float(np.count_nonzero(values <= 0)) / values.size if values.size else float("nan")


def sdlogj(determinant: Array, mask: Array | None = None) -> float:
    """Standard deviation of the logarithm of the Jacobian determinant, over the voxels (inside ``mask``) that do not fold.

    The logarithm exists only where the determinant is positive; how much is left out is what :func:`folds_percent` says.
    NaN if no voxel is left.
    """
    def logarithms(slab: slice) -> FloatArray:
        values = determinant[slab] if mask is None else determinant[slab][mask[slab] > 0]
        return np.asarray(np.log(values[values > 0], dtype=np.float64))

    return _spread(logarithms, determinant.shape)


def sdlogj_official(determinant: Array, mask: Array | None = None) -> float:
    """SDlogJ as the official scorer computes it: two voxels a side cropped, 3 added, std(log(clip(determinant + 3, 1e-9, 1e9))).

    Args:
        determinant: (i, j, k) from :func:`jacobian_determinant`.
        mask: (i, j, k), voxels equal to 1 count (the scorer's masked evaluation, as in ThoraxCBCT); all of them without it.
    """
    inside = (slice(_OFFICIAL_CROP, -_OFFICIAL_CROP),) * 3
    values, counted = determinant[inside], None if mask is None else mask[inside] == 1

    def logarithms(slab: slice) -> FloatArray:
        some = values[slab] if counted is None else values[slab][counted[slab]]
        return np.asarray(np.log((some.astype(np.float64) + 3.0).clip(1e-9, 1e9)))

    return _spread(logarithms, values.shape)


def _spread(values: Callable[[slice], FloatArray], shape: Sequence[int]) -> float:
    """Standard deviation of what is given slab by slab (Chan, Golub and LeVeque 1983); NaN if that is nothing."""
    count, mean, squares = 0, 0.0, 0.0
    for slab in slabs(shape):
        some = values(slab)
        if not some.size:
            continue
        shift, total = float(some.mean()) - mean, count + some.size
        squares += float(some.var()) * some.size + shift**2 * count * some.size / total
        count, mean = total, mean + shift * some.size / total
    return math.sqrt(squares / count) if count else float("nan")


def tre_mm(fixed_points: Array, moving_points: Array, disp: Array, spacing: Sequence[float]) -> FloatArray:
    """Target registration error of each landmark pair, in millimetres: |p_fixed + disp(p_fixed) - p_moving|.

    The field is interpolated linearly at the fixed point; beyond the outermost voxel centres its edge value continues.

    Args:
        fixed_points, moving_points: (n, 3) voxel coordinates; row n of both is the same anatomical point.
        disp: (3, i, j, k), voxels.
        spacing: millimetres per voxel along (i, j, k).

    Returns:
        (n,) millimetres.

    Raises:
        InputError: if the points are not two (n, 3) arrays of one length.
    """
    return _landmark_error(fixed_points, moving_points, disp, spacing, order=1, mode="nearest")


def tre_official(fixed_points: Array, moving_points: Array, disp: Array, moving_spacing: Sequence[float]) -> FloatArray:
    """TRE as the official scorer computes it: field by cubic spline, 0 outside the grid, times the MOVING image's spacing.

    Args, result and errors as for :func:`tre_mm`.
    """
    return _landmark_error(fixed_points, moving_points, disp, moving_spacing, order=3, mode="constant")


def endpoint_error_mm(disp: Array, true_disp: Array, spacing: Sequence[float], mask: Array | None = None) -> float:
    """Mean length in millimetres of disp - true_disp, both (3, i, j, k) in voxels, over ``mask`` (or everywhere)."""
    squared = np.zeros(_grid_shape(disp), dtype=np.float64)
    for component in range(3):
        squared += ((disp[component].astype(np.float64) - true_disp[component]) * spacing[component]) ** 2
    error = np.sqrt(squared)
    return float((error if mask is None else error[mask > 0]).mean())


def aggregate(case_values: Sequence[float], *, higher_is_worse: bool) -> dict[str, float]:
    """Mean, standard deviation and the ``30`` quantile over cases, as the official scorer forms them.

    ``30`` is the 70th percentile for TRE and SDlogJ (``higher_is_worse``), the 30th for Dice and, by the scorer's choice, HD95.
    A NaN case makes its aggregates NaN, as there.
    """
    values = np.asarray(case_values, dtype=np.float64)
    if values.size == 0:
        return {"mean": float("nan"), "std": float("nan"), "30": float("nan")}
    with np.errstate(invalid="ignore"):  # an infinite case has no standard deviation
        quantile = np.quantile(values, 0.7 if higher_is_worse else 0.3)
        return {"mean": float(values.mean()), "std": float(values.std()), "30": float(quantile)}


def _grid_shape(disp: Array) -> tuple[int, int, int]:
    if disp.ndim != 4 or disp.shape[0] != 3:
        raise InputError(f"a displacement field has shape (3, i, j, k); got {disp.shape}")
    return disp.shape[1], disp.shape[2], disp.shape[3]


def _codes(labels: Array) -> npt.NDArray[np.uint16]:
    """Labels as uint16, refused if they are anything but whole numbers 0..65535."""
    if labels.dtype == np.uint16 or labels.dtype == np.uint8 or labels.dtype == np.bool_:
        return labels.astype(np.uint16, copy=False)
    codes = labels.astype(np.uint16) if labels.size and labels.min() >= 0 and labels.max() <= _MAX_LABEL else None
    if codes is None or (labels.dtype.kind == "f" and not np.array_equal(codes, labels)):
        raise InputError(f"a label map holds whole numbers from 0 to {_MAX_LABEL}; got {labels.dtype} values "
                         f"{labels.min() if labels.size else '(none)'} to {labels.max() if labels.size else '(none)'}")
    return codes


def _same_shape(first: Array, second: Array) -> tuple[Array, Array]:
    if first.shape != second.shape:
        raise InputError(f"two label maps are compared on one grid; got shapes {first.shape} and {second.shape}")
    return first, second


def _each_label(distance: Callable[[Array, Array], float], fixed_labels: Array, warped_labels: Array,
                labels: Iterable[int] | None) -> dict[int, float]:
    """``distance`` of the two masks of each label, cropped to the box that holds both, so that small structures cost little.

    Infinite if only one of the maps holds the label, NaN if neither does.
    """
    fixed, warped = _same_shape(_codes(fixed_labels), _codes(warped_labels))
    boxes = [{label: box for label, box in enumerate(ndimage.find_objects(codes), start=1) if box is not None}
             for codes in (fixed, warped)]
    result = {}
    for label in sorted({*boxes[0], *boxes[1]} if labels is None else labels):
        if label in boxes[0] and label in boxes[1]:
            crop = tuple(slice(min(a.start, b.start), max(a.stop, b.stop))
                         for a, b in zip(boxes[0][label], boxes[1][label], strict=True))
            result[label] = distance(fixed[crop] == label, warped[crop] == label)
        else:
            result[label] = float("inf") if label in boxes[0] or label in boxes[1] else float("nan")
    return result


def _directed_distances(first: Array, second: Array, spacing: Sequence[float]) -> tuple[FloatArray, FloatArray]:
    """From each surface point of either map (in array order) to the nearest of the other, none of them empty."""
    return (ndimage.distance_transform_edt(~second, sampling=spacing)[first],
            ndimage.distance_transform_edt(~first, sampling=spacing)[second])


def _neighbour_codes(mask: Array) -> npt.NDArray[np.uint8]:
    """For each 2x2x2 neighbourhood around the corners of the voxels, 8 bits that say which of its voxels are set.

    (i, j, k) bool -> (i+1, j+1, k+1) uint8; outside the mask counts as unset.
    """
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros([n + 1 for n in mask.shape], dtype=np.uint8)
    for bit, (i, j, k) in enumerate(np.ndindex(2, 2, 2)):
        codes |= padded[i:i + codes.shape[0], j:j + codes.shape[1], k:k + codes.shape[2]] << np.uint8(bit)
    return codes


def _surface_area_table() -> FloatArray:
    """Area of the marching-cubes surface (vertices halfway along the cube's edges, unit spacing) for each of the 256 codes.

    The set corners of a cube, or the unset ones if those are fewer, fall into groups that touch along edges, each with its own
    piece of surface. With t = sqrt(3)/8, the area of the triangle that cuts off one corner, a group has the area: one corner t;
    two sqrt(2)/2; three 1/2 + 3t; four on a face 1; four around a corner 6t (a regular hexagon); four along a path
    sqrt(2)/2 + sqrt(3)/2.
    """
    t = 3.0 ** 0.5 / 8.0
    area_by_degrees = {(0,): t, (1, 1): 0.5 ** 0.5, (1, 1, 2): 0.5 + 3.0 * t, (2, 2, 2, 2): 1.0, (1, 1, 1, 3): 6.0 * t,
                       (1, 1, 2, 2): 0.5 ** 0.5 + 0.75 ** 0.5}
    table = np.zeros(256)
    for code in range(1, 255):
        corners = [bit for bit in range(8) if code >> bit & 1]
        if len(corners) > 4:
            corners = [bit for bit in range(8) if bit not in corners]
        while corners:
            group = [corners.pop()]
            for corner in group:  # grows while it is walked through
                group += [other for other in corners if (other ^ corner) in (1, 2, 4)]
                corners = [other for other in corners if other not in group]
            degrees = sorted(sum((other ^ corner) in (1, 2, 4) for other in group) for corner in group)
            table[code] += area_by_degrees[tuple(degrees)]
    return table


_SURFACE_AREA = _surface_area_table()


def _weighted_rank(distances: FloatArray, areas: FloatArray) -> float:
    """The smallest distance below which 95 % of the area lies."""
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / areas[order].sum()
    return float(distances[order[min(int(np.searchsorted(share, 0.95)), distances.size - 1)]])


def _landmark_error(fixed_points: Array, moving_points: Array, disp: Array, spacing: Sequence[float], *, order: int,
                    mode: str) -> FloatArray:
    if fixed_points.ndim != 2 or fixed_points.shape[1] != 3 or fixed_points.shape != moving_points.shape:
        raise InputError(f"landmarks are two (n, 3) arrays of one length; got shapes {fixed_points.shape} and "
                         f"{moving_points.shape}")
    _grid_shape(disp)
    sampled = np.stack([ndimage.map_coordinates(component, fixed_points.T, output=np.float64, order=order, mode=mode)
                        for component in disp], axis=1)  # (n, 3)
    error = (fixed_points + sampled - moving_points) * np.asarray(spacing, dtype=np.float64)
    return np.asarray(np.linalg.norm(error, axis=1), dtype=np.float64)
