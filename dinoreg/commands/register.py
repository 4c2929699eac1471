"""``dinoreg register``: two images, or a list of pairs, to transforms, warped images, pictures and reports."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoreg.errors import ConfigError, DinoRegError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dinoreg.jobs import Case, Images
    from dinoreg.registration import Registrar
    from dinoreg.result import Registration
    from dinoreg.volume import Volume

log = logging.getLogger(__name__)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "register", help="register two images, or a list of pairs",
        description="Register MOVING to FIXED: .nii, .nii.gz, .mha, .mhd, .nrrd, or a folder with one DICOM series; any grids.")
    parser.add_argument("fixed", nargs="?", type=Path, metavar="FIXED", help="the image on whose grid the result lies")
    parser.add_argument("moving", nargs="?", type=Path, metavar="MOVING", help="the image that is brought onto it")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="folder for the results; made if missing")
    parser.add_argument("--pairs", type=Path, metavar="CSV", help="in place of FIXED and MOVING: a list with the columns fixed, "
                        "moving and, if wanted, name, fixed_mask, moving_mask, fixed_labels, moving_labels, fixed_points, "
                        "moving_points; a folder a pair, and one table of all")
    parser.add_argument("--fixed-mask", type=Path, metavar="FILE", help="where the fixed image counts, on its grid; 0 is outside")
    parser.add_argument("--moving-mask", type=Path, metavar="FILE", help="where the moving image counts, on its grid")
    for side in ("fixed", "moving"):
        for kind, what in (("labels", "label map"), ("points", "points (.csv, .fcsv, .mrk.json)")):
            parser.add_argument(f"--{side}-{kind}", type=Path, metavar="FILE", help=f"{what} of the {side} image: the "
                                "registration does not look at it, the report says how well both sides agree")
    parser.add_argument("--space", choices=("voxel", "ras", "lps"), default="ras", help="of points in .csv (default: ras, in mm)")
    parser.add_argument("--initial-transform", metavar="FILE", help="where to start: an affine ITK transform (.tfm, .txt, .mat, "
                        ".h5) or 4x4 numbers (.txt, RAS mm), from fixed to moving points")
    parser.add_argument("--preset", default="auto", help="auto (default: by the modalities), or a name that `dinoreg info` lists")
    parser.add_argument("--modalities", default=",", metavar="FIXED,MOVING", help="CT, CBCT, MR or nothing (unknown) each: CT,MR")
    parser.add_argument("--features", help="dinov2+mind, dinov2 or mind, in place of the preset's; mind needs no weights")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with the encoder's weights")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; all by default")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="for a pair; when they are over, its best "
                        "field so far is the result, with a warning")
    parser.add_argument("--confidence", action="store_true", help="also write confidence.nii.gz: 0 where the match is ambiguous, "
                        "towards 1 where one place is clearly best")
    parser.add_argument("--resume", action="store_true", help="leave pairs alone that an earlier run finished, from the same "
                        "images, with the same options")
    parser.add_argument("--quiet", action="store_true", help="say nothing but warnings and errors")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Register and write; fail with the first pair's failure after all are done."""
    from dinoreg.progress import shown

    logger = logging.getLogger("dinoreg")
    level = logger.level
    if arguments.quiet:
        logger.setLevel(logging.WARNING)
    try:
        with nullcontext() if arguments.quiet else shown():
            _run(arguments)
    finally:
        logger.setLevel(level)


