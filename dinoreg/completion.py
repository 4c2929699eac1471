"""Which pairs are done: a pair's record binds its results to everything that they follow from.

The record is a report of that pair alone, written after its results. ``--resume`` takes a pair for done if its record says what
would be done now (the same content of the inputs, configuration, options, weights, device and program) and if each result is
there with the size and sha256 that the record has. Names and dates of files, and the number of threads, play no part.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoreg.config import Config
from dinoreg.errors import ConfigError, InputError
from dinoreg.io import read_json, remove
from dinoreg.jobs import Case
from dinoreg.report import environment, failure_record, file_record

ROLES = ("fixed", "moving", "fixed_mask", "moving_mask")

log = logging.getLogger(__name__)


def recipe(config: Config, engine: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What all pairs of a run are made with, as far as results depend on it.

    Args:
        config: of the registration.
        engine: device and weights, see ``Registrar.engine``.
        options: of the command, as far as they change what is written.

    Returns:
        A sha256 each of "configuration", "options" and "program" (versions of packages and sha256 of the code), and "engine".
    """
    here = environment()
    program = {name: here[name] for name in ("dinoreg", "code", "python", "packages")}
    return {"configuration": _sha256(config.to_dict()), "options": _sha256(options), "program": _sha256(program),
            "engine": dict(engine)}


def made_from(case: Case, inputs: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What the results of a case follow from: its inputs' hashes, what is asked for, and the :func:`recipe`."""
    asked = [case.modalities, case.fields, case.warped, case.picture, case.page, case.same_grid, case.space]
    return {"inputs": {role: record["sha256"] for role, record in inputs.items()}, "case": _sha256(asked), **shared}


def inputs(case: Case) -> dict[str, Path]:
    """The case's files by role."""
    return {role: path for role in ROLES if (path := getattr(case, role)) is not None} | dict(case.known)


def take_stock(cases: Sequence[tuple[Case, Path]], shared: Mapping[str, Any], *, resume: bool,
               spare: Sequence[Path] = ()) -> dict[int, dict[str, Any]]:
    """Find out which pairs are done, and remove what earlier runs left of all others, records first.

    Args:
        cases: all cases of a run, each with the folder to which its ``results`` and its ``record`` are relative.
        shared: see :func:`recipe`.
        resume: False: no pair counts as done.
        spare: files, besides the cases' inputs, that must not be removed.

    Returns:
        Index -> record, of the pairs on which there is nothing to do: "resumed" is set in those that are done; those whose inputs
        cannot be read have an "error", and what an earlier run made of them stays.

    Raises:
        ConfigError: an input would be removed, or replaced by a result.
        OutputError: the folder refuses.
    """
    _spare_inputs(cases, spare)
    settled: dict[int, dict[str, Any]] = {}
    known: dict[Path, dict[str, Any]] = {}  # an atlas is read once
    for index, (case, folder) in enumerate(cases) if resume else ():
        try:
            if case.problem:
                raise InputError(case.problem)
            for path in inputs(case).values():
                known[path] = known.get(path) or file_record(path, None)
            records = {role: known[path] for role, path in inputs(case).items()}
            found, reason = _finished(folder, case, made_from(case, records, shared))
        except InputError as error:
            settled[index] = {"name": case.name, "modalities": list(case.modalities), "error": failure_record(error)}
            log.error("%s: %s", case.name, error)
            continue
        if found is None:
            log.info("%s: to be done: %s", case.name, reason)
        else:
            settled[index] = found | {"resumed": True}
    rest = [(case, folder) for index, (case, folder) in enumerate(cases) if index not in settled]
    remove(folder / case.record for case, folder in rest)
    remove(folder / name for case, folder in rest for name in case.results)
    if resume:
        done = sum("error" not in record for record in settled.values())
        log.info("resume: %d of %d pairs are done already", done, len(cases))
    return settled


def _finished(folder: Path, case: Case, expected: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The record of a pair that is done, or why it is not."""
    path = folder / case.record
    if not path.is_file():
        return None, "it has no record"
    try:
        (pair,) = read_json(path)["pairs"]
        then = pair["made_from"]
        outputs = {str(item["file"]): item for item in pair["outputs"]}
    except (InputError, KeyError, TypeError, ValueError):
        return None, "its record is not that of a finished pair"
    if not isinstance(then, dict):
        return None, "its record is not that of a finished pair"
    if differs := [name for name in expected if then.get(name) != expected[name]]:
        return None, f"its result was made with another {', '.join(differs)}"
    for name in outputs:
        if name not in case.results:  # a record is no reason to look anywhere else
            return None, f"{name} is none of its results"
        try:
            same = file_record(folder / name, folder) == outputs[name]
        except InputError:
            same = False
        if not same:
            return None, f"{name} is gone or was changed"
    return pair, ""


def _spare_inputs(cases: Sequence[tuple[Case, Path]], spare: Sequence[Path]) -> None:
    real: dict[Path, Path] = {}

    def place(path: Path) -> Path:
        """Where the entry of a file lies, which may be a link to another."""
        real[path.parent] = real.get(path.parent) or path.parent.resolve()
        return real[path.parent] / path.name

    used = [*spare, *(path for case, _ in cases if not case.problem for path in inputs(case).values())]
    taken = {where for path in used for where in (place(path), path.resolve())}
    for case, folder in cases:
        for name in (case.record, *case.results):
            if place(folder / name) in taken:
                raise ConfigError(f"{folder / name}: is an input and would be replaced by the result of that name; choose "
                                  "another output folder")


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
