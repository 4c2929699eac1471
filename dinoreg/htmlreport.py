"""A page that shows whether a registration can be trusted: one file, no network, no scripts; opens in any browser.

Pictures are in the page as data. Whatever comes from outside (titles, file names, messages) is escaped, and a policy in the page
forbids it to load anything.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinoreg import __version__
from dinoreg.draw import PLANES, Look, Plane, View, look_at, turned
from dinoreg.io import atomic_write
from dinoreg.report import field_metrics
from dinoreg.result import Registration
from dinoreg.volume import Volume

_INCHES, _DPI, _BAR_INCHES = 4.2, 100, 0.42  # the longer side of a panel, and the strip for its scale of colours
_MANY_FOLDS = 0.1  # percent
_UNSURE = 0.1  # confidence

Ticks = tuple[list[float], list[str]]


@dataclass(frozen=True)
class _Panel:
    """What is drawn, what it is called and means, and the ticks of its scale of colours."""

    label: str
    meaning: str
    draw: Callable[[Plane, Axes], None]
    ticks: Callable[[Look], Ticks] | None = None


def _millimetres(look: Look) -> Ticks:
    values = [0, look.reach_mm / 2, look.reach_mm]
    return values, [f"{mm:g} mm" for mm in values]


_ANATOMY = (
    _Panel("Fixed", "the fixed image", Plane.fixed),
    _Panel("Moving, before", "the moving image as it lies by its header, under the outlines of the fixed one", Plane.before),
    _Panel("Moving, after", "the moving image after registration, under the outlines of the fixed one", Plane.after),
    _Panel("Fixed and after", "squares of the fixed image and of the moving one after registration", Plane.chequerboard))
_MOTION = (
    _Panel("Displacement", "how far tissue moved, in mm; the white grid shows where each point is taken from",
           Plane.displacement, _millimetres),
    _Panel("Change of volume", "size of tissue in the moving image against the fixed one: red larger, blue smaller; yellow dots: "
           "folds", Plane.volume_change, lambda _: ([-1, 0, 1], ["half", "same", "double"])))
_CONFIDENCE = _Panel("Confidence", "orange where other places would have matched as well, grey where one place was clearly best",
                     Plane.confidence, lambda _: ([0, 1], ["ambiguous", "clear"]))
_FEATURES = (_Panel("Fixed", "features of the fixed image as colours", Plane.colours_fixed),
             _Panel("Moving, after", "features of the moving image after registration", Plane.colours_after))


def write_html_report(path: Path, fixed: Volume, moving: Volume, warped: Volume, result: Registration, *, title: str,
                      names: tuple[str, str] = ("fixed image", "moving image"),
                      scores: Mapping[str, tuple[str, str]] | None = None,
                      config: Mapping[str, Any] | None = None) -> None:
    """Write the page of a pair, atomically.

    Args:
        path: .html.
        fixed, moving: the images, as read.
        warped: the moving image after registration, on the fixed grid.
        result: of the pair; its confidence and its colours are shown where it has them, its warnings always.
        title: of the page, such as the pair's name.
        names: of the fixed and the moving image, such as their file names.
        scores: what was measured before and after registration, in words with units: {"Landmarks": ("8.5 mm", "1.1 mm")}.
        config: the whole configuration, as ``Config.to_dict`` gives it.

    Raises:
        InputError: if the shapes do not fit.
        OutputError: if the page cannot be written.
    """
    view = turned(fixed, moving, warped, result.disp, result.confidence, result.colours)
    look = look_at(view)
    planes = [Plane(view, look, row) for row in range(3)]
    sections = [
        _section("Anatomy", "After registration the yellow outlines of the fixed image should lie on the edges of the moving "
                 "image, and edges should run on from square to square.", _ANATOMY, planes),
        _section("Motion", "The field should be smooth, and large only where anatomy moved.",
                 _MOTION if result.confidence is None else (*_MOTION, _CONFIDENCE), planes)]
    if result.colours is not None:
        encoder = escape(str(result.info.get("encoder", "unknown")))
        sections.append(_section("What the encoder saw", f"The encoder is {encoder}. The "
                                 "first three principal components of its features are shown as red, green and blue: the same "
                                 "tissue should have the same colour in both images.", _FEATURES, planes))
    metrics = field_metrics(result.disp, fixed.spacing)
    page = _PAGE.format(
        title=escape(title), style=_STYLE, sections="\n".join(sections),
        summary=_summary(view, look, result, fixed, moving, scores or {}),
        scores=_scores(scores or {}), field=_table([(name, _number(metrics[key], unit)) for name, key, unit in _FIELD]),
        images=_images(names, (fixed, moving)), stages=_stages(result), version=escape(__version__),
        config=escape(json.dumps({"configuration": dict(config or {}), "run": result.info}, indent=1, default=str)))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names may hold any bytes


def _summary(view: View, look: Look, result: Registration, fixed: Volume, moving: Volume,
             scores: Mapping[str, tuple[str, str]]) -> str:
    """The findings in words, worst first: what a reader has to know before looking at pictures."""
    found = [("warning", text[:1].upper() + text[1:]) for text in result.warnings]
    folds = (f"The field folds in {look.folds:.2g} % of the volume (yellow dots): tissue would have to pass through itself there."
             if look.folds else "The field folds nowhere.")
    if look.folds > _MANY_FOLDS:
        found.append(("warning", folds))
    found += [("note", f"{name}: {before} before, {after} after registration.") for name, (before, after) in scores.items()]
    if look.folds <= _MANY_FOLDS:
        found.append(("note" if look.folds else "good", folds))
    found.append(("note", f"Inside the body the anatomy moves by {look.mean_mm:.1f} mm on average; 95 % of it moves by less than "
                          f"{look.far_mm:.1f} mm."))
    if not moving.same_grid(fixed):
        found.append(("note", f"The images lie on different grids: fixed {_grid(fixed)}; moving {_grid(moving)}. Their headers "
                              "say where; if \"Moving, before\" shows another part of the body, or a turned one, one is wrong."))
    if not np.allclose(result.initial, np.eye(4)):
        found.append(("note", "An affine alignment came first; it is part of the displacement."))
    if view.confidence is not None:
        unsure = 100 * float((view.confidence[view.body] < _UNSURE).mean())
        found.append(("note", f"In {unsure:.0f} % of the body the match is ambiguous (confidence below {_UNSURE:g}): there the "
                              "field follows its surroundings."))
    if not result.warnings:
        found.append(("good", "There are no warnings."))
    words = {"warning": "Warning", "good": "Good", "note": "Note"}
    return "\n".join(f'<li class="{kind}"><b>{words[kind]}</b> {escape(text)}</li>' for kind, text in found)


def _section(name: str, text: str, panels: Sequence[_Panel], planes: Sequence[Plane]) -> str:
    rows = []
    for plane in planes:
        figures = []
        for panel in panels:
            picture, (width, height) = _picture(plane, panel)
            figures.append(f'<figure><img src="data:image/jpeg;base64,{picture}" width="{width}" height="{height}" '
                           f'alt="{PLANES[plane.row]} plane: {panel.meaning}">'
                           f'<figcaption>{panel.label}, {PLANES[plane.row]}</figcaption></figure>')
        rows.append(f'<div class="panels" style="--columns:{len(panels)}">{"".join(figures)}</div>')
    legend = "".join(f"<li><b>{panel.label}</b>: {panel.meaning}</li>" for panel in panels)
    return f'<section><h2>{name}</h2><p>{text}</p>{"".join(rows)}<ul class="legend">{legend}</ul></section>'


def _picture(plane: Plane, panel: _Panel) -> tuple[str, tuple[int, int]]:
    """A panel as JPEG in base64, and its width and height in pixels."""
    width, height = (_INCHES * side / max(plane.extent) for side in (plane.extent[1], plane.extent[3]))
    bar = 0.0 if panel.ticks is None else _BAR_INCHES
    figure = Figure(figsize=(width, height + bar), facecolor="black")
    FigureCanvasAgg(figure)
    strip = bar / (height + bar)
    axes = figure.add_axes((0, strip, 1, 1 - strip))
    panel.draw(plane, axes)
    if panel.ticks is not None:
        scale = figure.colorbar(axes.images[0], cax=figure.add_axes((0.12, 0.66 * strip, 0.76, 0.22 * strip)),
                                orientation="horizontal")
        scale.ax.set_facecolor("#999999")  # shows through where colours are transparent
        ticks, labels = panel.ticks(plane.look)
        scale.set_ticks(ticks, labels=labels)
        scale.ax.tick_params(colors="white", labelsize=9, length=2, pad=1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=_DPI, facecolor="black", pil_kwargs={"quality": 88, "subsampling": 0})
    return base64.b64encode(buffer.getvalue()).decode(), (round(width * _DPI), round((height + bar) * _DPI))


_FIELD = (("Displacement, mean over the image", "displacement_mean_mm", "mm"),
          ("Displacement, largest", "displacement_max_mm", "mm"),
          ("Folds (Jacobian determinant 0 or less)", "folds_percent", "% of the voxels"),
          ("Jacobian determinant, smallest", "jacobian_min", ""), ("Jacobian determinant, largest", "jacobian_max", ""),
          ("Standard deviation of its logarithm (SDlogJ)", "sdlogj", ""))


def _number(value: float | None, unit: str) -> str:
    return "none" if value is None else f"{value:.3g} {unit}".strip()


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Rows of texts as they are, not yet escaped; the first column names the row."""
    top = f"<tr>{''.join(f'<th scope=col>{escape(text)}</th>' for text in head)}</tr>" if head else ""
    body = "".join(f"<tr><th scope=row>{escape(row[0])}</th>{''.join(f'<td>{escape(text)}</td>' for text in row[1:])}</tr>"
                   for row in rows)
    return f'<div class="wide"><table>{top}{body}</table></div>'


