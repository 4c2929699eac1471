"""Lists of points: CSV, and the markups of 3D Slicer."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinoreg.errors import InputError
from dinoreg.io import write_text
from dinoreg.volume import Volume

Points = npt.NDArray[np.float64]
SPACES = ("voxel", "ras", "lps")
_FLIP = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True, eq=False)
class PointFile:
    """Points and all else that their file says, so that it can be written with other points.

    Attributes:
        points: (n, 3), in the file's own space.
        space: "voxel", "ras" or "lps".
        content: a .mrk.json as parsed; else the rows of a text file, each its cells.
        rows: of a text file, which rows hold the points.
        first: of a text file, the column of x.
    """

    points: Points
    space: str
    content: Any
    rows: tuple[int, ...] = ()
    first: int = 0

    def ras(self, grid: Volume | None) -> Points:
        """The points in RAS mm; ``grid`` says where voxels lie and is needed for "voxel" alone."""
        if self.space == "voxel":
            assert grid is not None  # the command asks for it
            return np.asarray(self.points @ grid.affine[:3, :3].T + grid.affine[:3, 3])
        return self.points * _FLIP if self.space == "lps" else self.points

    def moved(self, ras: Points, grid: Volume | None) -> PointFile:
        """The same file with other points, given in RAS mm and brought to the file's space."""
        if self.space == "voxel":
            assert grid is not None
            inverse = np.linalg.inv(grid.affine)
            return replace(self, points=ras @ inverse[:3, :3].T + inverse[:3, 3])
        return replace(self, points=ras * _FLIP if self.space == "lps" else ras)


def read_points(path: Path, space: str) -> PointFile:
    """Read points.

    Args:
        path: .csv (x, y, z first in each row, a header if there is one), Slicer's .fcsv or .mrk.json.
        space: of a .csv: "voxel", "ras" or "lps"; Slicer's files say it themselves.

    Raises:
        InputError: no such file, another format, or a row that holds no point.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected points; got: {error}; check the path") from error
    name = path.name.lower()
    if name.endswith(".mrk.json"):
        return _read_markups(path, text)
    if not name.endswith((".csv", ".fcsv")):
        raise InputError(f"{path}: expected .csv, .fcsv or .mrk.json; got another name; convert it")
    first = 0
    if name.endswith(".fcsv"):
        first = 1  # after the id
        says = [line.partition("=")[2].strip().upper() for line in text.splitlines() if line.startswith("# CoordinateSystem")]
        space = {"0": "ras", "RAS": "ras", "1": "lps", "LPS": "lps"}.get(says[0] if says else "", "")
        if not space:
            raise InputError(f"{path}: expected a line '# CoordinateSystem = LPS' (or RAS); got {says or 'none'}; save it again")
    cells = list(csv.reader(io.StringIO(text)))
    points, rows = [], []
    for number, row in enumerate(cells):
        if not row or row[0].startswith("#"):
            continue
        try:
            point = [float(value) for value in row[first : first + 3]]
        except ValueError:
            if number == 0:
                continue  # a header
            point = []
        if len(point) != 3 or not np.isfinite(point).all():
            raise InputError(f"{path}: line {number + 1}: expected x, y, z as numbers; got {','.join(row)!r}; correct the line")
        points.append(point)
        rows.append(number)
    if not points:
        raise InputError(f"{path}: expected at least one point; got none; check the file")
    return PointFile(np.array(points), space, cells, tuple(rows), first)


def _read_markups(path: Path, text: str) -> PointFile:
    try:
        content = json.loads(text)
        markups = content["markups"][0]
        space = {"LPS": "lps", "RAS": "ras", "0": "ras", "1": "lps"}[str(markups["coordinateSystem"])]
        points = np.array([point["position"] for point in markups["controlPoints"]], dtype=np.float64).reshape(-1, 3)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: expected a Slicer markup with coordinateSystem and controlPoints; got: {error!r}; save it "
                         "again") from error
    if not points.size or not np.isfinite(points).all():
        raise InputError(f"{path}: expected at least one point with finite coordinates; got {len(points)}; check the file")
    return PointFile(points, space, content)


def write_points(path: Path, file: PointFile) -> None:
    """Write points in the format in which they were read. Raises OutputError."""
    values = [[round(float(value), 6) for value in point] for point in file.points]
    if isinstance(file.content, dict):
        content = json.loads(json.dumps(file.content))
        for point, position in zip(content["markups"][0]["controlPoints"], values, strict=True):
            point["position"] = position
        write_text(path, json.dumps(content, indent=1) + "\n")
        return
    rows = [list(row) for row in file.content]
    for number, position in zip(file.rows, values, strict=True):
        rows[number][file.first : file.first + 3] = [str(value) for value in position]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
