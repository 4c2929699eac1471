"""One pair from its files to its results and its record, under whichever contract; a failure becomes part of the record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from dinoreg import completion, slabs
from dinoreg.config import Config
from dinoreg.errors import DinoRegError, InputError, OutputError
from dinoreg.io import check_writable, write_json
from dinoreg.jobs import Case, Images, load_case
from dinoreg.memory import peak_bytes
from dinoreg.report import failure_record, field_metrics, file_record, one_line, run_record, summary_line
from dinoreg.result import Registration
from dinoreg.stages import stage
from dinoreg.truth import in_words, read_truth, worse
from dinoreg.volume import Volume

log = logging.getLogger(__name__)

Register = Callable[[Case, Images], Registration]
Record = dict[str, Any]
Write = Callable[[Case, Images, Registration, Volume | None], list[Path]]  # the last but one: the warped image, if asked for


class PairRun:
    """One case in three steps, for others to be done meanwhile: ``read``, ``solve``, ``write``, each once and in this order.

    A failure becomes part of the record; the steps after it do nothing but to write the report.

    Args:
        case: what is asked for.
        config: what it is registered with.
        register: the engine.
        write: writes field and images and returns their files.
        output: folder to which the names of the case and of the outputs in the record are relative.
        root: folder to which the names of the inputs in the record are relative; None: as they were given.
        run: what the report of the case says of the whole run.
        shared: what its results follow from besides its inputs; see :func:`dinoreg.completion.recipe`.
    """

    def __init__(self, case: Case, config: Config, register: Register, write: Write, *, output: Path, root: Path | None,
                 run: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        self.case, self.config, self.output, self.root, self.run, self.shared = case, config, output, root, run, shared
        self._register, self._write = register, write
        self.stages: dict[str, dict[str, float]] = {}
        self.record: Record = {"name": case.name, "modalities": list(case.modalities)}
        self.started = time.monotonic()

    def read(self) -> PairRun:
        """Read and check the images; returns itself."""
        self._attempt(self._read_images)
        return self

    def solve(self) -> PairRun:
        """Register them; returns itself."""
        self._attempt(self._solve)
        return self

    def write(self) -> Record:
        """Write everything, the report of the case last.

        Returns:
            The record for the report of a run; with "error" where the case failed.
        """
        self._attempt(self._write_results)
        if not self.case.problem:  # a pair that is listed twice has a problem, and the first one's record is not its own
            failure = self.record.get("error")
            self._attempt(self._report, after_failure=True)
            self.record |= {"error": failure} if failure else {}
        return self.record

    def _attempt(self, work: Callable[[], None], *, after_failure: bool = False) -> None:
        if "error" in self.record and not after_failure:
            return
        try:
            work()
        except DinoRegError as error:
            log.error("%s: %s", self.case.name, one_line(str(error)))
            self.record["error"] = failure_record(error)
        except Exception as error:
            log.exception("%s: unexpected error", self.case.name)
            self.record["error"] = failure_record(error)

    def _report(self) -> None:
        write_json(self.output / self.case.record, run_record(self.run, [self.record], time.monotonic() - self.started))

    def _read_images(self) -> None:
        case = self.case
        check_writable((self.output / case.record).parent)  # now, and not after minutes of work
        with stage("read", self.stages):
            before = _stamps(case)
            self.images = load_case(case, self.config.modalities)
            self.truth = read_truth(case.known, case.space, self.images.fixed, self.images.moving)
            self.inputs = {role: file_record(path, self.root) for role, path in completion.inputs(case).items()}
            if _stamps(case) != before:
                raise InputError(f"{case.fixed}, {case.moving} or what belongs to them was changed while it was read; expected "
                                 "inputs that stay as they are: start again when they are complete")
        for warning in self.images.warnings:
            log.warning("%s: %s", case.name, warning)

    def _solve(self) -> None:
        self.registration = self._register(self.case, self.images)
        self.stages |= self.registration.stages

    def _write_results(self) -> None:
        case, images, registration, stages, output = self.case, self.images, self.registration, self.stages, self.output
        planned = registration.info.pop("plan", {})
        at_a_time = planned.get("slab_voxels", slabs.VOXELS)
        with slabs.of(at_a_time), stage("write", stages):
            warped = registration.warp(images.moving) if case.warped else None
            files = self._write(case, images, registration, warped)
        with slabs.of(at_a_time), stage("metrics", stages):
            field, scores = field_metrics(registration.disp, images.fixed.spacing), self.truth.scores(registration)
        for warning in (found := [*registration.warnings, *worse(scores)]):
            log.warning("%s: %s", case.name, warning)
        registration = replace(registration, warnings=[*images.warnings, *found])
        undrawn: list[str] = []
        if warped is not None:
            title = f"{case.name}, preset {self.config.preset}, features {self.config.features}"
            told = in_words(scores)
            agreement = "; ".join(f"{name} {before} \N{RIGHTWARDS ARROW} {after}" for name, (before, after) in told.items())
            summary = "\n".join(filter(None, [agreement, summary_line(field, len(registration.warnings))]))

            def draw_picture(path: Path) -> None:
                from dinoreg.qc import write_qc  # here, for matplotlib takes its time to load

                write_qc(path, images.fixed, images.moving, warped, registration, title=title, summary=summary)

            def draw_page(path: Path) -> None:
                from dinoreg.htmlreport import write_html_report

                write_html_report(path, images.fixed, images.moving, warped, registration, title=title,
                                  names=(case.fixed.name, case.moving.name), scores=told, config=self.config.to_dict())

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
        self.record |= {"inputs": self.inputs, "outputs": [file_record(path, output) for path in files], "stages": stages,
                        "field": field, "scores": scores, "info": registration.info,
                        "plan": planned | {"measured_peak": peak_bytes()},
                        "warnings": [*registration.warnings, *undrawn],
                        "made_from": completion.made_from(case, self.inputs, self.shared)}


def run_overlapped(runs: Iterable[PairRun]) -> Iterator[Record]:
    """Pairs one after the other, in order; while one is solved, the next one is read and the one before is written.

    Never more than one pair is in each of the three steps.
    """
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        reading: Future[PairRun] | None = None
        writing: Future[Record] | None = None
        for run in chain(runs, [None]):
            following = reader.submit(run.read) if run else None
            if reading is not None:
                solved = reading.result().solve()
                if writing is not None:
                    yield writing.result()
                writing = writer.submit(solved.write)
                del solved  # its images are the writer's alone
            reading = following
        if writing is not None:
            yield writing.result()


def _stamps(case: Case) -> list[tuple[str, int, int, int]]:
    """Name, inode, size and time of every file of a case."""
    files = [file for path in completion.inputs(case).values()
             for file in (sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else [])]
    return [(str(file), found.st_ino, found.st_size, found.st_mtime_ns) for file in files for found in [file.stat()]]