def _run(arguments: argparse.Namespace) -> None:
    from dinoreg.api import chosen_config
    from dinoreg.cohort import PATHS, TABLES, read_pairs, write_tables
    from dinoreg.completion import recipe, take_stock
    from dinoreg.io import check_writable, remove
    from dinoreg.registration import Registrar

    given = any(getattr(arguments, role) for role in PATHS)
    if given if arguments.pairs else arguments.moving is None:
        raise ConfigError("expected either FIXED and MOVING, with what belongs to them, or --pairs CSV; see --help")
    kinds = arguments.modalities.split(",")
    config = chosen_config(arguments.preset, arguments.features, kinds)
    if arguments.confidence and config.solver == "published":
        raise ConfigError("--confidence: the preset published gives none; take another preset, or leave the option out")
    if arguments.pairs:
        rows = [row | {role: str(arguments.pairs.parent / row[role]) for role in PATHS if row[role]}
                for row in read_pairs(arguments.pairs)]
    else:
        rows = [{role: str(getattr(arguments, role) or "") for role in PATHS}
                | {"name": f"{arguments.moving.name} onto {arguments.fixed.name}"}]
    initial = _initial(arguments.initial_transform)
    cases = [(_case(row, (kinds[0], kinds[1]), arguments.space, moved=initial is not None),
              arguments.output / row["name"] if arguments.pairs else arguments.output) for row in rows]
    check_writable(arguments.output)
    if arguments.pairs:
        tables = [arguments.output / name for name in TABLES]
        if arguments.pairs.resolve() in [path.resolve() for path in tables]:
            raise ConfigError(f"{arguments.pairs}: is where the table of results goes; choose another output folder")
        remove(tables)
    registrar = Registrar(config, weights=arguments.weights, device=arguments.device, threads=arguments.threads,
                          time_limit=arguments.time_limit)
    options = {"confidence": arguments.confidence, "time_limit": arguments.time_limit,
               "initial": None if initial is None else initial.tolist()}
    shared = recipe(config, registrar.engine, options)
    settled = take_stock(cases, shared, resume=arguments.resume,
                         spare=[Path(name) for name in (arguments.initial_transform, arguments.pairs) if name])
    records = []
    for index, (case, folder) in enumerate(cases):
        if index not in settled:
            log.info("pair %d of %d: %s", index + 1, len(cases), case.name)
            settled[index] = _register(registrar, case, initial, folder, arguments.confidence, shared)
        records.append(settled[index] | {"fixed": str(case.fixed), "moving": str(case.moving)})
    if arguments.pairs:
        write_tables(arguments.output, records)
        log.info("table: %s", arguments.output / TABLES[1])
    if failed := [record for record in records if "error" in record]:
        error = failed[0]["error"]
        kind = next((kind for kind in DinoRegError.__subclasses__() if kind.exit_code == error["exit_code"]), DinoRegError)
        of = f"{len(failed)} of {len(records)} pairs failed; {failed[0]['name']}: " if arguments.pairs else ""
        raise kind(f"{of}{error['message']}")
    if not arguments.quiet:
        sys.stdout.write(f"{arguments.output}\n")


def _initial(name: str | None) -> npt.NDArray[np.float64] | None:
    """Where to start, 4x4, RAS mm."""
    if name is None:
        return None
    from dinoreg.errors import InputError
    from dinoreg.transforms import read_transform

    transform = read_transform(Path(name))
    try:
        return transform.matrix()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _case(row: Mapping[str, str], modalities: tuple[str, str], space: str, *, moved: bool) -> Case:
    from dinoreg.jobs import Case
    from dinoreg.result import CONFIDENCE, FILES
    from dinoreg.truth import ROLES

    masks = [Path(row[role]) if row[role] else None for role in ("fixed_mask", "moving_mask")]
    return Case(row["name"], Path(row["fixed"]), Path(row["moving"]), masks[0], masks[1], modalities=modalities, fields=(),
                warped="warped.nii.gz", picture="qc.png", same_grid=False, page="report.html", moved=moved,
                known={role: Path(row[role]) for role in ROLES if row[role]}, space=space,
                results=("report.html", "qc.png", CONFIDENCE, *FILES))


def _register(registrar: Registrar, case: Case, initial: npt.NDArray[np.float64] | None, folder: Path,
              confidence: bool, shared: Mapping[str, Any]) -> dict[str, Any]:
    """One pair into its folder, the report last; its record."""
    from dinoreg.run import run_case

    def register(case: Case, images: Images) -> Registration:
        return registrar.register(images.fixed, images.moving, fixed_mask=images.fixed_mask, moving_mask=images.moving_mask,
                                  modalities=case.modalities, initial=initial, colours=True)

    def write(case: Case, images: Images, registration: Registration, warped: Volume | None) -> list[Path]:
        return registration.save(folder, images.moving, warped=warped, confidence=confidence)

    run = {"contract": "register", "preset": registrar.config.preset, "config": registrar.config.to_dict(), "warnings": []}
    return run_case(case, registrar.config, register, write, output=folder, root=None, run=run, shared=shared)
