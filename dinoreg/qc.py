"""One picture that shows whether a registration can be trusted: anatomy before and after, how far it moved, where it folds.

Rows are the axial, coronal and sagittal plane through the middle of the displacement, columns: the fixed image; the moving image
before and after, each under the outlines of the fixed image; a chequerboard of fixed and warped; the displacement in mm with the
deformed grid; the change of volume with folds marked. Patient right is on the left, as radiologists look at images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from contourpy import LineType, contour_generator
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy import ndimage

from dinoreg import metrics
from dinoreg.errors import InputError
from dinoreg.io import atomic_write
from dinoreg.volume import Volume

Array = npt.NDArray[Any]

_COLUMNS = ("fixed", "moving, before", "moving, after", "fixed and after", "displacement, mean {mean:.1f} mm",
            "volume change, folds {folds:.2f} %")
_LEGEND = ("yellow lines: outlines of the fixed image     chequerboard: fixed and warped moving image     "
           "white grid: where each point is taken from     yellow dots: folds")
_PLANES = ("axial", "coronal", "sagittal")
_EDGES = (("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I"))  # left, right, top, bottom of each plane
_OUTLINE, _FOLD, _LETTER = "#ffd23f", "#ffee00", "#9ad1ff"
_PANEL_INCHES, _DPI = 2.9, 90  # a picture of 1566 x 750 px is below 500 kB
_SQUARES, _GRID_LINES = 12, 26  # along the longest side: chequerboard and deformed grid
_SMOOTH_VOX, _SHORTEST, _FAINTEST = 1.0, 0.2, 0.07  # outlines: shares of the longest side, and of black to white a voxel


@dataclass(frozen=True)
class _View:
    """Arrays turned so that their axes run to the patient's left, back and head, with mm a voxel."""

    fixed: Array
    moving: Array
    warped: Array
    disp_mm: Array  # (3, i, j, k) along the turned axes
    determinant: Array
    body: Array  # bool
    spacing: tuple[float, float, float]


def write_qc(path: Path, fixed: Volume, moving: Volume, warped: Volume, disp: Array, *, title: str = "",
             summary: str = "") -> None:
    """Draw the picture and write it as PNG, atomically.

    Args:
        path: .png.
        fixed: the fixed image.
        moving: the moving image; on another grid than the fixed one it is resampled through the headers.
        warped: the moving image after registration, on the fixed grid.
        disp: (3, i, j, k), voxels of the fixed grid, pull-back.
        title: first line, such as the pair's name.
        summary: second line, such as metrics before and after.

    Raises:
        InputError: if the shapes do not fit.
        OutputError: if the picture cannot be written.
    """
    if disp.shape != (3, *fixed.shape) or warped.shape != fixed.shape:
        raise InputError(f"a picture needs a field of shape {(3, *fixed.shape)} and a warped image of shape {fixed.shape}; "
                         f"got {disp.shape} and {warped.shape}")
    view = _turn(fixed, moving if moving.same_grid(fixed) else _on_grid(moving, fixed), warped, disp)
    figure = _draw(view, title, summary)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor=figure.get_facecolor(), metadata={"Software": None})


def _on_grid(moving: Volume, fixed: Volume) -> Volume:
    """The moving image on the fixed grid, through the headers alone."""
    matrix = np.linalg.solve(moving.affine, fixed.affine)
    array = ndimage.affine_transform(moving.array.astype(np.float32), matrix[:3, :3], matrix[:3, 3], fixed.shape, order=1,
                                     mode="constant", cval=float(moving.array.min()))
    return Volume(array, fixed.affine)


