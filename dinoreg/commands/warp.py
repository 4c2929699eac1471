"""``dinoreg warp``: an image or a label map of the moving side on the fixed grid."""

from __future__ import annotations

import argparse
from pathlib import Path

INTERPOLATIONS = ("linear", "nearest", "labels")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("warp", help="bring an image or labels of the moving side to the fixed grid",
                                 description="Bring an image or labels of the moving side to the fixed grid.")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="of the moving side, on any grid")
    parser.add_argument("--transform", type=Path, required=True, metavar="FILE", help="field, .h5, .tfm, .txt, fixed -> moving")
    parser.add_argument("--reference", type=Path, required=True, metavar="FIXED", help="image whose grid the result has")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".nii.gz, .nii or .mha")
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, default="linear",
                        help="linear (default); nearest: labels as they are; labels: the label with the largest share, smoother")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read, warp, write; the type of the values is kept."""
    from dinoreg.io import check_apart, read_volume, write_volume
    from dinoreg.result import Registration
    from dinoreg.transforms import read_transform

    check_apart(arguments.output, arguments.image, arguments.transform, arguments.reference)
    reference = read_volume(arguments.reference)
    result = Registration(read_transform(arguments.transform).field_on(reference), reference.affine)
    image = read_volume(arguments.image)
    if arguments.interpolation == "labels":
        write_volume(arguments.output, result.warp_labels(image))
    else:
        write_volume(arguments.output, result.warp(image, order=int(arguments.interpolation == "linear")))
