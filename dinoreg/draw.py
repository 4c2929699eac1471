"""Drawing of one plane through a registered pair: images, outlines, displacement, change of volume, confidence, features.

Patient right is on the left, as radiologists look at images; lengths are millimetres. ``dinoreg.qc`` and ``dinoreg.htmlreport``
put the panels together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from contourpy import LineType, contour_generator
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.patheffects import withStroke
from scipy import ndimage

from dinoreg import metrics
from dinoreg.errors import InputError
from dinoreg.preprocess import on_grid
from dinoreg.volume import Volume

Array = npt.NDArray[Any]

PLANES = ("axial", "coronal", "sagittal")
_EDGES = (("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I"))  # left, right, top, bottom of each plane
_OUTLINE, _FOLD, _LETTER = "#ffd23f", "#ffee00", "#9ad1ff"
_TINT = LinearSegmentedColormap.from_list("tint", [(1.0, 0.45, 0.0, 0.6), (1.0, 0.45, 0.0, 0.0)])  # ambiguous, clear
_SQUARES, _GRID_LINES = 12, 26  # along the longest side: chequerboard and deformed grid
_VOXELS = 16_000_000  # of larger volumes every second, third ... voxel along each axis is drawn: panels have no more dots
_SMOOTH_VOX, _SHORTEST, _FAINTEST = 1.0, 0.2, 0.07  # outlines: shares of the longest side, and of black to white a voxel


@dataclass(frozen=True, eq=False)
class View:
    """Arrays turned so that their axes run to the patient's left, back and head.

    Attributes:
        fixed, moving, warped: (i, j, k) float32, grey values; the moving image as it lies by its header.
        disp_mm: (3, i, j, k), along the turned axes.
        determinant: (i, j, k), of the field; ``folds`` is the percentage of all voxels where it is not positive.
        body: (i, j, k) bool, roughly the patient.
        spacing: mm a voxel.
        confidence: (i, j, k) in [0, 1], or None.
        colours: (2, i', j', k', 3) uint8 on a lattice over the same extent, of the fixed and the warped image, or None.
    """

    fixed: Array
    moving: Array
    warped: Array
    disp_mm: Array
    determinant: Array
    folds: float
    body: Array
    spacing: tuple[float, float, float]
    confidence: Array | None
    colours: Array | None


def turned(fixed: Volume, moving: Volume, warped: Volume, disp: Array, confidence: Array | None = None,
           colours: Array | None = None) -> View:
    """The view of a pair.

    Args:
        fixed: the fixed image.
        moving: the moving image; on another grid than the fixed one it is resampled through the headers.
        warped: the moving image after registration, on the fixed grid.
        disp: (3, i, j, k), voxels of the fixed grid, pull-back.
        confidence, colours: see :class:`dinoreg.result.Registration`.

    Raises:
        InputError: if the shapes do not fit.
    """
    if disp.shape != (3, *fixed.shape) or warped.shape != fixed.shape:
        raise InputError(f"a picture needs a field of shape {(3, *fixed.shape)} and a warped image of shape {fixed.shape}; "
                         f"got {disp.shape} and {warped.shape}")
    axes = [next(a for a, code in enumerate(fixed.orientation) if code in pair) for pair in ("LR", "PA", "SI")]
    steps = [1 if fixed.orientation[axis] == code else -1 for axis, code in zip(axes, "LPS", strict=True)]

    def turn(array: Array) -> Array:
        return array.transpose(*axes, *range(3, array.ndim))[::steps[0], ::steps[1], ::steps[2]]

    determinant = metrics.jacobian_determinant(disp)
    folds = metrics.folds_percent(determinant)
    every = math.ceil((determinant.size / _VOXELS) ** (1 / 3))
    some = (slice(None, None, every),) * 3
    fixed = Volume(fixed.array[some], fixed.affine @ np.diag([every, every, every, 1.0]))
    placed = np.asarray(on_grid(moving, fixed), dtype=np.float32)
    placed = np.nan_to_num(placed, nan=float(moving.array.min()))
    disp_mm = np.stack([turn(disp[axis][some]) * (step * fixed.spacing[axis] / every)
                        for axis, step in zip(axes, steps, strict=True)])
    images = [turn(array.astype(np.float32)) for array in (fixed.array, placed, warped.array[some])]
    return View(images[0], images[1], images[2], disp_mm, turn(determinant[some]), folds, _body(images[0]),
                (fixed.spacing[axes[0]], fixed.spacing[axes[1]], fixed.spacing[axes[2]]),
                None if confidence is None else turn(confidence[some]),
                None if colours is None else np.stack([turn(image) for image in colours]))


def _thresholds(image: Array) -> tuple[float, float]:
    """The two grey values that split the image best into dark, middle and bright (Otsu's criterion with three classes)."""
    low, high = np.percentile(image, (0.5, 99.5))
    if high <= low:
        return float(low), float(high)
    counts, edges = np.histogram(image.clip(low, high), bins=64)
    weight = np.concatenate([[0.0], np.cumsum(counts / counts.sum())])
    moment = np.concatenate([[0.0], np.cumsum(counts / counts.sum() * (edges[1:] + edges[:-1]) / 2)])

    def between(start: Array, stop: Array) -> Array:
        share = weight[stop] - weight[start]
        return np.asarray((moment[stop] - moment[start]) ** 2 / np.maximum(share, 1e-9))

    first, second = np.triu_indices(63, k=1)
    first, second = first + 1, second + 1
    score = between(np.zeros_like(first), first) + between(first, second) + between(second, np.full_like(second, 64))
    best = int(np.argmax(score))
    return float(edges[first[best]]), float(edges[second[best]])


def _body(image: Array) -> Array:
    """Roughly the patient: the convex outline (16 sides) of the largest bright region, in each axial slice. It holds what is dark
    inside, also a lung that the edge of the view cuts open."""
    bright = image > _thresholds(image)[0]
    labels, count = ndimage.label(bright)
    if count == 0:
        return np.ones(image.shape, dtype=bool)
    largest = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    angles = np.arange(16) * (np.pi / 8)
    across, back = (np.arange(n)[:, None] for n in image.shape[:2])
    body = np.zeros(image.shape, dtype=bool)
    for k in range(image.shape[2]):
        points = np.argwhere(largest[:, :, k])
        if len(points):
            body[:, :, k] = True
            for x, y in zip(np.cos(angles), np.sin(angles), strict=True):
                body[:, :, k] &= across * x + back.T * y <= (points @ (x, y)).max() + 1e-6  # rounding
    return body


def _positions(view: View, length_mm: Array) -> tuple[int, int, int]:
    """Where to cut: for each axis the middle half's plane with the greatest displacement in the body."""
    length = length_mm * view.body
    cuts = []
    for axis, n in enumerate(length.shape):
        others = tuple(a for a in range(3) if a != axis)
        profile = ndimage.gaussian_filter1d(length.sum(axis=others) + 1e-3 * view.body.sum(axis=others), n / 16)
        inside = slice(n // 4, max(n // 4 + 1, n - n // 4))
        cuts.append(n // 4 + int(np.argmax(profile[inside])))
    return cuts[0], cuts[1], cuts[2]


@dataclass(frozen=True, eq=False)
class Look:
    """What all planes of a view share.

    Attributes:
        windows: grey values of the fixed and of the moving image that are black and white.
        levels: grey values of the outlines.
        length_mm: (i, j, k), of the displacement; ``reach_mm`` ends its colour scale, ``mean_mm`` and ``far_mm`` (95 % are
            shorter) are taken over the body.
        folds: percent of the voxels.
        cuts: where the planes cut the axes, voxels.
    """

    windows: tuple[tuple[float, float], tuple[float, float]]
    levels: tuple[float, float]
    length_mm: Array
    reach_mm: float
    mean_mm: float
    far_mm: float
    folds: float
    cuts: tuple[int, int, int]


def look_at(view: View) -> Look:
    """Windows, scales and cuts for a view."""
    length = np.linalg.norm(view.disp_mm, axis=0)
    inside = length[view.body]
    return Look((_window(view.fixed, view.body), _window(view.moving, _body(view.moving))), _thresholds(view.fixed), length,
                max(1.0, float(np.ceil(np.percentile(inside, 99.5)))), float(inside.mean()), float(np.percentile(inside, 95)),
                view.folds, _positions(view, length))


def _window(image: Array, body: Array) -> tuple[float, float]:
    """Black: a little below the darkest seventh of the body (air in an abdomen is less, lungs are more). White: its brightest."""
    low, high = (float(value) for value in np.percentile(image[body], (15.0, 99.0)))
    return low - 0.15 * (high - low), max(high, low + 1e-6)


class Plane:
    """One plane of a view, ready to be drawn.

    Args:
        row: index into ``PLANES``.

    Attributes:
        extent: (0, width, 0, height), mm.
    """

    def __init__(self, view: View, look: Look, row: int) -> None:
        self.view, self.look, self.row = view, look, row
        self.across, self.down = ((0, 1), (0, 2), (1, 2))[row]  # the axes of the plane
        shape, spacing = view.fixed.shape, view.spacing
        self.extent = (0.0, shape[self.across] * spacing[self.across], 0.0, shape[self.down] * spacing[self.down])
        self.centres = [(np.arange(shape[axis]) + 0.5) * spacing[axis] for axis in (self.across, self.down)]  # mm
        windows = (look.windows[0], look.windows[1], look.windows[1])
        self._grey = [((self._cut(array) - low) / (high - low)).clip(0.0, 1.0)
                      for array, (low, high) in zip((view.fixed, view.moving, view.warped), windows, strict=True)]
        self._lines = _outlines(self._cut(view.fixed), look, self.centres)

    def _cut(self, array: Array) -> Array:
        """Rows: the axis ``down``; columns: the axis ``across``; of a volume on any lattice over the extent of the view."""
        axis = 2 - self.row  # axial planes cut the third axis, coronal ones the second, sagittal ones the first
        n, cells = self.view.fixed.shape[axis], array.shape[axis]
        plane = np.take(array, int((self.look.cuts[axis] + 0.5) * cells / n), axis=axis)
        return np.asarray(plane.swapaxes(0, 1))

    def fixed(self, axes: Axes) -> None:
        """The fixed image, with the plane's name, patient directions and a scale bar."""
        self._show(axes, self._grey[0])
        style: dict[str, Any] = {"transform": axes.transAxes, "color": _LETTER, "weight": "bold", "va": "center",
                                 "path_effects": [withStroke(linewidth=2.5, foreground="black")]}
        axes.text(0.02, 0.955, PLANES[self.row], fontsize=11, ha="left", **style)
        places = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.955), (0.5, 0.045))
        for letter, (x, y) in zip(_EDGES[self.row], places, strict=True):
            axes.text(x, y, letter, fontsize=12, ha="center", **style)
        width = self.extent[1]
        bar_mm = max(mm for mm in (1, 2, 5, 10, 20, 50, 100, 200) if mm <= max(1.0, 0.4 * width))
        end = 0.97
        axes.plot([end - bar_mm / width, end], [0.05, 0.05], transform=axes.transAxes, color=_LETTER, linewidth=2.5,
                  solid_capstyle="butt", path_effects=style["path_effects"])
        axes.text(end, 0.12, f"{bar_mm} mm", fontsize=9, ha="right", **style)

    def before(self, axes: Axes) -> None:
        """The moving image as it lies by its header, under the outlines of the fixed one."""
        self._show(axes, self._grey[1])
        self._outline(axes)

    def after(self, axes: Axes) -> None:
        """The moving image after registration, under the outlines of the fixed one."""
        self._show(axes, self._grey[2])
        self._outline(axes)

    def chequerboard(self, axes: Axes) -> None:
        """Squares of the fixed and the warped image."""
        x, y = (centres * _SQUARES // max(self.extent) for centres in self.centres)
        self._show(axes, np.where((y[:, None] + x[None, :]) % 2 == 0, self._grey[0], self._grey[2]))

    def displacement(self, axes: Axes) -> None:
        """Its length in mm, with the deformed grid."""
        self._map(axes, self.look.length_mm, "viridis", Normalize(0, self.look.reach_mm))
        _deformed_grid(axes, self._cut(self.view.disp_mm[self.across]), self._cut(self.view.disp_mm[self.down]), self.centres)

    def volume_change(self, axes: Axes) -> None:
        """The determinant of the field's derivative, as powers of two, with folds marked."""
        determinant = self._cut(self.view.determinant)
        self._map(axes, np.log2(self.view.determinant.clip(0.25, 4.0)), "RdBu_r", Normalize(-1, 1))
        rows, columns = np.nonzero(determinant <= 0)
        axes.scatter(self.centres[0][columns], self.centres[1][rows], s=4, marker="s", color=_FOLD, linewidths=0)

    def confidence(self, axes: Axes) -> None:
        """How clear the match is: the fixed image, tinted where it is ambiguous."""
        assert self.view.confidence is not None
        self._map(axes, self.view.confidence, _TINT, Normalize(0, 1))
        axes.imshow(self._grey[0], cmap="gray", vmin=0, vmax=1, extent=self.extent, origin="lower", interpolation="nearest",
                    zorder=-1)

    def colours_fixed(self, axes: Axes) -> None:
        """The first three components of the features of the fixed image."""
        self._colours(axes, 0)

    def colours_after(self, axes: Axes) -> None:
        """The same of the warped image."""
        self._colours(axes, 1)

    def _colours(self, axes: Axes, image: int) -> None:
        assert self.view.colours is not None
        self._show(axes, self._cut(self.view.colours[image]), interpolation="bilinear")

    def _map(self, axes: Axes, values: Array, colours: str | Colormap, scale: Normalize) -> None:
        self._show(axes, np.where(self._cut(self.view.body), self._cut(values), np.nan), cmap=colours, norm=scale)

    def _outline(self, axes: Axes) -> None:
        for line in self._lines:
            axes.plot(line[:, 0], line[:, 1], color=_OUTLINE, linewidth=0.9)

    def _show(self, axes: Axes, image: Array, **options: Any) -> None:
        grey: dict[str, Any] = {} if options else {"cmap": "gray", "vmin": 0, "vmax": 1}
        axes.imshow(image, **{"extent": self.extent, "origin": "lower", "interpolation": "nearest", **grey, **options})
        axes.set_facecolor("black")
        axes.set_axis_off()
        axes.set_xlim(self.extent[:2])
        axes.set_ylim(self.extent[:1:-1] if self.row == 0 else self.extent[2:])  # axial: front on top
        axes.set_aspect("equal")
        axes.set_autoscale_on(False)


def _outlines(image: Array, look: Look, centres: Sequence[Array]) -> list[Array]:
    """Level lines (n, 2) of a plane of the fixed image in mm; short ones and those without contrast (noise) are left out."""
    if look.levels[0] >= look.levels[1]:
        return []
    smooth = ndimage.gaussian_filter(image, _SMOOTH_VOX)
    steepness = np.hypot(*np.gradient(smooth)) / (look.windows[0][1] - look.windows[0][0])
    generator = contour_generator(z=smooth, line_type=LineType.Separate)  # in voxels
    kept = []
    for line in (np.asarray(line) for level in look.levels for line in generator.lines(level)):
        along = ndimage.map_coordinates(steepness, line[:, ::-1].T, order=1)
        in_mm = np.stack([np.interp(line[:, 0], np.arange(len(centres[0])), centres[0]),
                          np.interp(line[:, 1], np.arange(len(centres[1])), centres[1])], axis=1)
        length = np.linalg.norm(np.diff(in_mm, axis=0), axis=1).sum()
        if length >= _SHORTEST * max(centres[0][-1], centres[1][-1]) and np.median(along) >= _FAINTEST:
            kept.append(in_mm)
    return kept


def _deformed_grid(panel: Axes, across: Array, down: Array, centres: Sequence[Array]) -> None:
    """Lines of a regular grid in the fixed image, drawn where the field takes their points from."""
    x, y = centres[0][None, :] + across, centres[1][:, None] + down
    lines = []
    step_mm = max(centres[0][-1], centres[1][-1]) / _GRID_LINES
    for along, (first, second) in ((centres[0], (x.T, y.T)), (centres[1], (x, y))):
        every = max(1, round(step_mm / float(along[1] - along[0])))
        lines += [(first[index], second[index]) for index in range(every // 2, len(along), every)]
    for line in lines:
        panel.plot(*line, color="white", linewidth=0.5, alpha=0.8)
