"""The door of the container: reads /input, registers every pair that it asks for, writes /output.

Two contracts, told apart by what lies in the input folder:

- a Learn2Reg data set (``<Task>_dataset.json``): ``disp_*.nii.gz`` a pair, the warped images under ``warped/``, pictures under
  ``qc/``;
- a single pair of grand-challenge.org (``inputs.json`` or ``images/fixed``): one field in ``images/displacement-field/``.

A pair of a data set has its own report, under ``records/``, by which ``--resume`` knows whether it is done. ``report.json`` comes
last: its presence means that the run came to its end. A pair that fails does not stop the others; the exit
status is that of the first failure (2 configuration, 3 input, 4 weights, 5 output, 6 registration, 1 anything else).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from evalutils.evalutils import Algorithm
from evalutils.exceptions import ValidationError
from evalutils.io import FileLoader
from evalutils.validators import ExpectedColumnNamesValidator
from pandas import DataFrame

from dinoreg.completion import recipe, take_stock
from dinoreg.config import FEATURES, PRESETS, auto_preset, get_preset, modality
from dinoreg.errors import ConfigError, DinoRegError, InputError, OutputError
from dinoreg.grandchallenge import parse_sockets
from dinoreg.io import check_writable, remove, write_json
from dinoreg.jobs import Case, Images, Job, find_job, write_case
from dinoreg.memory import parse_bytes
from dinoreg.progress import shown
from dinoreg.registration import Registrar
from dinoreg.report import failure_record, run_record
from dinoreg.result import Registration
from dinoreg.run import PairRun
from dinoreg.signals import leave_at_signals
from dinoreg.volume import Volume

log = logging.getLogger("dinoreg.process")


class JobLoader(FileLoader):
    """Loads a folder's job: the cases become the rows of evalutils' table."""

    job: Job  # of the folder loaded last

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def load(self, *, fname: Path) -> list[dict[str, Any]]:
        try:
            self.job = find_job(fname, self.options.mode, self.options.split, parse_sockets(self.options.sockets),
                                self.options.initial_transform)
        except OSError as error:
            raise InputError(f"{error.filename or fname}: expected an input that can be read; got: {error.strerror or error}; "
                             "let the user that runs this read it") from error
        return [vars(case) for case in self.job.cases]


class DinoReg(Algorithm):
    """evalutils' life cycle over pairs: load, validate, process_cases, save."""

    def __init__(self, options: argparse.Namespace, registrar_factory: Callable[..., Registrar]) -> None:
        self.loader = JobLoader(options)
        columns = tuple(field.name for field in dataclasses.fields(Case))
        super().__init__(index_key="pair", file_loaders={"pair": self.loader},
                         validators={"pair": (ExpectedColumnNamesValidator(expected=columns),)}, input_path=options.input,
                         output_path=options.output, output_file=options.output / "report.json")
        self.options = options
        self.registrar_factory = registrar_factory
        self.started = time.monotonic()
        self.warnings: list[str] = []

    def load(self) -> None:
        check_writable(self._output_path)
        if not self.options.resume:
            remove([self._output_file])  # of an earlier run
        self._cases["pair"] = DataFrame(self.loader.load(fname=self._input_path), dtype=object)

    def validate(self) -> None:
        try:
            super().validate()
        except ValidationError as error:
            raise InputError(str(error)) from error

    def process_cases(self, file_loader_key: str | None = None) -> None:
        job = self.loader.job
        modalities = sorted({text for case in job.cases for text in case.modalities})
        self.preset = auto_preset(job.dataset, modalities) if self.options.preset == "auto" else self.options.preset
        self.config = get_preset(self.preset)
        log.info("%s, %d pair%s%s, preset %s", job.contract, len(job.cases), "" if len(job.cases) == 1 else "s",
                 f" of {job.dataset} ({job.split})" if job.dataset else "", self.preset)
        if self.options.features not in (None, self.config.features):
            self.warnings.append(f"features {self.options.features} in place of the preset's {self.config.features}, as asked")
            log.warning(self.warnings[-1])
            self.config = dataclasses.replace(self.config, features=self.options.features)
        self.registrar = self.registrar_factory(self.config, weights=self.options.weights, device=self.options.device,
                                                threads=self.options.threads, time_limit=self.options.time_limit,
                                                max_memory=self.options.max_memory)
        self.shared = recipe(self.config, self.registrar.engine, {"vector_field": self.options.vector_field,
                                                                      "initial": self.options.initial_transform,
                                                                      "time_limit": self.options.time_limit})
        cases = [(case, self._output_path) for case in job.cases]
        self.settled = take_stock(cases, self.shared, resume=self.options.resume)
        if job.contract == "learn2reg":  # a single pair has no other record
            remove([self._output_file])
        super().process_cases(file_loader_key)

    def process_case(self, *, idx: int, case: Any) -> dict[str, Any]:
        case = Case(**case)
        if idx in self.settled:
            return self.settled[idx]
        log.info("pair %d of %d: %s", idx + 1, len(self.loader.job.cases), case.name)
        run = PairRun(case, self.config, lambda case, images: self.predict(input_image=(case, images)), self.write,
                      output=self._output_path, root=self._input_path, run=self.run(), shared=self.shared)
        return run.read().solve().write()

    def write(self, case: Case, images: Images, registration: Registration, warped: Volume | None) -> list[Path]:
        """Write field and images; their files."""
        return write_case(case, self._output_path, images, registration.disp, warped, vector_field=self.options.vector_field)

    def predict(self, *, input_image: tuple[Case, Images]) -> Registration:
        case, images = input_image
        return self.registrar.register(images.fixed, images.moving, fixed_mask=images.fixed_mask, moving_mask=images.moving_mask,
                                       modalities=[modality(text) for text in case.modalities],
                                       colours=case.picture is not None, output="field" if case.picture else "mha",
                                       initial=None if case.initial == "none" else case.initial)

    def run(self) -> dict[str, Any]:
        """What reports say of the whole run."""
        job = self.loader.job
        return {"contract": job.contract, "dataset": job.dataset, "split": job.split, "preset": self.preset,
                "config": self.config.to_dict(), "warnings": self.warnings}

    def save(self) -> None:
        write_json(self._output_file, run_record(self.run(), self._case_results, time.monotonic() - self.started))
        log.info("report: %s", self._output_file)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the options")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. A container that is started without one is set up by variables: DINOREG_PRESET is --preset, and so on."""
    parser = Parser(description="Register the pairs of a Learn2Reg data set, or a single pair.",
                                     epilog="The variables DINOREG_INPUT, DINOREG_PRESET ... replace the defaults.")

    def option(name: str, default: Any, text: str, **settings: Any) -> None:
        value = os.environ.get(f"DINOREG_{name.upper().replace('-', '_')}") or default  # empty counts as unset
        parser.add_argument(f"--{name}", default=value, help=f"{text} (default: {default})" if default else text, **settings)

    option("input", "/input", "folder to read", type=Path)
    option("output", "/output", "folder to write", type=Path)
    option("mode", "auto", "contract: auto, learn2reg or single")
    option("split", "auto", "pairs of a Learn2Reg data set: auto (test if it lists any, else val), val, test or train")
    option("preset", "auto", f"auto (from data set and modalities), {', '.join(PRESETS)}")
    option("features", None, f"in place of the preset's: {', '.join(FEATURES)}")
    option("weights", None, "folder with the encoder's weights", type=Path)
    option("initial-transform", "auto", "where to start: auto (the headers, unless the images say clearly that they are far off) "
           "or none (the headers; in a Learn2Reg data set, the voxels)")
    option("device", "auto", "auto, cpu or cuda")
    option("threads", None, "CPU threads", type=int)
    option("time-limit", None, "seconds for a pair; when they are over, its best field so far is the result", type=float)
    option("max-memory", None, "memory that may be held, such as 8G; a container's limit counts by itself", type=parse_bytes)
    option("sockets", "", "slugs of a single pair, such as fixed=cbct,moving=planning-ct")
    option("log", None, "file to which the log is added", type=Path)
    parser.add_argument("--vector-field", action="store_true", default=os.environ.get("DINOREG_VECTOR_FIELD") == "1",
                        help="single pair: write a 3D image of vectors in place of a scalar 4D image")
    parser.add_argument("--resume", action="store_true", default=os.environ.get("DINOREG_RESUME") == "1",
                        help="leave pairs alone that an earlier run finished, from the same images, with the same options")
    return parser.parse_args(arguments)


