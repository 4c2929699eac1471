"""Every Learn2Reg set of a folder, registered and scored: no registration, DINO-Reg, ConvexAdam and the best rival on record.

    python benchmarks/accuracy.py DATA_DIR [--sets A,B] [--pairs N] [--features mind] [--with convexadam] [--check] ...

Each pair is registered in a process of its own (register_pair.py), which sees a copy of the two images and of their masks, never
labels, landmarks or the true field. Scores are those of ``python -m dinoreg evaluate``. README.md explains the columns.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from results import COLUMNS, CONVEXADAM, Result, check, convexadam_by_pair, format_row, notes, rows, to_json  # noqa: E402

from dinoreg.errors import ConfigError, DinoRegError, InputError, RegistrationError  # noqa: E402
from dinoreg.evaluate import CaseResult, evaluate_pair, find_field, read_disp  # noqa: E402
from dinoreg.io import read_json, write_json  # noqa: E402
from dinoreg.learn2reg import Dataset, Pair, find_dataset, load_dataset  # noqa: E402
from dinoreg.metrics import jacobian_determinant, sdlogj_official  # noqa: E402
from dinoreg.report import environment  # noqa: E402
from dinoreg.vit import ARCHITECTURES  # noqa: E402

CHILD = ROOT / "benchmarks" / "register_pair.py"
FATAL = (2, 4)  # exit statuses of process.py that every other pair would end with, too: configuration, weights


@dataclass(frozen=True)
class Method:
    """A way to register.

    Attributes:
        name: in tables.
        arguments: of register_pair.py.
        code: the files that decide the result, together with the arguments and the images.
    """

    name: str
    arguments: tuple[str, ...]
    code: tuple[Path, ...]


def dinoreg_method(features: str, encoder: str | None, threads: int, *, by_itself: bool = False) -> Method:
    """DINO-Reg with a choice of features.

    Args:
        features: mind, dinov2 or dinov2+mind.
        encoder: "ARCH:SEED" for seeded random weights, which are not DINOv2 and are never called so; None for a checkpoint.
        threads: CPU threads.
        by_itself: each image is encoded by itself, as for a cache, and not with its partner in one window.

    Raises:
        ConfigError: an encoder that is unknown or would not be used.
    """
    network, arguments = "DINOv2", ["dinoreg", "--threads", str(threads), "--features", features]
    if encoder is not None:
        arch, _, seed = encoder.partition(":")
        if arch not in ARCHITECTURES or not re.fullmatch(r"\d{1,9}", seed):
            raise ConfigError(f"--random-encoder {encoder}: expected ARCH:SEED, such as vits14_reg4:0; ARCH is one of "
                              f"{', '.join(ARCHITECTURES)}")
        if "dinov2" not in features:
            raise ConfigError(f"--random-encoder: expected --features dinov2 or dinov2+mind; got {features}, which has none")
        network = f"random ViT-{arch[3].upper()}, seed {seed}"
        arguments += ["--encoder", encoder]
    if by_itself:
        if "dinov2" not in features:
            raise ConfigError(f"--by-itself: expected --features dinov2 or dinov2+mind; got {features}, which has no encoder")
        network += ", images by themselves"
        arguments.append("--by-itself")
    name = {"mind": "MIND", "dinov2": network, "dinov2+mind": f"{network} + MIND"}[features]
    code = (*sorted((ROOT / "dinoreg").glob("*.py")), ROOT / "process.py", CHILD)
    return Method(f"DINO-Reg ({name})", tuple(arguments), code)


def convexadam_method(threads: int) -> Method:
    """The published package with its defaults.

    Raises:
        ConfigError: it is not installed.
    """
    package = importlib.util.find_spec("convexAdam")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("--with convexadam: no such package is installed; run: pip install -r benchmarks/requirements.txt")
    code = (*sorted(Path(package.submodule_search_locations[0]).glob("*.py")), CHILD)
    return Method(CONVEXADAM, ("convexadam", "--threads", str(threads)), code)


def copy_pair(dataset: Dataset, pair: Pair, folder: Path) -> list[Path]:
    """Make a data set of one pair out of what a registration may see: the two images and their masks. The files copied."""
    root, copies = dataset.path.parent, []
    for image in (pair.fixed, pair.moving):
        for path in (image, pair.companion(image, "masks")):
            if path is not None:
                copies.append(folder / path.relative_to(root))
                copies[-1].parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copies[-1])
    entry = {"fixed": pair.fixed.relative_to(root).as_posix(), "moving": pair.moving.relative_to(root).as_posix()}
    content = {"name": dataset.name, "modality": dict(dataset.modalities), "registration_val": [entry]}
    write_json(folder / dataset.path.name, content)
    return copies


def register(method: Method, dataset: Dataset, pair: Pair, output: Path) -> dict[str, Any]:
    """Make the field of a pair in ``output``, unless an earlier call left it there and everything is as it was.

    Returns:
        cpu_seconds of the whole process, startup_cpu_seconds of it before the method began, peak_mib; hashes of code and input.

    Raises:
        RegistrationError: it failed; with its last words.
        ConfigError: it failed in a way in which every other pair would.
    """
    usage_path = output / "usage.json"
    with tempfile.TemporaryDirectory() as folder:
        images = copy_pair(dataset, pair, Path(folder))
        made_of = {"code": _sha256(method.code), "input": _sha256(images, " ".join(method.arguments))}
        if usage_path.is_file():
            usage: dict[str, Any] = read_json(usage_path)
            if made_of.items() <= usage.items() and find_field(pair, output) is not None:
                return usage
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        name, _, threads, *options = method.arguments
        own = {key: value for key, value in os.environ.items() if key == "DINOREG_WEIGHTS" or not key.startswith("DINOREG_")}
        before = _children_cpu_seconds()
        with (output / "log.txt").open("w", encoding="utf-8") as log:
            command = [sys.executable, str(CHILD), name, folder, str(output), "--threads", threads, *options]
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**own, "OMP_NUM_THREADS": threads},
                                    check=False).returncode
        seconds = _children_cpu_seconds() - before
    if status != 0:
        words = (output / "log.txt").read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        raise (ConfigError if status in FATAL else RegistrationError)(f"{method.name} ended with status {status}: {words}")
    usage = {"cpu_seconds": round(seconds, 2), **read_json(usage_path), **made_of}
    write_json(usage_path, usage)
    return usage


def score_pair(pair: Pair, path: Path) -> CaseResult:
    """The scores of ``dinoreg evaluate`` and, as the record has it, the official SDlogJ of the whole field, whether there is a
    mask or not."""
    disp = read_disp(path)
    case = evaluate_pair(pair, disp, path.name)
    whole = {"sdlogj_official_whole": sdlogj_official(jacobian_determinant(disp))}
    return replace(case, after=replace(case.after, plain={**case.after.plain, **whole}))


def run_set(dataset: Dataset, pairs: Sequence[Pair], method: Method, work: Path, *, keep: bool) -> Result:
    """Register and score the pairs of a set. A pair that fails becomes a problem of the result and does not stop the others."""
    result = Result(method.name)
    for pair in pairs:
        output = work / dataset.name / re.sub(r"[^\w-]+", "_", method.name).strip("_") / pair.name
        try:
            if pair.problem is not None:
                raise InputError(pair.problem)
            cost = register(method, dataset, pair, output)
            path = find_field(pair, output)
            if path is None:
                raise RegistrationError(f"{method.name} left no field")
            result.cases[pair.name] = score_pair(pair, path)
            result.cost[pair.name] = cost
            said = f"{method.name}, {cost['cpu_seconds']:.1f} CPU s"
        except (InputError, RegistrationError) as error:
            said = str(error)
            result.problems.append(f"{dataset.name} {pair.name}: {said}")
        print(f"{dataset.name} {pair.name}: {said}", file=sys.stderr, flush=True)
        if not keep:
            shutil.rmtree(output, ignore_errors=True)
    return result


def choose_sets(folder: Path, names: str | None) -> list[Dataset]:
    """The Learn2Reg sets in a folder, or those of them that are named.

    Raises:
        InputError: there are none.
        ConfigError: an unknown name.
    """
    sets = {dataset.name: dataset for dataset in (load_dataset(path.parent) for path in find_dataset(folder))}
    if not sets:
        raise InputError(f"{folder}: expected folders with a <Task>_dataset.json; got none; name the folder that holds the sets")
    wanted = list(sets) if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in sets]:
        raise ConfigError(f"--sets: no set {', '.join(unknown)} in {folder}; there are {', '.join(sets)}")
    return [sets[name] for name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status: 0; 1 if a pair failed or --check found something; else that of the error."""
    parser = argparse.ArgumentParser(description="Accuracy, regularity and cost on Learn2Reg sets, beside the rivals.")
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with a folder a set")
    parser.add_argument("--sets", metavar="A,B", help="only these")
    parser.add_argument("--pairs", type=int, metavar="N", help="only the first N pairs of each set")
    parser.add_argument("--features", default="mind", choices=("mind", "dinov2", "dinov2+mind"))
    parser.add_argument("--by-itself", action="store_true", help="encode each image by itself, as for a cache of many pairs")
    parser.add_argument("--random-encoder", metavar="ARCH:SEED", help="seeded random weights, not a checkpoint: vits14_reg4:0")
    parser.add_argument("--with", dest="rivals", action="append", default=[], choices=("convexadam",), help="run this, too")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each method (default: 1)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the fields there; what still holds is not made again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, by pair and label; written after each set")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--check", action="store_true", help=f"fail on folds, or where {CONVEXADAM} is better on the same pairs")
    options = parser.parse_args(arguments)
    if options.pairs is not None and options.pairs < 1:
        parser.error(f"--pairs: expected at least 1; got {options.pairs}")
    if not options.data.is_dir():
        print(f"skipped: there is no folder {options.data}; the data sets are not part of the repository")
        return 0
    try:
        return run(options)
    except DinoRegError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    """Register, score, print and check; the exit status."""
    methods = [dinoreg_method(options.features, options.random_encoder, options.threads, by_itself=options.by_itself)]
    if "convexadam" in options.rivals:
        methods.append(convexadam_method(options.threads))
    sets = choose_sets(options.data, options.sets)
    recorded = read_json(ROOT / "benchmarks" / "recorded.json")
    content: dict[str, Any] = {"threads": options.threads, "environment": environment(), "sets": {}}
    everything: list[Result] = []
    against: list[str] = []
    compared = 0
    print(format_row(list(COLUMNS), markdown=options.markdown))
    if options.markdown:
        print(format_row(["---"] * len(COLUMNS), markdown=True))
    with tempfile.TemporaryDirectory() as folder:
        for dataset in sets:
            pairs = dataset.pairs()[:options.pairs]
            results = [run_set(dataset, pairs, method, options.work or Path(folder), keep=options.work is not None)
                       for method in methods]
            everything += results
            record = recorded["sets"].get(dataset.name)
            for row in rows(dataset.name, results, record):
                print(format_row(row, markdown=options.markdown), flush=True)
            content["sets"][dataset.name] = to_json(dataset, results, record)
            if options.json is not None:
                write_json(options.json, content)
            rival = convexadam_by_pair(results, recorded["convexadam_pairs"].get(dataset.name, {}))
            found, number = check(dataset.name, results[0], rival)
            against += found
            compared += number
    print("\n".join(["", *notes(everything), f"recorded: {recorded['measured']}"]))
    if not options.check:
        return int(any(result.problems for result in everything))
    if not compared:
        against.append(f"no pair has a recorded value of {CONVEXADAM} to compare with; add --with convexadam")
    print("\n".join([f"check failed: {line}" for line in against] or [f"check passed: no folds, {compared} pairs compared"]))
    return int(bool(against))


def _sha256(paths: Sequence[Path], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
