"""Run an image as the platforms do and look at everything it writes: ``./test.sh --container`` builds one and calls this.

``python -m container.check --image dinoreg:0.1.0 --engine buildah`` (with test/ on PYTHONPATH). Exit status 0: all checks passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from container.cases import EXAMPLE, FIELD, write_encoder, write_learn2reg, write_single
from container.fields import compare, difference, load_field
from container.runners import UID, BubblewrapRunner, EngineRunner, Outcome, RunnerError, Task, find_runner

EXPECTED = Path(__file__).resolve().parents[1] / "expected"
RUN_LIMIT = 600.0  # seconds for the small case; far more than it takes
STOP_LIMIT = 5.0  # seconds from SIGTERM to the end; engines follow with SIGKILL after 10
TIMES = {"seconds", "peak_rss_mb", "base", "measured_peak"}  # of a report, the entries that differ from run to run


class CheckError(Exception):
    """What is wrong with the image, in words."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


class Checks:
    """The checks of one image. Each method that starts with ``check_`` is one; they run in the order in which they stand here."""

    def __init__(self, runner: EngineRunner | BubblewrapRunner, work: Path) -> None:
        self.runner, self.work = runner, work
        self.learn2reg, self.single, self.model = work / "learn2reg", work / "single", work / "model"
        write_learn2reg(self.learn2reg)
        write_single(self.single, self.learn2reg)

    def folder(self, name: str) -> Path:
        """An empty folder that the user in the container may write to."""
        path = self.work / name
        path.mkdir(parents=True)
        os.chown(path, UID, UID) if os.geteuid() == 0 else path.chmod(0o777)
        return path

    def run(self, task: Task, status: int = 0) -> Outcome:
        outcome = self.runner.start(task).wait(RUN_LIMIT)
        require(outcome.status == status, f"exit status {outcome.status}, expected {status}\nstderr: "
                                          f"{outcome.stderr.strip()[-2000:]}\nlog: {outcome.log[-2000:]}")
        return outcome

    def plain(self, name: str, source: Path, **environment: str) -> Path:
        """Run the image on a folder with MIND alone; the output folder. One thread, unless asked otherwise: the case is small."""
        output = self.folder(name)
        variables = {"DINOREG_FEATURES": "mind", "DINOREG_THREADS": "1", **environment}
        self.run(Task({"/input": source}, {"/output": output}, variables))
        report = self.report(output)
        require(report["status"] == "complete" and report["pairs"][0]["info"]["device"] == "cpu", f"the report says {report}")
        return output

    @staticmethod
    def report(output: Path) -> dict[str, Any]:
        return dict(json.loads((output / "report.json").read_text(encoding="utf-8")))

    @staticmethod
    def matches(field: Path, expected: str) -> str:
        problems, found = compare(load_field(field), EXPECTED / expected)
        require(not problems, f"{field.name}: {'; '.join(problems)}")
        return f"differs from expected/{expected} by {found['mean']:.4f} voxels on average, {found['max']:.4f} at most"

    def check_learn2reg(self) -> str:
        output = self.plain("learn2reg-1", self.learn2reg)
        return self.matches(output / FIELD, "learn2reg.npz")

    def check_single_pair(self) -> str:
        output = self.plain("single-1", self.single)
        images = [path for path in (output / "images").rglob("*") if path.is_file()]
        require(len(images) == 1 and images[0].parent.name == "displacement-field", f"expected one image, got {images}")
        return self.matches(images[0], "single.npz")

    def check_oncoreg(self) -> str:
        """The shim, with the entry point that OncoReg names, relative to the working directory."""
        self.write_model()
        results = self.folder("oncoreg")
        mounts = {"/oncoreg/data": self.learn2reg, "/oncoreg/model": self.model}
        trained = self.run(Task(mounts, {"/oncoreg/results": results}, entrypoint="./train.sh", arguments=("ThoraxCBCT",)))
        require(bool(trained.log), "train.sh says nothing")
        self.run(Task(mounts, {"/oncoreg/results": results}, {"DINOREG_FEATURES": "mind", "DINOREG_THREADS": "1"},
                      "./test.sh", ("ThoraxCBCT", "Val")))
        require((results / "debug.log").stat().st_size > 0, "results/debug.log is empty")
        return self.matches(results / FIELD, "learn2reg.npz")

    def check_two_runs_are_identical(self) -> str:
        first, second = self.work / "learn2reg-1", self.plain("learn2reg-2", self.learn2reg)
        files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (first, second)]
        require(files[0] == files[1], f"other files the second time: {files[0] ^ files[1]}")
        for name in sorted(path for path in files[0] if path.suffix != ".json"):  # reports hold seconds
            require((first / name).read_bytes() == (second / name).read_bytes(), f"{name} has other bytes the second time")
        reports = [without_times(self.report(folder)) for folder in (first, second)]
        require(reports[0] == reports[1], "the reports differ in more than times")
        return f"{len(files[0])} files"

    def check_two_threads_give_the_same_field(self) -> str:
        output = self.plain("two-threads", self.learn2reg, DINOREG_THREADS="2")
        one_thread = load_field(self.work / "learn2reg-1" / FIELD)
        problems, found = difference(load_field(output / FIELD), one_thread, "that of one thread")
        require(not problems, "; ".join(problems))
        return f"differs by {found['mean']:.4f} voxels on average, {found['max']:.4f} at most"

    def check_dinov2_and_cold_start(self) -> str:
        """A seeded random ViT-S where the platform puts a model; the time until it has encoded a first slice."""
        self.write_model()
        output = self.folder("dinov2")
        outcome = self.run(Task({"/input": self.learn2reg, "/opt/ml/model": self.model}, {"/output": output},
                                {"DINOREG_FEATURES": "dinov2+mind"}))
        info = self.report(output)["pairs"][0]["info"]
        require(bool(info.get("encoder_sha256")), f"no sha256 of the encoder in the report: {info}")
        require(bool(np.isfinite(load_field(output / FIELD)).all()), "the field is not finite")
        encoded = next((second for second, line in outcome.stdout if "encode:" in line), None)
        require(encoded is not None, "no line in the log says that the slices were encoded")
        seconds = self.report(output)["pairs"][0]["stages"]["encode"]["seconds"]
        first = next(second for second, _ in outcome.stdout)
        begin = float(encoded or 0) - seconds
        return f"{first:.1f} s to the first line of the log, {begin:.1f} s to the first slice, encoding {seconds:.1f} s"

    def check_missing_weights_are_an_error(self) -> str:
        output = self.folder("no-weights")
        outcome = self.run(Task({"/input": self.learn2reg}, {"/output": output}, {"DINOREG_FEATURES": "dinov2"}), status=4)
        last = outcome.stderr.strip().splitlines()[-1]
        require("fetch" in last, f"the last line on stderr does not say what to do: {last!r}")
        return last[:160]

    def check_sigterm(self) -> str:
        """A run that is told to end while it computes ends soon, and leaves no half-written file."""
        output = self.folder("sigterm")
        running = self.runner.start(Task({"/input": EXAMPLE}, {"/output": output}, {"DINOREG_FEATURES": "mind"}))
        deadline = time.monotonic() + 120
        while not any("prepare:" in line for _, line in running.lines) and time.monotonic() < deadline:
            if running.process.poll() is not None:
                break
            time.sleep(0.1)
        time.sleep(1)
        sent = time.monotonic()
        running.terminate()
        outcome = running.wait(60)
        seconds = time.monotonic() - sent
        require(outcome.status not in (0, 137), f"exit status {outcome.status}: it came to its end or was killed")
        require(seconds < STOP_LIMIT, f"it went on for {seconds:.1f} s after SIGTERM, allowed are {STOP_LIMIT:g}")
        left = [path.name for path in output.rglob("*") if path.is_file()]
        require(not left, f"files left behind: {left}")
        return f"ended {seconds:.1f} s after SIGTERM with status {outcome.status}"

    def check_nothing_unneeded_is_inside(self) -> str:
        """No compiler, no pip and no cache of it, no test data; and the folders that are mounted over exist."""
        script = ("for tool in gcc cc g++ make pip pip3; do command -v $tool && exit 1; done; test ! -e /root/.cache && "
                  "test ! -e /opt/dinoreg/test && test ! -e /wheelhouse && "
                  "du -sm /usr /var /opt/torch /opt/packages /opt/dinoreg/weights /opt/dinoreg 2> /dev/null || true")
        output = self.folder("inside")
        outcome = self.run(Task({"/input": self.learn2reg}, {"/output": output}, entrypoint="sh", arguments=("-c", script)))
        return "MB: " + ", ".join(line.replace("\t", " ") for _, line in outcome.stdout)

    def check_container_is_confined(self) -> str:
        """That the limits of this check are real."""
        probe = ("import os, socket\n"
                 "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
                 "assert os.getuid() == os.getgid() == " + str(UID) + ", os.getuid()\n"
                 "assert int(status['CapEff'], 16) == int(status['CapBnd'], 16) == 0, status['CapBnd']\n"
                 "assert int(status['NoNewPrivs']) == 1\n"
                 "assert os.listdir('/tmp') == []\n"
                 "for place in ('/', '/opt/dinoreg', '/usr', '/input', '/var/tmp', '/oncoreg'):\n"
                 "    try: open(place + '/probe', 'w')\n"
                 "    except OSError: continue\n"
                 "    raise SystemExit(place + ' can be written to')\n"
                 "open('/tmp/probe', 'w'); open('/output/probe', 'w')\n"
                 "try: socket.create_connection(('192.0.2.1', 80), timeout=2)\n"
                 "except OSError as error: assert error.errno == 101, error\n"
                 "print(sorted(os.listdir('/sys/class/net')) if os.path.isdir('/sys/class/net') else 'no network devices')\n")
        output = self.folder("confined")
        outcome = self.run(Task({"/input": self.learn2reg}, {"/output": output}, entrypoint="python3", arguments=("-c", probe)))
        return outcome.log

    def write_model(self) -> None:
        if not self.model.exists():
            write_encoder(self.model)


