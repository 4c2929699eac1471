"""One pair from its files to its results and its record, under whichever contract; a failure becomes part of the record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinoreg.config import Config
from dinoreg.errors import DinoRegError
from dinoreg.jobs import Case, Images, load_case
from dinoreg.report import failure_record, field_metrics, file_record, one_line, summary_line
from dinoreg.result import Registration
from dinoreg.stages import stage
from dinoreg.volume import Volume

log = logging.getLogger(__name__)

Register = Callable[[Case, Images], Registration]
Write = Callable[[Case, Images, Registration, Volume | None], list[Path]]  # the last but one: the warped image, if asked for


def run_case(case: Case, config: Config, register: Register, write: Write, *, output: Path, root: Path | None) -> dict[str, Any]:
    """Read, register and write one case.

    Args:
        case: what is asked for.
        config: what it is registered with.
        register: the engine.
        write: writes field and images and returns their files.
        output: folder to which the names of the case and of the outputs in the record are relative.
        root: folder to which the names of the inputs in the record are relative; None: as they were given.

    Returns:
        The record for the report; with "error" where the case failed.
    """
    record: dict[str, Any] = {"name": case.name, "modalities": list(case.modalities)}
    try:
        return record | _run(case, config, register, write, output, root)
    except DinoRegError as error:
        log.error("%s: %s", case.name, one_line(str(error)))
        return record | {"error": failure_record(error)}
    except Exception as error:
        log.exception("%s: unexpected error", case.name)
        return record | {"error": failure_record(error)}


def _run(case: Case, config: Config, register: Register, write: Write, output: Path, root: Path | None) -> dict[str, Any]:
    stages: dict[str, dict[str, float]] = {}
    with stage("read", stages):
        images = load_case(case)
        inputs = {role: file_record(path, root) for role in ("fixed", "moving", "fixed_mask", "moving_mask")
                  if (path := getattr(case, role))}
    for warning in images.warnings:
        log.warning("%s: %s", case.name, warning)
    registration = register(case, images)
    stages |= registration.stages
    warnings = [*images.warnings, *registration.warnings]
    with stage("write", stages):
        warped = registration.warp(images.moving) if case.warped else None
        files = write(case, images, registration, warped)
    with stage("metrics", stages):
        field = field_metrics(registration.disp, images.fixed.spacing)
    if warped is not None:
        title = f"{case.name}, preset {config.preset}, features {config.features}"
        for kind, name, draw in (("picture", case.picture, _picture), ("page", case.page, _page)):
            if name is None:
                continue
            try:
                with stage(kind, stages):
                    draw(output / name, case, images, warped, registration, title, summary_line(field, len(warnings)), config)
                files.append(output / name)
            except Exception as error:  # the field is there and good: a picture less is no failure
                warnings.append(f"{name} could not be drawn ({one_line(str(error))})")
                log.warning("%s: %s", case.name, warnings[-1])
    outputs = [file_record(path, output) for path in files]
    return {"inputs": inputs, "outputs": outputs, "stages": stages, "field": field, "info": registration.info,
            "warnings": warnings}


def _picture(path: Path, case: Case, images: Images, warped: Volume, registration: Registration, title: str, summary: str,
             config: Config) -> None:
    from dinoreg.qc import write_qc  # here, for matplotlib takes its time to load

    write_qc(path, images.fixed, images.moving, warped, registration.disp, title=title, summary=summary)


def _page(path: Path, case: Case, images: Images, warped: Volume, registration: Registration, title: str, summary: str,
          config: Config) -> None:
    from dinoreg.htmlreport import write_html_report

    write_html_report(path, images.fixed, images.moving, warped, registration, title=title,
                      names=(case.fixed.name, case.moving.name), warnings=images.warnings, config=config.to_dict())
