"""What each part of the solver is worth: one change of a preset at a time, on the same pairs.

    python benchmarks/ablation.py DATA_DIR [--sets A,B] [--pairs 2] [--features mind] [--threads 1]

The table has a line for each change and a column for each set: Dice, TRE in mm where a set has landmarks, official SDlogJ, means
over the first pairs of the set. A change that a preset does not know (such as the window where there is no local correlation) has
no value. Encoder, PCA,
MIND and views are the business of tools/reproduce.py --ablations. Progress goes to standard error, the table to standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from results import score  # noqa: E402

from dinoreg.config import FEATURES, Config, auto_preset, get_preset, modality  # noqa: E402
from dinoreg.errors import DinoRegError  # noqa: E402
from dinoreg.evaluate import evaluate_pair  # noqa: E402
from dinoreg.grandchallenge import parse_sockets  # noqa: E402
from dinoreg.jobs import find_job, load_case  # noqa: E402
from dinoreg.learn2reg import load_dataset  # noqa: E402
from dinoreg.metrics import jacobian_determinant, sdlogj_official  # noqa: E402
from dinoreg.registration import Registrar  # noqa: E402

SETS = "AbdomenMRCTx,AbdomenMRCTsim,ThoraxCBCTsim,BrainMNIColin,BrainT1T2sim"
Change = Callable[[Config], Config | None]


def refine(**values: Any) -> Change:
    """Other values of the refinement."""
    return lambda config: replace(config, refine=replace(config.refine, **values))


def correlation(**values: Any) -> Change:
    """The same where the preset has a local correlation."""
    return lambda config: refine(**values)(config) if config.refine.lncc else None


def turned_anchor(config: Config) -> Config | None:
    """The energy of the whole field where it is that of what is added, and the other way round."""
    return refine(anchored=not config.refine.anchored)(config)


def information(factor: float) -> Change:
    """Another weight of the mutual information where the preset has one."""
    return lambda config: refine(information=factor * config.refine.information)(config) if config.refine.information else None


def last_level(factor: float) -> Change:
    """Another number of iterations at the voxels."""
    def change(config: Config) -> Config | None:
        *levels, (cell, iterations) = config.refine.levels
        return refine(levels=(*levels, (cell, round(factor * iterations))))(config)

    return change


def regularity(factor: float) -> Change:
    """Another weight of the diffusion energy."""
    return lambda config: refine(regularity=factor * config.refine.regularity)(config)


CHANGES: dict[str, Change] = {
    "the preset": lambda config: config,
    "energy: the other field": turned_anchor,
    "regularity / 2": regularity(0.5), "regularity x 2": regularity(2.0),
    "steps smoothed over 1 cell": refine(step_sigma=1.0), "steps smoothed over 2 cells": refine(step_sigma=2.0),
    "window 3": correlation(window=3), "window 5": correlation(window=5), "window 7": correlation(window=7),
    "no mutual information": information(0.0), "mutual information x 2": information(2.0),
    "iterations at the voxels x 2": last_level(2.0), "iterations at the voxels / 2": last_level(0.5),
    "one discrete level": lambda config: (replace(config, discrete=replace(config.discrete, levels=config.discrete.levels[:1]))
                                          if len(config.discrete.levels) > 1 else None),
}


def measure(folder: Path, pairs: int, features: str, threads: int) -> dict[str, str]:
    """The cells of a set by change."""
    dataset, job = load_dataset(folder), find_job(folder, "learn2reg", "auto", parse_sockets(""))
    preset = get_preset(auto_preset(dataset.name, sorted({text for pair in dataset.pairs() for text in pair.modalities})))
    todo = [(pair, case, load_case(case)) for pair, case in list(zip(dataset.pairs(), job.cases, strict=True))[:pairs]]
    cells = {}
    for name, change in CHANGES.items():
        changed = change(preset)
        if changed is None or (name != "the preset" and changed == preset):
            continue
        registrar = Registrar(replace(changed, features=features), threads=threads)
        values = []
        for pair, case, images in todo:
            result = registrar.register(images.fixed, images.moving, fixed_mask=images.fixed_mask, moving_mask=images.moving_mask,
                                        modalities=[modality(text) for text in case.modalities])
            scores = evaluate_pair(pair, result.disp, case.name)
            found = (score(scores, "dice"), score(scores, "tre_mm"), sdlogj_official(jacobian_determinant(result.disp)))
            values.append([np.nan if value is None else value for value in found])
        dice, tre, sdlogj = np.mean(values, axis=0)
        cells[name] = f"{dice:.3f}{'' if np.isnan(tre) else f', {tre:.2f}'}, {sdlogj:.3f}"
        sys.stderr.write(f"{dataset.name} {name}: {cells[name]}\n")
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0, or that of the first error."""
    parser = argparse.ArgumentParser(description="One change of the solver at a time.")
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with a folder for each Learn2Reg set")
    parser.add_argument("--sets", default=SETS, metavar="A,B")
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="only the first N pairs of each set (default: 2)")
    parser.add_argument("--features", choices=FEATURES, default="mind")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    names = options.sets.split(",")
    try:
        cells = {name: measure(options.data / name, options.pairs, options.features, options.threads) for name in names}
    except DinoRegError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    lines = [["Change", *names], ["---"] * (len(names) + 1)]
    lines += [[change, *(cells[name].get(change, "") for name in names)] for change in CHANGES]
    sys.stdout.write("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
