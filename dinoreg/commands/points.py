"""``dinoreg points``: points of one image to the other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dinoreg.errors import ConfigError, InputError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("points", help="carry points from the fixed image to the moving one, or back",
                                 description="Carry points from the fixed image to the moving one, or back.")
    parser.add_argument("points", type=Path, metavar="POINTS", help=".csv (x, y, z), Slicer .fcsv or .mrk.json")
    parser.add_argument("--transform", type=Path, required=True, metavar="FILE", help="field, .h5, .tfm, .txt, fixed -> moving")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="same format as POINTS")
    parser.add_argument("--direction", choices=("fixed-to-moving", "moving-to-fixed"), default="fixed-to-moving",
                        help="which image POINTS belong to: they are carried to the other one (default: fixed-to-moving)")
    parser.add_argument("--space", choices=("voxel", "ras", "lps"), default="ras", help="of a .csv (default: ras, in mm)")
    parser.add_argument("--fixed", type=Path, metavar="IMAGE", help="fixed image; needed for --space voxel")
    parser.add_argument("--moving", type=Path, metavar="IMAGE", help="moving image; needed for --space voxel")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="the same points in the other image: prints the TRE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read, carry, write, compare."""
    import numpy as np

    from dinoreg.io import check_apart, read_volume
    from dinoreg.points import read_points, write_points
    from dinoreg.transforms import read_transform
    from dinoreg.volume import Volume

    check_apart(arguments.output, arguments.points, arguments.transform, arguments.fixed, arguments.moving, arguments.compare)
    file = read_points(arguments.points, arguments.space)
    grids: list[Volume | None] = [None, None]
    if file.space == "voxel":
        if not (arguments.fixed and arguments.moving):
            raise ConfigError("--space voxel: expected --fixed and --moving, whose headers say where voxels lie; got "
                              f"{'one' if arguments.fixed or arguments.moving else 'none'} of them")
        grids = [read_volume(arguments.fixed), read_volume(arguments.moving)]
    transform, start = read_transform(arguments.transform), file
    if arguments.direction == "moving-to-fixed":
        grids.reverse()
        ras = transform.points_back(file.ras(grids[0]))
        lost = int(np.isnan(ras).any(1).sum())
        if lost:
            raise InputError(f"{arguments.points}: expected points that the transform reaches; got {lost} of {len(ras)} to which "
                             "no fixed point leads; leave them out")
    else:
        ras = transform.points(file.ras(grids[0]))
    write_points(arguments.output, file.moved(ras, grids[1]))
    if arguments.compare:
        truth = read_points(arguments.compare, arguments.space).ras(grids[1])
        if truth.shape != ras.shape:
            raise InputError(f"{arguments.compare}: expected {len(ras)} points, as in {arguments.points}; got {len(truth)}")
        before, after = (np.linalg.norm(points - truth, axis=1) for points in (start.ras(grids[0]), ras))
        sys.stdout.write(f"{len(ras)} points, mean distance {before.mean():.2f} mm before, {after.mean():.2f} mm after "
                         f"(largest {before.max():.2f}, {after.max():.2f})\n")
