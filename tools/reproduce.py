"""DINO-Reg on Learn2Reg data with real weights, beside the published numbers; and what each part of it is worth.

    python tools/reproduce.py DATA --weights DIR [--ablations] [--sets A,B] [--pairs N] [--scores FILE] [--device cuda]

DATA is a Learn2Reg folder (with its <Task>_dataset.json) or holds several, such as ThoraxCBCT, AbdomenMRCT and OASIS; DIR holds
checkpoints as weights/fetch.py puts them there. The table of each set goes to standard output. What was measured is kept in FILE
after every pair: a later call does only what is missing, or what was made by other code, weights or configuration.

Rows are variants of the preset that the set's name and modalities choose. Presets are not tuned to a set here. Quoted rows are of
other authors, on the split that they name, and hold for nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dinoreg.completion import recipe  # noqa: E402
from dinoreg.config import Config, auto_preset, get_preset, modality  # noqa: E402
from dinoreg.errors import ConfigError, DinoRegError, InputError, WeightsError  # noqa: E402
from dinoreg.evaluate import CaseResult, evaluate_pair  # noqa: E402
from dinoreg.grandchallenge import parse_sockets  # noqa: E402
from dinoreg.io import read_json, write_json  # noqa: E402
from dinoreg.jobs import find_job, load_case  # noqa: E402
from dinoreg.learn2reg import Dataset, Pair, find_dataset, load_dataset  # noqa: E402
from dinoreg.registration import Registrar  # noqa: E402
from dinoreg.report import file_record  # noqa: E402
from dinoreg.vit import ARCHITECTURES  # noqa: E402
from dinoreg.weights import Encoder, load_encoder, random_encoder  # noqa: E402

COLUMNS = {"dice": "Dice", "hd95_mm": "HD95 mm", "tre_mm": "TRE mm", "sdlogj_official": "SDlogJ off.", "sdlogj": "SDlogJ",
           "folds_percent": "Folds %", "encode_s": "Encoding s", "seconds": "All s"}
FORMATS = {"dice": ".3f", "hd95_mm": ".2f", "tre_mm": ".2f", "sdlogj_official": ".3f", "sdlogj": ".2f", "folds_percent": ".3g",
           "encode_s": ".1f", "seconds": ".1f"}
# (method, split or source, values), as quoted by others or measured independently of the authors
QUOTED: dict[str, tuple[tuple[str, str, dict[str, float]], ...]] = {
    "OncoReg": (("DINO-Reg ensemble", "private test, 1st place", {"dice": 0.639, "tre_mm": 3.94}),),
    "ThoraxCBCT": (("ConvexAdam", "test", {"dice": 0.684, "tre_mm": 4.93}), ("NiftyReg", "test", {"dice": 0.621, "tre_mm": 4.90}),
                   ("Fourier-Net", "test", {"dice": 0.619, "tre_mm": 4.03}), ("deeds", "test", {"dice": 0.690, "tre_mm": 8.76})),
    "AbdomenMRCT": (("DINO-Reg", "8 public pairs", {"dice": 0.782, "hd95_mm": 23.35, "folds_percent": 4.1}),
                    ("ConvexAdam, MIND", "8 public pairs", {"dice": 0.735}), ("ANTs SyN, MI", "8 public pairs", {"dice": 0.574}),
                    ("FireANTs", "8 public pairs", {"dice": 0.471}), ("no registration", "8 public pairs", {"dice": 0.371}),
                    ("ConvexAdam", "official test", {"dice": 0.731, "hd95_mm": 17.0}),
                    ("corrField", "official test", {"dice": 0.729, "hd95_mm": 15.4})),
}
GAPS_MM, COMPONENTS, MIND_WEIGHTS = (3.0, 12.0), (12, 48), (0.5, 2.0)
VIEWS = {"coronal": "coronal slices", "sagittal": "sagittal slices", "all": "three views"}
SIZES = ("vits14_reg4", "vitb14_reg4", "vitl14_reg4", "vitg14_reg4", "vitl14")  # the last one: without registers


@dataclass(frozen=True)
class Variant:
    """A row: what it is called, and how it registers."""

    name: str
    config: Config


def variants(preset: Config, ablations: bool) -> list[Variant]:
    """The rows of a set: MIND, DINOv2, both, the published algorithm; then one change at a time, each against one of these.

    Args:
        preset: that of the set.
        ablations: also the changes.
    """
    def change(part: str, **values: Any) -> Callable[[Config], Config]:
        return lambda config: dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})

    mind, dino, both = (dataclasses.replace(preset, features=features) for features in ("mind", "dinov2", "dinov2+mind"))
    released = get_preset("published")
    found = [Variant("MIND", mind), Variant("DINOv2", dino), Variant("DINOv2 + MIND", both), Variant("published", released)]
    if not ablations:
        return found
    changes: list[tuple[str, Config, Callable[[Config], Config]]] = [
        *((f"DINOv2, slices {gap:g} mm apart", dino, change("encoder", gap_mm=gap)) for gap in GAPS_MM),
        *((f"DINOv2, {n} components", dino, change("pca", components=n)) for n in COMPONENTS),
        ("published, exact PCA", released, change("quirks", randomised_pca=False)),
        *((f"DINOv2, {name}", dino, change("encoder", axis=axis)) for axis, name in VIEWS.items()),
        *((f"DINOv2, {arch}", dino, change("encoder", arch=arch)) for arch in SIZES),
        ("DINOv2, last four layers", dino, change("encoder", last_layers=4)),
        *((f"DINOv2 + MIND, MIND x {weight:g}", both, change("mind", weight=weight)) for weight in MIND_WEIGHTS),
        ("DINOv2 + MIND, refined on LCC", both, change("refine", lncc=1.0, features=0.0, information=0.0)),
        ("DINOv2 + MIND, refined on features", both, change("refine", lncc=0.0, features=1.0, information=0.0)),
    ]
    return [*found, *(Variant(name, make(base)) for name, base, make in changes)]


class Encoders:
    """The encoder of a row: a checkpoint, or seeded random weights of one architecture. The last one is kept.

    Args:
        weights: folder with checkpoints.
        random: "ARCH:SEED" in place of checkpoints; never to be called DINOv2.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(self, weights: Path | None, random: str | None, device: str) -> None:
        import torch

        self.weights, self.random = weights, random
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        self.last: tuple[str, Encoder | None] = ("", None)

    def get(self, config: Config) -> Encoder | None:
        """That of a configuration; None where it needs none.

        Raises:
            WeightsError: it is not there, or the row asks for another architecture than that of random weights.
        """
        if "dinov2" not in config.features:
            return None
        arch = config.encoder.arch
        if self.random is not None:
            given, seed = self.random.split(":")
            if arch in SIZES and config.solver != "published" and arch != given:
                raise WeightsError(f"random weights are of {given} alone")
            arch = given
        if self.last[0] != arch:
            self.last = arch, (load_encoder(arch, self.weights, device=self.device) if self.random is None
                               else random_encoder(arch, int(seed), device=self.device))
        return self.last[1]


