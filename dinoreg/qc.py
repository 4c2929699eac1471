"""One picture that shows whether a registration can be trusted: anatomy before and after, how far it moved, where it folds.

Rows are the axial, coronal and sagittal plane through the middle of the displacement, columns: the fixed image; the moving image
before and after, each under the outlines of the fixed image; a chequerboard of fixed and warped; the displacement in mm with the
deformed grid; the change of volume with folds marked; where it is at hand, what the encoder saw. Patient right is on the left, as
radiologists look at images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinoreg.draw import Plane, View, look_at, turned
from dinoreg.io import atomic_write
from dinoreg.result import Registration
from dinoreg.volume import Volume

_COLUMNS = (("fixed", Plane.fixed), ("moving, before", Plane.before), ("moving, after", Plane.after),
            ("fixed and after", Plane.chequerboard), ("displacement, mean {mean:.1f} mm", Plane.displacement),
            ("volume change, folds {folds:.2f} %", Plane.volume_change))
_SEEN = (("encoder saw, fixed", Plane.colours_fixed), ("encoder saw, after", Plane.colours_after))
_LEGEND = ("yellow lines: outlines of the fixed image     chequerboard: fixed and warped moving image     "
           "white grid: where each point is taken from     yellow dots: folds")
_LINE_INCHES, _LETTERS = 0.22, 29  # of text: a line, and letters a column
_PANEL_INCHES, _DPI = 2.9, 90  # a picture of 1566 x 750 px is about 500 kB


def write_qc(path: Path, fixed: Volume, moving: Volume, warped: Volume, result: Registration, *, title: str = "",
             summary: str = "") -> None:
    """Draw the picture and write it as PNG, atomically.

    Args:
        path: .png.
        fixed, moving, warped: see :func:`dinoreg.draw.turned`.
        result: of the pair; its colours are shown where it has them, its warnings always.
        title: first line, such as the pair's name.
        summary: the lines below it, such as metrics before and after.

    Raises:
        InputError: if the shapes do not fit.
        OutputError: if the picture cannot be written.
    """
    figure = _draw(turned(fixed, moving, warped, result.disp, colours=result.colours), title, summary, result.warnings)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor=figure.get_facecolor(), metadata={"Software": None})


def _draw(view: View, title: str, summary: str, warnings: Sequence[str] = ()) -> Figure:
    look, columns = look_at(view), _COLUMNS if view.colours is None else (*_COLUMNS, *_SEEN)
    size = [n * spacing for n, spacing in zip(view.fixed.shape, view.spacing, strict=True)]  # mm
    heights = [size[1], size[2], size[2]]
    lines = [(line, "#dddddd") for line in summary.split("\n")]
    lines += [(shorten(f"Warning: {text}", _LETTERS * len(columns), placeholder=" ..."), "#ffb54d") for text in warnings]
    head, foot = 0.73 + _LINE_INCHES * len(lines), 0.75  # inches
    width = _PANEL_INCHES * len(columns)
    height = sum(heights) * _PANEL_INCHES / max(size[0], size[1]) + head + foot
    figure = Figure(figsize=(width, height), facecolor="black")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, len(columns), height_ratios=heights, left=0.004, right=0.996, bottom=foot / height,
                               top=1 - head / height, wspace=0.03, hspace=0.03)
    figure.text(0.008, 1 - 0.12 / height, title, color="white", fontsize=16, weight="bold", va="top")
    for number, (line, colour) in enumerate(lines):
        figure.text(0.008, 1 - (0.44 + number * _LINE_INCHES) / height, line, color=colour, fontsize=13, va="top")
    figure.text(0.008, 0.16 / height, _LEGEND, color="#aaaaaa", fontsize=10)

    for row in range(3):
        plane = Plane(view, look, row)
        panels = [figure.add_subplot(grid[row, column]) for column in range(len(columns))]
        for panel, (name, draw) in zip(panels, columns, strict=True):
            draw(plane, panel)
            if row == 0:
                panel.set_title(name.format(mean=look.mean_mm, folds=look.folds), color="white", fontsize=12, pad=5)
    reach = look.reach_mm
    for column, ticks, texts in ((4, (0.0, reach / 2, reach), [f"{mm:g} mm" for mm in (0, reach / 2, reach)]),
                                 (5, (-1.0, 0.0, 1.0), ["half", "same", "double"])):
        _colour_bar(figure, (column + 0.18) / len(columns), 0.64 / len(columns), panels[column], ticks, texts)
    return figure


def _colour_bar(figure: Figure, left: float, width: float, panel: Axes, ticks: Sequence[float], labels: Sequence[str]) -> None:
    """The scale of a column's colours, below its last panel; left and width as shares of the figure's."""
    height = float(figure.get_figheight())
    axes = figure.add_axes((0.004 + left * 0.992, 0.50 / height, width, 0.10 / height))
    bar = figure.colorbar(panel.images[0], cax=axes, orientation="horizontal")
    bar.set_ticks(list(ticks), labels=list(labels))
    axes.tick_params(colors="white", labelsize=10, length=2, pad=2)