def _scores(scores: Mapping[str, tuple[str, str]]) -> str:
    if not scores:
        return ""
    return "<h3>Before and after</h3>" + _table([(name, *pair) for name, pair in scores.items()], ("", "before", "after"))


def _images(names: tuple[str, str], volumes: tuple[Volume, Volume]) -> str:
    rows = []
    for role, name, volume in zip(("fixed", "moving"), names, volumes, strict=True):
        rows.append((role, name, " x ".join(map(str, volume.shape)), _spacing(volume), volume.orientation))
    return _table(rows, ("", "image", "voxels", "spacing", "axes run to"))


def _spacing(volume: Volume) -> str:
    return " x ".join(f"{s:.3g}" for s in volume.spacing) + " mm"


def _grid(volume: Volume) -> str:
    return f"{' x '.join(map(str, volume.shape))} voxels of {_spacing(volume)}, axes to {volume.orientation}"


def _stages(result: Registration) -> str:
    rows = [(name, f"{used['seconds']:.1f} s", f"{used['peak_rss_mb']:.0f} MiB") for name, used in result.stages.items()]
    return _table(rows, ("stage", "time", "memory so far"))


_STYLE = """
:root{color-scheme:dark}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1400px;padding:16px;background:#0b0d10;color:#e4e7eb;font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.4rem;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:1.6rem 0 .2rem}
h3{font-size:1rem;margin:1rem 0 .3rem}
p{margin:.2rem 0 .6rem;max-width:90ch}
ul{margin:.4rem 0;padding:0;list-style:none}
.findings li{margin:.25rem 0;padding:.35rem .7rem;border-left:5px solid #8b949e;background:#161a20;overflow-wrap:anywhere}
.findings b{margin-right:.4rem}
.findings .warning{border-color:#ff9f1c}.warning b{color:#ffb54d}
.findings .good{border-color:#3fb950}.good b{color:#6fd87e}
.note b{color:#b6bec8}
.panels{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,420px));gap:6px}
figure{margin:0}
img{display:block;width:100%;height:auto;background:#000}
figcaption{font-size:.82rem;color:#b6bec8;padding:.1rem 0 .3rem}
.legend{font-size:.85rem;color:#b6bec8}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem}
th,td{text-align:left;padding:.25rem .9rem .25rem 0;border-bottom:1px solid #2a3038;vertical-align:top}
th{font-weight:600;color:#b6bec8}
td{font-variant-numeric:tabular-nums;min-width:5.5rem;max-width:28rem;overflow-wrap:anywhere}
details{margin:.8rem 0}
summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.82rem;background:#161a20;padding:.7rem}
footer{margin-top:1.5rem;font-size:.85rem;color:#8b949e}
@media (max-width:700px){body{padding:10px}.panels{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media print{body{background:#fff;color:#000}}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>
<ul class="findings">
{summary}
</ul>
<p>Planes cut the body where it moves most. Patient right (R) is on the left of axial and coronal planes.</p></header>
<main>
{sections}
<section><h2>Numbers</h2>{scores}
<h3>The field</h3>{field}
<h3>The images</h3>{images}
<h3>The run</h3>{stages}</section>
<details><summary>Configuration</summary><pre>{config}</pre></details>
</main>
<footer>DINO-Reg {version}. Research software, not a medical device: a picture can look right where the match is wrong.</footer>
</body>
</html>
"""
