"""One pair from its files to its results and its record, under whichever contract; a failure becomes part of the record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinoreg import completion
from dinoreg.config import Config
from dinoreg.errors import DinoRegError, InputError, OutputError
from dinoreg.io import check_writable, write_json
from dinoreg.jobs import Case, Images, load_case
from dinoreg.report import failure_record, field_metrics, file_record, one_line, run_record, summary_line
from dinoreg.result import Registration
from dinoreg.stages import stage
from dinoreg.truth import in_words, read_truth, worse
from dinoreg.volume import Volume

log = logging.getLogger(__name__)

Register = Callable[[Case, Images], Registration]
Record = dict[str, Any]
Write = Callable[[Case, Images, Registration, Volume | None], list[Path]]  # the last but one: the warped image, if asked for


def run_case(case: Case, config: Config, register: Register, write: Write, *, output: Path, root: Path | None,
             run: Mapping[str, Any], shared: Mapping[str, Any]) -> Record:
    """Read, register and write one case, its own report last.

    Args:
        case: what is asked for.
        config: what it is registered with.
        register: the engine.
        write: writes field and images and returns their files.
        output: folder to which the names of the case and of the outputs in the record are relative.
        root: folder to which the names of the inputs in the record are relative; None: as they were given.
        run: what the report of the case says of the whole run.
        shared: what its results follow from besides its inputs; see :func:`dinoreg.completion.recipe`.

    Returns:
        The record for the report; with "error" where the case failed.
    """
    started = time.monotonic()
    record: Record = {"name": case.name, "modalities": list(case.modalities)}

    def attempt(work: Callable[[], Record]) -> Record:
        try:
            return work()
        except DinoRegError as error:
            log.error("%s: %s", case.name, one_line(str(error)))
            return {"error": failure_record(error)}
        except Exception as error:
            log.exception("%s: unexpected error", case.name)
            return {"error": failure_record(error)}

    def report() -> Record:
        write_json(output / case.record, run_record(run, [record], time.monotonic() - started))
        return {}

    record |= attempt(lambda: _run(case, config, register, write, output, root, shared))
    # a pair that is listed twice has a problem, and the first one's record is not its own
    return record if case.problem else attempt(report) | record


def _run(case: Case, config: Config, register: Register, write: Write, output: Path, root: Path | None,
         shared: Mapping[str, Any]) -> Record:
    stages: dict[str, dict[str, float]] = {}
    check_writable((output / case.record).parent)  # now, and not after minutes of work
    with stage("read", stages):
        before = _stamps(case)
        images = load_case(case, config.modalities)
        truth = read_truth(case.known, case.space, images.fixed, images.moving)
        inputs = {role: file_record(path, root) for role, path in completion.inputs(case).items()}
        if _stamps(case) != before:
            raise InputError(f"{case.fixed}, {case.moving} or what belongs to them was changed while it was read; expected "
                             "inputs that stay as they are: start again when they are complete")
    for warning in images.warnings:
        log.warning("%s: %s", case.name, warning)
    registration = register(case, images)
    stages |= registration.stages
    with stage("write", stages):
        warped = registration.warp(images.moving) if case.warped else None
        files = write(case, images, registration, warped)
    with stage("metrics", stages):
        field, scores = field_metrics(registration.disp, images.fixed.spacing), truth.scores(registration)
    for warning in (found := [*registration.warnings, *worse(scores)]):
        log.warning("%s: %s", case.name, warning)
    registration = replace(registration, warnings=[*images.warnings, *found])
    undrawn: list[str] = []
    if warped is not None:
        title = f"{case.name}, preset {config.preset}, features {config.features}"
        told = in_words(scores)
        agreement = "; ".join(f"{name} {before} \N{RIGHTWARDS ARROW} {after}" for name, (before, after) in told.items())
        summary = "\n".join(filter(None, [agreement, summary_line(field, len(registration.warnings))]))

        def draw_picture(path: Path) -> None:
            from dinoreg.qc import write_qc  # here, for matplotlib takes its time to load

            write_qc(path, images.fixed, images.moving, warped, registration, title=title, summary=summary)

        def draw_page(path: Path) -> None:
            from dinoreg.htmlreport import write_html_report

            write_html_report(path, images.fixed, images.moving, warped, registration, title=title,
                              names=(case.fixed.name, case.moving.name), scores=told, config=config.to_dict())

        for kind, name, draw in (("picture", case.picture, draw_picture), ("page", case.page, draw_page)):
            if name is None:
                continue
            try:
                with stage(kind, stages):
                    draw(output / name)
                files.append(output / name)
            except OutputError:  # the disk is full, or more will fail: the pair is to be done again
                raise
            except Exception as error:  # the field is there and good: a picture less is no failure
                undrawn.append(f"{name} could not be drawn ({one_line(str(error))})")
                log.warning("%s: %s", case.name, undrawn[-1])
    return {"inputs": inputs, "outputs": [file_record(path, output) for path in files], "stages": stages, "field": field,
            "scores": scores, "info": registration.info, "warnings": [*registration.warnings, *undrawn],
            "made_from": completion.made_from(case, inputs, shared)}


def _stamps(case: Case) -> list[tuple[str, int, int, int]]:
    """Name, inode, size and time of every file of a case."""
    files = [file for path in completion.inputs(case).values()
             for file in (sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else [])]
    return [(str(file), found.st_ino, found.st_size, found.st_mtime_ns) for file in files for found in [file.stat()]]
