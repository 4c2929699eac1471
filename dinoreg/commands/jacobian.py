"""``dinoreg jacobian``: change of volume under a transform."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("jacobian", help="map the change of volume; count folds",
                                 description="Map the Jacobian determinant of a transform on the fixed grid, and count folds.")
    parser.add_argument("transform", type=Path, metavar="TRANSFORM", help="fixed -> moving: field, .h5, .tfm, 4x4 .txt")
    parser.add_argument("--reference", type=Path, required=True, metavar="FIXED", help="image whose grid the map has")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".nii.gz, .nii or .mha")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read, write the map (float32; 1 no change, <= 0 a fold), print the figures."""
    import numpy as np

    from dinoreg.io import check_apart, read_volume, write_volume
    from dinoreg.metrics import jacobian_determinant
    from dinoreg.report import field_metrics, summary_line
    from dinoreg.transforms import read_transform
    from dinoreg.volume import Volume

    check_apart(arguments.output, arguments.transform, arguments.reference)
    reference = read_volume(arguments.reference)
    disp = read_transform(arguments.transform).field_on(reference)
    write_volume(arguments.output, Volume(jacobian_determinant(disp).astype(np.float32), reference.affine))
    sys.stdout.write(summary_line(field_metrics(disp, reference.spacing), 0).split(";")[0] + "\n")
