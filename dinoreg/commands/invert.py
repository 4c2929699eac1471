"""``dinoreg invert``: the transform from the moving image to the fixed one."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

log = logging.getLogger(__name__)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("invert", help="the transform from the moving image to the fixed one",
                                 description="Invert a transform, as a displacement field in mm on the moving grid.")
    parser.add_argument("transform", type=Path, metavar="TRANSFORM", help="fixed -> moving: field, .h5, .tfm, 4x4 .txt")
    parser.add_argument("--fixed", type=Path, required=True, metavar="IMAGE", help="fixed image")
    parser.add_argument("--moving", type=Path, required=True, metavar="IMAGE", help="moving image, whose grid the result has")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".nii.gz, .mha or .nrrd")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read, invert, write, and say how far the way there and back ends from its start."""
    from dinoreg.io import check_apart, read_volume
    from dinoreg.transforms import invert, read_transform, write_field_mm

    check_apart(arguments.output, arguments.transform, arguments.fixed, arguments.moving)
    fixed, moving = read_volume(arguments.fixed), read_volume(arguments.moving)
    disp = read_transform(arguments.transform).field_on(fixed)
    inverse, residual = invert(disp, fixed.affine, moving)
    write_field_mm(arguments.output, inverse, moving.affine)
    sys.stdout.write(f"there and back: mean {residual.mean():.4f} mm, largest {residual.max():.4f} mm\n")
    if (share := float((residual > min(fixed.spacing)).mean())) > 0:
        log.warning("warning: %.3g %% of the voxels end more than a voxel away: the transform folds there or nearly does; "
                    "look at 'dinoreg jacobian'", 100 * share)
