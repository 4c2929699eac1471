"""``dinoreg evaluate``: score a folder of displacement fields on a Learn2Reg data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dinoreg.errors import InputError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "evaluate", help="score a folder of displacement fields on a Learn2Reg data set",
        description="Score displacement fields on a Learn2Reg data set: metrics in mm and official arithmetic, before and after.")
    parser.add_argument("dataset", type=Path, metavar="DATASET_DIR", help="folder with <Task>_dataset.json, images, labels...")
    parser.add_argument("fields", type=Path, metavar="FIELDS_DIR", help="folder with disp_*.nii.gz or disp_*.npz")
    parser.add_argument("--split", default="auto", help="auto (default: test if it lists pairs, else val), val, test or train")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers, by case and aggregated, to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Score, print the table, and fail if a pair could not be scored."""
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
