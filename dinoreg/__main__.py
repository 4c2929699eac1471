"""The command line: ``python -m dinoreg COMMAND`` (or ``dinoreg COMMAND`` once installed)."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dinoreg import __version__
from dinoreg.errors import DinoRegError, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Returns:
        The exit status: 0, or the ``exit_code`` of the error, whose message goes to stderr as one line.
    """
    parser = argparse.ArgumentParser(prog="dinoreg", description="Registration of 3D medical images with frozen DINOv2 features.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_evaluate(commands)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        arguments.run(arguments)
    except DinoRegError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "evaluate", help="score a folder of displacement fields on a Learn2Reg data set",
        description="Score displacement fields on a Learn2Reg data set: metrics in mm and official arithmetic, before and after.")
    parser.add_argument("dataset", type=Path, metavar="DATASET_DIR", help="folder with <Task>_dataset.json, images, labels...")
    parser.add_argument("fields", type=Path, metavar="FIELDS_DIR", help="folder with disp_*.nii.gz or disp_*.npz")
    parser.add_argument("--split", default="auto", help="auto (default: test if it lists pairs, else val), val, test or train")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers, by case and aggregated, to FILE")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from dinoreg.evaluate import evaluate_dataset, format_table
    from dinoreg.io import write_json
    from dinoreg.learn2reg import load_dataset

    evaluation = evaluate_dataset(load_dataset(arguments.dataset), arguments.fields, arguments.split)
    if arguments.json is not None:
        write_json(arguments.json, evaluation.to_json())
    sys.stdout.write(format_table(evaluation) + "\n")
    if evaluation.problems:
        total = len(evaluation.problems) + len(evaluation.cases)
        raise InputError(f"{len(evaluation.problems)} of {total} pairs could not be scored, the first: {evaluation.problems[0]}")


if __name__ == "__main__":
    sys.exit(main())