def _turn(fixed: Volume, moving: Volume, warped: Volume, disp: Array) -> _View:
    axes = [next(a for a, code in enumerate(fixed.orientation) if code in pair) for pair in ("LR", "PA", "SI")]
    steps = [1 if fixed.orientation[axis] == code else -1 for axis, code in zip(axes, "LPS", strict=True)]

    def turn(array: Array) -> Array:
        return array.transpose(axes)[::steps[0], ::steps[1], ::steps[2]]

    disp_mm = np.stack([turn(disp[axis]) * (step * fixed.spacing[axis]) for axis, step in zip(axes, steps, strict=True)])
    images = [turn(volume.array.astype(np.float32)) for volume in (fixed, moving, warped)]
    return _View(images[0], images[1], images[2], disp_mm, turn(metrics.jacobian_determinant(disp)), _body(images[0]),
                 (fixed.spacing[axes[0]], fixed.spacing[axes[1]], fixed.spacing[axes[2]]))


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
    """Roughly the patient: the largest bright region, filled in each axial slice."""
    bright = image > _thresholds(image)[0]
    labels, count = ndimage.label(bright)
    if count == 0:
        return np.ones(image.shape, dtype=bool)
    largest = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return np.stack([ndimage.binary_fill_holes(largest[:, :, k]) for k in range(image.shape[2])], axis=2)


def _positions(view: _View) -> tuple[int, int, int]:
    """Where to cut: for each axis the middle half's plane with the greatest displacement in the body."""
    length = np.linalg.norm(view.disp_mm, axis=0) * view.body
    cuts = []
    for axis, n in enumerate(length.shape):
        others = tuple(a for a in range(3) if a != axis)
        profile = ndimage.gaussian_filter1d(length.sum(axis=others) + 1e-3 * view.body.sum(axis=others), n / 16)
        inside = slice(n // 4, max(n // 4 + 1, n - n // 4))
        cuts.append(n // 4 + int(np.argmax(profile[inside])))
    return cuts[0], cuts[1], cuts[2]


def _draw(view: _View, title: str, summary: str) -> Figure:
    cuts = _positions(view)
    size = [n * spacing for n, spacing in zip(view.fixed.shape, view.spacing, strict=True)]  # mm
    heights = [size[1], size[2], size[2]]
    head, foot = 0.95, 0.75  # inches
    width = _PANEL_INCHES * len(_COLUMNS)
    height = sum(heights) * _PANEL_INCHES / max(size[0], size[1]) + head + foot
    figure = Figure(figsize=(width, height), facecolor="black")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, len(_COLUMNS), height_ratios=heights, left=0.004, right=0.996, bottom=foot / height,
                               top=1 - head / height, wspace=0.03, hspace=0.03)
    figure.text(0.008, 1 - 0.12 / height, title, color="white", fontsize=16, weight="bold", va="top")
    figure.text(0.008, 1 - 0.44 / height, summary, color="#dddddd", fontsize=13, va="top")
    figure.text(0.008, 0.16 / height, _LEGEND, color="#aaaaaa", fontsize=10)

    look = _look(view)
    for row in range(3):
        panels = [figure.add_subplot(grid[row, column]) for column in range(len(_COLUMNS))]
        _draw_plane(panels, view, look, row, cuts[2 - row])  # axial cuts the third axis, coronal the second, sagittal the first
        if row == 0:
            for panel, name in zip(panels, _COLUMNS, strict=True):
                panel.set_title(name.format(mean=look.mean_mm, folds=look.folds), color="white", fontsize=12, pad=5)
    reach = look.reach_mm
    _colour_bar(figure, 4, panels[4], [0, reach / 2, reach], [f"{mm:g} mm" for mm in (0, reach / 2, reach)], height)
    _colour_bar(figure, 5, panels[5], [-1, 0, 1], ["half", "same", "double"], height)
    return figure


@dataclass(frozen=True)
class _Look:
    """What all planes share."""

    windows: tuple[tuple[float, float], tuple[float, float]]  # grey values of the fixed and the moving image: black, white
    levels: tuple[float, float]  # of the outlines
    length_mm: Array  # of the displacement
    reach_mm: float  # end of its colour scale
    mean_mm: float
    folds: float  # percent


def _look(view: _View) -> _Look:
    length = np.linalg.norm(view.disp_mm, axis=0)
    inside = length[view.body]
    return _Look((_window(view.fixed, view.body), _window(view.moving, _body(view.moving))), _thresholds(view.fixed), length,
                 max(1.0, float(np.ceil(np.percentile(inside, 99.5)))), float(inside.mean()),
                 metrics.folds_percent(view.determinant))


def _window(image: Array, body: Array) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(image[body], (2.0, 98.5)))
    return low, max(high, low + 1e-6)