def set_up_logging(path: Path | None) -> None:
    """Log to standard output, where a platform shows it as a log and not as a warning, and to a file if there is one."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(path, encoding="utf-8"))
        except OSError as error:
            raise OutputError(f"{path}: expected a log file that can be written; got: {error.strerror}; name another") from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its caches are its own business


def main(arguments: Sequence[str] | None = None, registrar_factory: Callable[..., Registrar] = Registrar) -> int:
    """Run with the given command line; the exit status. The last line on standard error says what failed, if anything did."""
    try:
        set_up_logging(None)  # for what is wrong with the options themselves
        options = parse_options(arguments)
        set_up_logging(options.log)
        algorithm = DinoReg(options, registrar_factory)
        with shown():
            algorithm.process()
        failures = [(f"{record['name']}: ", record["error"]) for record in algorithm._case_results if "error" in record]
        summary = f"{len(failures)} of {len(algorithm._case_results)} pairs failed; "
    except Exception as error:
        if not isinstance(error, DinoRegError):
            log.exception("unexpected error")
        failures, summary = [("", failure_record(error))], ""
    if not failures:
        return 0
    name, failure = failures[0]
    log.error("%s%s%s", summary, name, failure["message"])
    sys.stdout.flush()
    sys.stderr.write(f"dinoreg: {summary}{name}{failure['message']}\n")
    return int(failure["exit_code"])


if __name__ == "__main__":
    leave_at_signals()
    sys.exit(main())
