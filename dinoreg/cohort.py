"""A list of pairs in a CSV, and one table of what became of them."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dinoreg.errors import ConfigError, InputError
from dinoreg.io import write_text
from dinoreg.truth import ROLES

REQUIRED, OPTIONAL = ("fixed", "moving"), ("name", "fixed_mask", "moving_mask", *ROLES)
PATHS = tuple(column for column in (*REQUIRED, *OPTIONAL) if column != "name")
TABLES = ("results.csv", "results.html")
_FIELD = ("displacement_mean_mm", "displacement_max_mm", "folds_percent", "sdlogj")
_SCORES = {"dice_before": ("dice", "before"), "dice_after": ("dice", "after"), "tre_before_mm": ("tre_mm", "before"),
           "tre_after_mm": ("tre_mm", "after")}
COLUMNS = ("name", "status", *_SCORES, *_FIELD, "seconds", "warnings", "message", "fixed", "moving")
_STYLE = """body{font:15px/1.5 sans-serif;margin:2em}table{border-collapse:collapse}
th,td{border:1px solid #ccc;padding:.2em .6em;text-align:left}.failed{background:#fdd}
td:nth-last-child(-n+3){overflow-wrap:anywhere;min-width:12em}
img{display:block;width:24em;margin:.3em 0;background:#000}"""


def read_pairs(path: Path) -> list[dict[str, str]]:
    """The rows of a list of pairs.

    Args:
        path: CSV in UTF-8 with a header: ``REQUIRED`` columns, and those of ``OPTIONAL`` that are wanted.

    Returns:
        A dictionary a row with all columns, "" where nothing is given. Files are relative to the folder of the list; a row
        without a name is called by its number.

    Raises:
        InputError: no such file, no CSV, missing or unknown columns, no row, or names that are there twice or no file names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a CSV in UTF-8; got: {error}; check the path and the encoding") from error
    reader = csv.DictReader(io.StringIO(text))
    columns = [column.strip() for column in reader.fieldnames or ()]
    known = (*REQUIRED, *OPTIONAL)
    if not set(REQUIRED) <= set(columns) or not set(columns) <= set(known):
        raise InputError(f"{path}: expected the columns {', '.join(REQUIRED)} and, if wanted, {', '.join(OPTIONAL)}; got "
                         f"{', '.join(columns) or 'none'}; correct the first line")
    reader.fieldnames = columns
    rows: list[dict[str, str]] = []
    for number, row in enumerate(reader, 1):
        if None in row:
            raise InputError(f"{path}: row {number}: expected {len(columns)} values; got more; put values with a comma in quotes")
        values = {column: (row.get(column) or "").strip() for column in known}
        if not all(values[column] for column in REQUIRED):
            raise InputError(f"{path}: row {number}: expected a fixed and a moving image; got {row}; fill in both")
        values["name"] = values["name"] or f"{number:03d}"
        rows.append(values)
    names = [row["name"] for row in rows]
    times = Counter(name.lower() for name in names)  # some file systems take them for the same
    bad = [name for name in names if not re.fullmatch(r"[\w][\w. -]*", name) or times[name.lower()] > 1
           or re.fullmatch(r"results(-\d+-of-\d+)?\.(csv|html)", name.lower())]
    if not rows or bad:
        raise InputError(f"{path}: expected at least one pair, and names that are different and can be folders (letters, digits, "
                         f"- _ . and spaces); got {', '.join(map(repr, bad)) or 'no pair'}; correct the list")
    return rows


def shard_of(text: str) -> tuple[int, int]:
    """"3/100" -> (3, 100): the third of a hundred parts of a list.

    Raises:
        ConfigError: it does not say that.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= parts:
        raise ConfigError(f"shard: expected I/N with I from 1 to N, such as 3/100; got {text!r}")
    return number, parts


def shard_range(number: int, parts: int, pairs: int) -> range:
    """The pairs of a part: neighbours, for these mostly share a volume; sizes differ by one at most."""
    return range((number - 1) * pairs // parts, number * pairs // parts)


def table_names(shard: tuple[int, int] | None) -> tuple[str, str]:
    """Names of the table and of the page of a whole list, or of a part of it."""
    if shard is None:
        return TABLES
    number, parts = shard
    stem = f"results-{number:0{len(str(parts))}}-of-{parts}"
    return f"{stem}.csv", f"{stem}.html"


def write_tables(folder: Path, rows: Sequence[Mapping[str, Any]], names: tuple[str, str] = TABLES) -> None:
    """Write ``results.csv`` and ``results.html`` with a row a pair; the page leaves out columns that are empty.

    Args:
        folder: with the folders of the pairs, to which the page links.
        rows: of :func:`table_row`, in the order of the table.
        names: of the table and the page.

    Raises:
        OutputError: if one cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / names[0], text.getvalue())
    shown = [column for column in COLUMNS if any(row[column] not in (None, "") for row in rows)]
    head = "".join(f"<th>{escape(column.replace('_', ' '))}</th>" for column in shown)
    lines = [f'<tr class="{row["status"]}">' + "".join(f"<td>{_cell(folder, row, column)}</td>" for column in shown) + "</tr>"
             for row in rows]
    failed = sum(row["status"] == "failed" for row in rows)
    write_text(folder / names[1], "\n".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Registration results</title>'
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>Registration results</h1><p>{len(rows)} pairs, {failed} failed.{_means(rows)}</p>",
        f"<table><thead><tr>{head}</tr></thead><tbody>", *lines, "</tbody></table></body></html>", ""]))


def table_row(record: Mapping[str, Any], fixed: Path, moving: Path) -> dict[str, Any]:
    """The row of a pair.

    Args:
        record: of :class:`dinoreg.run.PairRun`.
        fixed, moving: the images, as they are called in the list.
    """
    error = record.get("error")
    seconds = sum(stage["seconds"] for stage in record.get("stages", {}).values())
    measured = record.get("field", {})
    scores = record.get("scores", {})
    known = {column: scores.get(kind, {}).get(state) for column, (kind, state) in _SCORES.items()}
    return {"name": record["name"], "status": "failed" if error else "complete", **known,
            **{name: measured.get(name) for name in _FIELD}, "seconds": "" if error else round(seconds, 1),
            "warnings": len(record.get("warnings", ())), "fixed": str(fixed), "moving": str(moving),
            "message": error["message"] if error else " | ".join(record["warnings"])}


def _means(rows: Sequence[Mapping[str, Any]]) -> str:
    """The means over the pairs of which something is known, in words."""
    words = []
    for name, before, after, unit in (("Dice", "dice_before", "dice_after", ""), ("TRE", "tre_before_mm", "tre_after_mm", " mm")):
        values = [(row[before], row[after]) for row in rows if row[before] is not None]
        if values:
            first, second = (sum(column) / len(values) for column in zip(*values, strict=True))
            words.append(f" Mean {name} of {len(values)}: {first:.3f}{unit} before, {second:.3f}{unit} after.")
    return "".join(words)


def _cell(folder: Path, row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    text = "" if value is None else escape(f"{value:.4g}" if isinstance(value, float) else str(value))
    page, picture = (f"{row['name']}/{name}" for name in ("report.html", "qc.png"))
    if column != "name" or not (folder / page).exists():
        return text
    seen = f'<img src="{escape(picture)}" alt="" loading="lazy">' if (folder / picture).exists() else ""
    return f'<a href="{escape(page)}">{text}{seen}</a>'