def _draw_plane(panels: Sequence[Axes], view: _View, look: _Look, row: int, index: int) -> None:
    """The six panels of one plane."""
    across, down = ((0, 1), (0, 2), (1, 2))[row]  # the axes of the plane

    def cut(array: Array) -> Array:
        return np.asarray(np.take(array, index, axis=2 - row).T)  # rows: the axis ``down``; columns: the axis ``across``

    extent = (0.0, view.fixed.shape[across] * view.spacing[across], 0.0, view.fixed.shape[down] * view.spacing[down])
    centres = [(np.arange(view.fixed.shape[axis]) + 0.5) * view.spacing[axis] for axis in (across, down)]  # mm
    images = []
    for array, (low, high) in ((view.fixed, look.windows[0]), (view.moving, look.windows[1]), (view.warped, look.windows[1])):
        images.append(((cut(array) - low) / (high - low)).clip(0.0, 1.0))
    longest = max(extent)
    even = (centres[1][:, None] * _SQUARES // longest + centres[0][None, :] * _SQUARES // longest) % 2 == 0
    for panel, image in zip(panels[:4], [*images, np.where(even, images[0], images[2])], strict=True):
        panel.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, origin="lower", interpolation="nearest")
    for line in _outlines(cut(view.fixed), look, centres):
        for panel in panels[1:3]:
            panel.plot(line[:, 0], line[:, 1], color=_OUTLINE, linewidth=0.9)

    body = cut(view.body)
    maps = ((cut(look.length_mm), "viridis", Normalize(0, look.reach_mm)),
            (np.log2(cut(view.determinant).clip(0.25, 4.0)), "RdBu_r", Normalize(-1, 1)))
    for panel, (values, colours, scale) in zip(panels[4:], maps, strict=True):
        panel.imshow(np.where(body, values, np.nan), cmap=colours, norm=scale, extent=extent, origin="lower",
                     interpolation="nearest")
    _deformed_grid(panels[4], cut(view.disp_mm[across]), cut(view.disp_mm[down]), centres)
    fold_rows, fold_columns = np.nonzero(cut(view.determinant) <= 0)
    panels[5].scatter(centres[0][fold_columns], centres[1][fold_rows], s=4, marker="s", color=_FOLD, linewidths=0)
    for panel in panels:
        panel.set_facecolor("black")
        panel.set_axis_off()
        panel.set_xlim(extent[0], extent[1])
        panel.set_ylim((extent[3], extent[2]) if row == 0 else (extent[2], extent[3]))  # axial: front on top
        panel.set_aspect("equal")
    letters = zip(_EDGES[row], ((0.03, 0.5), (0.97, 0.5), (0.5, 0.955), (0.5, 0.045)), strict=True)
    style: dict[str, Any] = {"transform": panels[0].transAxes, "color": _LETTER, "weight": "bold", "va": "center",
                             "path_effects": [withStroke(linewidth=2.5, foreground="black")]}
    panels[0].text(0.02, 0.955, _PLANES[row], fontsize=11, ha="left", **style)
    for letter, (x, y) in letters:
        panels[0].text(x, y, letter, fontsize=12, ha="center", **style)


def _outlines(image: Array, look: _Look, centres: Sequence[Array]) -> list[Array]:
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


def _colour_bar(figure: Figure, column: int, panel: Axes, ticks: Sequence[float], labels: Sequence[str], height: float) -> None:
    """The scale of a column's colours, below its last panel."""
    axes = figure.add_axes((0.004 + (column + 0.18) / len(_COLUMNS) * 0.992, 0.50 / height, 0.64 / len(_COLUMNS), 0.10 / height))
    bar = figure.colorbar(panel.images[0], cax=axes, orientation="horizontal")
    bar.set_ticks(list(ticks), labels=list(labels))
    axes.tick_params(colors="white", labelsize=10, length=2, pad=2)