def without_times(value: Any) -> Any:
    """A report without what differs from run to run: times and measured memory."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """A folder for inputs and outputs, removed at the end unless the user named one."""
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
        return
    path = Path(tempfile.mkdtemp(prefix="dinoreg-check-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run an image as the platforms do, and look at everything it writes.")
    parser.add_argument("--image", required=True)
    parser.add_argument("--engine", required=True, choices=("docker", "podman", "buildah"))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write inputs and outputs to this new folder, and keep them")
    options = parser.parse_args()
    failed = passed = 0
    try:
        runner = find_runner(options.engine, options.image)
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        with working_folder(options.keep) as work:
            checks = Checks(runner, work)
            print(runner.limits, flush=True)
            for name in [name for name in vars(Checks) if name.startswith("check_")]:
                check: Callable[[], str] = getattr(checks, name)
                started = time.monotonic()
                try:
                    line = f"ok    {name.removeprefix('check_')}: {check()}"
                    passed += 1
                except (CheckError, RunnerError, OSError, ValueError, KeyError) as error:
                    line = f"FAIL  {name.removeprefix('check_')}: {error}"
                    failed += 1
                print(f"{line} ({time.monotonic() - started:.0f} s)", flush=True)
    finally:
        runner.close()
    print(f"container: {passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
