"""``dinoreg check``: everything that is wrong with the pairs of a folder, without registering them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dinoreg.errors import InputError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check", help="say what is wrong with the pairs of a folder, without registering them",
        description="Check the pairs of a Learn2Reg data set or a grand-challenge.org folder; docs/checks.md has the codes.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="as process.py and the container read it")
    parser.add_argument("--split", default="auto", help="auto (default: test if it lists pairs, else val), val, test or train")
    parser.add_argument("--preset", default="auto", help="whose modalities to expect: auto (default), or a name")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print every finding, a line each; fail if there is an error among them."""
    from dinoreg.config import auto_preset, get_preset
    from dinoreg.grandchallenge import parse_sockets
    from dinoreg.jobs import find_job, inspect_case

    job = find_job(arguments.folder, "auto", arguments.split, parse_sockets(""))
    modalities = sorted({text for case in job.cases for text in case.modalities})
    preset = auto_preset(job.dataset, modalities) if arguments.preset == "auto" else arguments.preset
    expected = get_preset(preset).modalities
    failed, warnings = 0, 0
    for case in job.cases:
        problems = inspect_case(case, expected)[1]
        failed += any(problem.severity == "error" for problem in problems)
        warnings += sum(problem.severity == "warning" for problem in problems)
        sys.stdout.writelines(f"{case.name}: {line}\n" for line in [f"{found.severity}: {found}" for found in problems] or ["ok"])
    if failed:
        raise InputError(f"{failed} of {len(job.cases)} pairs of {arguments.folder} cannot be registered")
    sys.stdout.write(f"{len(job.cases)} pairs can be registered, {warnings} warning{'' if warnings == 1 else 's'}\n")