def measure(pair: Pair, case: Any, registrar: Registrar) -> dict[str, Any]:
    """Register and score one pair: metrics before and after by the names of ``COLUMNS``, and seconds."""
    images = load_case(case)
    began = time.monotonic()
    result = registrar.register(images.fixed, images.moving, fixed_mask=images.fixed_mask, moving_mask=images.moving_mask,
                                modalities=[modality(text) for text in case.modalities])
    seconds = time.monotonic() - began
    scored = evaluate_pair(pair, result.disp, pair.name)
    cost = {"seconds": seconds, "encode_s": result.stages.get("encode", {}).get("seconds", 0.0)}
    return {"before": _values(scored, "before"), "after": _values(scored, "after") | cost}


def _values(scored: CaseResult, state: str) -> dict[str, float]:
    scores = getattr(scored, state)
    found = {name: scores.plain[name] for name in ("dice", "hd95_mm", "sdlogj", "folds_percent") if name in scores.plain}
    for name in ("tre_landmarks_mm", "tre_keypoints_mm"):
        if name in scores.plain:
            found.setdefault("tre_mm", scores.plain[name])
    return found | {"sdlogj_official": scores.official["LogJacDetStd"]} if state == "after" else found


def run_set(dataset: Dataset, options: argparse.Namespace, encoders: Encoders, kept: dict[str, Any]) -> list[str]:
    """Register, score and print one set; a line for each thing that could not be done.

    Args:
        dataset: the set.
        options: of the command line.
        encoders: for the rows.
        kept: what was measured before, by key; added to, and written to ``options.scores`` after each pair.
    """
    job = find_job(dataset.path.parent, "learn2reg", "auto", parse_sockets(""))
    pairs = list(zip(dataset.pairs("auto"), job.cases, strict=True))[:options.pairs]
    preset = get_preset(auto_preset(dataset.name, [text for _, case in pairs for text in case.modalities]))
    problems: list[str] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    chosen = [variant for variant in variants(preset, options.ablations) if not options.rows or variant.name in options.rows]
    for variant in chosen:
        measured = rows.setdefault(variant.name, [])
        try:
            encoder = encoders.get(variant.config)
            registrar = Registrar(variant.config, device=options.device, threads=options.threads, encoder=encoder)
        except WeightsError as error:
            problems.append(f"{dataset.name}, {variant.name}: {error}")
            continue
        made_of = recipe(variant.config, registrar.engine, {})
        for pair, case in pairs:
            try:
                key = _key(pair, case, made_of)
                if key not in kept:
                    kept[key] = measure(pair, case, registrar)
                    _say(f"{dataset.name} {pair.name}, {variant.name}: {kept[key]['after']['seconds']:.1f} s")
                    if options.scores:
                        write_json(options.scores, kept)
                measured.append(kept[key])
            except DinoRegError as error:
                problems.append(f"{dataset.name} {pair.name}, {variant.name}: {error}")
    print(f"\n{dataset.name}, {job.split}, preset {preset.preset}" + (f", random weights {options.random_encoder}: NOT DINOv2"
                                                                       if options.random_encoder else "") + "\n")
    for line in table(rows, QUOTED.get(dataset.name, ())):
        print(line, flush=True)
    return problems


