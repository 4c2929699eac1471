"""``dinoreg register``: two images, or a list of pairs, to transforms, warped images, pictures and reports."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoreg.errors import ConfigError, DinoRegError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dinoreg.jobs import Case
    from dinoreg.work import Order

    Cases = list[tuple[Case, Path]]  # each with the folder of its results
    Record = dict[str, Any]

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
    parser.add_argument("--initial-transform", default="auto", metavar="auto|none|FILE", help="where to start: auto (default: "
                        "the headers, unless the images say clearly that these are far off), none (the headers), or an affine "
                        "ITK transform (.tfm, .txt, .mat, .h5) or 4x4 numbers (.txt, RAS mm), from fixed to moving points")
    parser.add_argument("--preset", default="auto", help="auto (default: by the modalities), or a name that `dinoreg info` lists")
    parser.add_argument("--modalities", default=",", metavar="FIXED,MOVING", help="CT, CBCT, MR or nothing (unknown) each: CT,MR")
    parser.add_argument("--features", help="dinov2+mind, dinov2 or mind, in place of the preset's; mind needs no weights")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with the encoder's weights")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; all by default")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="for a pair; when they are over, its best "
                        "field so far is the result, with a warning")
    parser.add_argument("--max-memory", metavar="SIZE", help="memory that may be held, such as 8G; a container's limit counts "
                        "by itself")
    parser.add_argument("--confidence", action="store_true", help="also write confidence.nii.gz: 0 where the match is ambiguous, "
                        "towards 1 where one place is clearly best")
    parser.add_argument("--resume", action="store_true", help="leave pairs alone that an earlier run finished, from the same "
                        "images, with the same options")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep what DINOv2 sees of each image there: an image of many "
                        "pairs is encoded once")
    parser.add_argument("--cache-size", type=float, default=50.0, metavar="GIB", help="how large it may grow (default: 50)")
    parser.add_argument("--basis", type=Path, metavar="FILE", help="principal components for all pairs, of `dinoreg basis`, in "
                        "place of each pair's own; the cache is 30 times smaller then")
    parser.add_argument("--shard", metavar="I/N", help="with --pairs: only the I-th of N parts of the list, for arrays of jobs")
    parser.add_argument("--jobs", type=int, metavar="N", help="with --pairs: in N processes, as far as memory allows")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="with --pairs: on the Dask cluster of this scheduler, "
                        "such as tcp://host:8786")
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
        with nullcontext() if arguments.quiet or arguments.pairs else shown():
            _run(arguments)
    finally:
        logger.setLevel(level)


def _run(arguments: argparse.Namespace) -> None:
    from dinoreg.api import chosen_config, kind_of_start
    from dinoreg.cohort import PATHS, read_pairs, shard_of, shard_range, table_names
    from dinoreg.io import check_writable, remove
    from dinoreg.memory import parse_bytes
    from dinoreg.work import Order

    given = any(getattr(arguments, role) for role in PATHS)
    if given if arguments.pairs else arguments.moving is None:
        raise ConfigError("expected either FIXED and MOVING, with what belongs to them, or --pairs CSV; see --help")
    if alone := [name for name in ("shard", "jobs", "scheduler") if getattr(arguments, name) and not arguments.pairs]:
        raise ConfigError(f"--{alone[0]}: expected a list of pairs; give one with --pairs, or leave the option out")
    if arguments.jobs is not None and (arguments.jobs < 1 or arguments.scheduler):
        raise ConfigError("--jobs: expected a number from 1, and no --scheduler: its cluster has the processes")
    kinds = arguments.modalities.split(",")
    config = chosen_config(arguments.preset, arguments.features, kinds)
    if arguments.confidence and config.solver == "published":
        raise ConfigError("--confidence: the preset published gives none; take another preset, or leave the option out")
    shard = shard_of(arguments.shard) if arguments.shard else None
    if arguments.pairs:
        rows = [row | {role: str(arguments.pairs.parent / row[role]) for role in PATHS if row[role]}
                for row in read_pairs(arguments.pairs)]
        rows = [rows[index] for index in shard_range(*shard, len(rows))] if shard else rows
    else:
        rows = [{role: str(getattr(arguments, role) or "") for role in PATHS}
                | {"name": f"{arguments.moving.name} onto {arguments.fixed.name}"}]
    initial = _initial(arguments.initial_transform)
    cases = [(_case(row, (kinds[0], kinds[1]), arguments.space, kind_of_start(initial)),
              arguments.output / row["name"] if arguments.pairs else arguments.output) for row in rows]
    check_writable(arguments.output)
    tables = table_names(shard)
    if arguments.pairs:
        paths = [arguments.output / name for name in tables]
        if arguments.pairs.resolve() in [path.resolve() for path in paths]:
            raise ConfigError(f"{arguments.pairs}: is where the table of results goes; choose another output folder")
        remove(paths)
    start = initial if initial is None or isinstance(initial, str) else tuple(map(tuple, initial.tolist()))
    order = Order(config, weights=arguments.weights, device=arguments.device, threads=arguments.threads,
                  time_limit=arguments.time_limit,
                  max_memory=parse_bytes(arguments.max_memory) if arguments.max_memory else None, initial=start,
                  confidence=arguments.confidence, cache=arguments.cache,
                  cache_bytes=int(arguments.cache_size * 2**30), basis=arguments.basis)
    spare = [path for path in (arguments.pairs, arguments.basis) if path]
    if kind_of_start(initial) == "given":
        spare.append(Path(arguments.initial_transform))
    if arguments.scheduler or arguments.jobs:
        records = _on_cluster(arguments, order, cases, spare)
    else:
        records = _here(arguments, order, cases, spare)
    _finish(arguments, cases, records, tables)


def _here(arguments: argparse.Namespace, order: Order, cases: Cases, spare: list[Path]) -> dict[int, Record]:
    """All pairs in this process."""
    from dinoreg.completion import take_stock
    from dinoreg.work import Worker

    worker = Worker(order)
    settled = take_stock(cases, worker.shared, resume=arguments.resume, spare=spare)
    rest = [index for index in range(len(cases)) if index not in settled]
    with _told(arguments, len(rest)) as tell:
        alone = not arguments.pairs  # then its stages are shown
        records = (worker.pair(*case).read().solve().write() for case in cases) if alone and rest else \
            worker.pairs(cases[index] for index in rest)
        for index, record in zip(rest, records, strict=True):
            settled[index] = record
            tell(record["name"], "error" in record)
    return settled


def _on_cluster(arguments: argparse.Namespace, order: Order, cases: Cases, spare: list[Path]) -> dict[int, Record]:
    """All pairs on other processes."""
    from dinoreg import cluster
    from dinoreg.completion import take_stock

    paths = {name: path and path.absolute() for name in ("weights", "cache", "basis") for path in [getattr(order, name)]}
    order = replace(order, **paths)
    cases = [(cluster.absolute(case), folder.absolute()) for case, folder in cases]
    if arguments.scheduler:
        workers = cluster.connected(arguments.scheduler, order)
    else:
        jobs = min(cluster.fitting(arguments.jobs, cases, order.config), len(cases))
        threads = order.threads or max(1, (os.cpu_count() or 1) // jobs)
        workers = cluster.local(jobs, replace(order, threads=threads))
    with workers as running:
        shared = running.shared()
        running.wait_for_others(arguments.output.absolute())
        settled = take_stock(cases, shared, resume=arguments.resume, spare=spare)
        rest = {index: case for index, case in enumerate(cases) if index not in settled}
        with _told(arguments, len(rest)) as tell:
            for index, record in running.run(rest, shared):
                settled[index] = record
                tell(record["name"], "error" in record)
    return settled


def _told(arguments: argparse.Namespace, pairs: int) -> AbstractContextManager[Callable[[str, bool], None]]:
    """To be told of each pair that is done."""
    from dinoreg.progress import counted

    return nullcontext(lambda name, failed: None) if arguments.quiet or not arguments.pairs else counted(pairs)


def _finish(arguments: argparse.Namespace, cases: Cases, records: Mapping[int, Record], tables: tuple[str, str]) -> None:
    """Write the tables, and fail with the first failure."""
    from dinoreg.cohort import table_row, write_tables

    if arguments.pairs:
        write_tables(arguments.output, [table_row(records[index], case.fixed, case.moving)
                                        for index, (case, _) in enumerate(cases)], tables)
        log.info("table: %s", arguments.output / tables[1])
    if failed := [records[index] for index in range(len(cases)) if "error" in records[index]]:
        error = failed[0]["error"]
        kind = next((kind for kind in DinoRegError.__subclasses__() if kind.exit_code == error["exit_code"]), DinoRegError)
        of = f"{len(failed)} of {len(records)} pairs failed; {failed[0]['name']}: " if arguments.pairs else ""
        raise kind(f"{of}{error['message']}")
    if not arguments.quiet:
        sys.stdout.write(f"{arguments.output}\n")


def _initial(name: str) -> npt.NDArray[np.float64] | str | None:
    """Where to start: 4x4 in RAS mm, "auto", or None for the headers."""
    if name in ("auto", "none"):
        return None if name == "none" else name
    from dinoreg.errors import InputError
    from dinoreg.transforms import read_transform

    transform = read_transform(Path(name))
    try:
        return transform.matrix()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _case(row: Mapping[str, str], modalities: tuple[str, str], space: str, initial: str) -> Case:
    from dinoreg.jobs import Case
    from dinoreg.result import CONFIDENCE, FILES
    from dinoreg.truth import ROLES

    masks = [Path(row[role]) if row[role] else None for role in ("fixed_mask", "moving_mask")]
    return Case(row["name"], Path(row["fixed"]), Path(row["moving"]), masks[0], masks[1], modalities=modalities, fields=(),
                warped="warped.nii.gz", picture="qc.png", same_grid=False, page="report.html", initial=initial,
                known={role: Path(row[role]) for role in ROLES if row[role]}, space=space,
                results=("report.html", "qc.png", CONFIDENCE, *FILES))