def _key(pair: Pair, case: Any, made_of: Mapping[str, Any]) -> str:
    """What a measurement hangs on: contents of the images and of what is scored, configuration, weights, program."""
    files = [path for image in (pair.fixed, pair.moving) for path in (image, *(
        pair.companion(image, kind) for kind in ("masks", "labels", "keypoints", "landmarks"))) if path is not None]
    content = [case.modalities, [file_record(path, None)["sha256"] for path in files], dict(made_of)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]],
          quoted: Sequence[tuple[str, str, Mapping[str, float]]]) -> list[str]:
    """Means over pairs as markdown: no registration, the rows that were measured, the quoted ones.

    Rows over fewer pairs than others say so by their number; they are not to be compared with those.
    """
    def row(name: str, pairs: str, values: Mapping[str, float]) -> str:
        cells = [format(values[column], FORMATS[column]) if column in values else "-" for column in COLUMNS]
        return f"| {' | '.join([name, pairs, *cells])} |"

    def means(results: Sequence[Mapping[str, Any]], state: str) -> dict[str, float]:
        names = [name for name in COLUMNS if all(name in result[state] for result in results)]
        return {name: fmean(result[state][name] for result in results) for name in names}

    lines = [f"| Method | Pairs | {' | '.join(COLUMNS.values())} |", f"| {' | '.join(['---'] * (len(COLUMNS) + 2))} |"]
    longest = max(rows.values(), key=len, default=[])
    if longest:
        before = means(longest, "before")
        del before["sdlogj"], before["folds_percent"]  # say nothing about the zero field
        lines.append(row("no registration", str(len(longest)), before))
    lines += [row(name, str(len(results)), means(results, "after") if results else {}) for name, results in rows.items()]
    return lines + [row(f"quoted: {name}", split, values) for name, split, values in quoted]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status: 0, 1 if something could not be measured, else that of the error."""
    parser = argparse.ArgumentParser(description="DINO-Reg on Learn2Reg data, beside the published numbers.")
    parser.add_argument("data", type=Path, metavar="DATA", help="a Learn2Reg folder, or a folder of them")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with checkpoints; the usual places if not given")
    parser.add_argument("--random-encoder", metavar="ARCH:SEED", help="seeded random weights, to try the script: vits14_reg4:0")
    parser.add_argument("--ablations", action="store_true", help="also one change at a time")
    parser.add_argument("--sets", metavar="A,B", help="only these")
    parser.add_argument("--rows", metavar="A;B", help="only these rows, by the names in the table")
    parser.add_argument("--pairs", type=int, metavar="N", help="only the first N pairs of each set")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="keep what was measured, and use what is there (JSON)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; all by default")
    options = parser.parse_args(arguments)
    try:
        options.rows = options.rows.split(";") if options.rows else []
        if unknown := set(options.rows) - {variant.name for variant in variants(get_preset("generic"), ablations=True)}:
            raise ConfigError(f"--rows: expected names of rows; got {', '.join(sorted(unknown))}")
        if options.random_encoder is not None:
            arch, _, seed = options.random_encoder.partition(":")
            if arch not in ARCHITECTURES or not re.fullmatch(r"\d{1,9}", seed):
                raise ConfigError(f"--random-encoder {options.random_encoder}: expected ARCH:SEED, such as vits14_reg4:0")
        sets = {dataset.name: dataset for dataset in (load_dataset(path.parent) for path in find_dataset(options.data))}
        wanted = list(sets) if options.sets is None else options.sets.split(",")
        if not sets or set(wanted) - set(sets):
            raise InputError(f"{options.data}: expected a Learn2Reg folder, or folders, with {options.sets or 'any set'}; got "
                             f"{', '.join(sets) or 'none'}; correct the path or --sets")
        kept: dict[str, Any] = read_json(options.scores) if options.scores and options.scores.is_file() else {}
        encoders = Encoders(options.weights, options.random_encoder, options.device)
        problems = [problem for name in wanted for problem in run_set(sets[name], options, encoders, kept)]
    except DinoRegError as error:
        _say(f"error: {error}")
        return error.exit_code
    if problems:
        _say("\nnot measured:\n" + "\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
