"""Break runs over several pairs for real, resume them, and count what was lost.

    python tools/faults.py [--kills 60] [--seed 0] [--workdir DIR]

Every run is a process of its own: ``process.py`` over a data set, and ``dinoreg register --pairs`` over a list, with MIND
features on small volumes. Injected are kill -9, SIGTERM and SIGINT at random moments, a full disk (a limit on the size of files,
and a small file system where this may mount one), an output that becomes read-only, an input that vanishes, and a weights file
that was cut short. After each fault every file under its final name is compared with that of a run that was left in peace; then
the run is resumed, by the next victim or to its end. Exit status 1 if anything was lost, half, or different.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
from scipy import ndimage  # noqa: E402

import process  # noqa: E402
from dinoreg import __main__ as command_line  # noqa: E402
from dinoreg import config, htmlreport, kernels, qc  # noqa: E402, F401 (loaded here, once, and not in every run)
from dinoreg.io import write_volume  # noqa: E402
from dinoreg.report import code_sha256  # noqa: E402
from dinoreg.signals import leave_at_signals  # noqa: E402
from dinoreg.volume import Volume  # noqa: E402

PAIRS, SHAPE = 3, (18, 17, 16)
TIMED = (".json", ".html", ".csv")  # reports hold seconds: these need only be whole
QUICK = config.Config(features="mind", discrete=config.DiscreteConfig(levels=((12, 2, 3),), consistency_iterations=5),
                      refine=config.RefineConfig(levels=((2, 20), (1, 20))))


def make_input(folder: Path) -> None:
    """A Learn2Reg data set of blobs that move by a voxel or two, and the same as a list of pairs."""
    entries = []
    for n in range(1, PAIRS + 1):
        scene = ndimage.gaussian_filter(np.random.default_rng(n).normal(size=[size + 8 for size in SHAPE]), 2.0)
        scene = (1000 * scene / np.abs(scene).max()).astype(np.int16)
        names = [f"imagesTr/Blobs_{n:04d}_{modality:04d}.nii.gz" for modality in (0, 1)]
        for name, shift in zip(names, ((0, 0, 0), (1, -1, 2)), strict=True):
            crop = tuple(slice(4 + s, 4 + s + size) for s, size in zip(shift, SHAPE, strict=True))
            write_volume(folder / name, Volume(scene[crop], np.diag([2.0, 2.0, 2.0, 1.0])))
        entries.append({"fixed": names[1], "moving": names[0]})
    (folder / "Blobs_dataset.json").write_text(json.dumps({"name": "Blobs", "registration_val": entries}))
    rows = "".join(f"{entry['fixed']},{entry['moving']},pair {n}\n" for n, entry in enumerate(entries, 1))
    (folder / "pairs.csv").write_text(f"fixed,moving,name\n{rows}")


class Door:
    """One of the two ways in.

    Attributes:
        name: in the table.
        source: folder of :func:`make_input`.
        log: of all runs.
    """

    def __init__(self, name: str, source: Path) -> None:
        self.name, self.source, self.log = name, source, source.with_name(f"{name}.log")

    def start(self, output: Path, *options: str, limit: int | None = None) -> int:
        """Begin a run that resumes; its process id."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            sink = os.open(self.log if limit is None else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            leave_at_signals()
            config.PRESETS["generic"] = QUICK
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            common = ["--features", "mind", "--preset", "generic", "--device", "cpu", "--threads", "1", "--resume", *options]
            if self.name == "process.py":
                status = process.main(["--input", str(self.source), "--output", str(output), *common])
            else:
                status = command_line.main(["register", "--pairs", str(self.source / "pairs.csv"), "-o", str(output), *common])
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)

    def run(self, output: Path, *options: str, limit: int | None = None) -> int:
        """A run to its end; its status."""
        return ended(self.start(output, *options, limit=limit))

    def records(self, output: Path) -> list[Path]:
        """The records of the pairs that are done."""
        found = output.glob("records/*.json" if self.name == "process.py" else "*/report.json")
        return sorted(path for path in found if not temporary(path.name) and json.loads(path.read_text())["status"] == "complete")


def ended(pid: int) -> int:
    """Wait for a process; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def temporary(name: str) -> bool:
    """Whether a file is one that was being written: these are hidden."""
    return Path(name).name.startswith(".")


class Tally:
    """What was injected and what became of it, by kind of fault."""

    def __init__(self) -> None:
        self.injected: dict[str, int] = {}
        self.problems: list[str] = []
        self.kept = self.compared = self.half_written = 0

    def count(self, kind: str) -> None:
        self.injected[kind] = self.injected.get(kind, 0) + 1

    def check(self, kind: str, output: Path, whole: dict[str, bytes], before: dict[str, bytes] | None = None) -> None:
        """After a fault: what is there is whole and right, and what was finished before is there."""
        found = files(output)
        self.half_written += sum(map(temporary, found))
        for name, content in found.items():
            if temporary(name):
                continue
            self.compared += 1
            if name not in whole:
                self.problems.append(f"{kind}: {output.name}/{name} is no result")
            elif not name.endswith(TIMED) and content != whole[name]:
                self.problems.append(f"{kind}: {output.name}/{name} is half or different")
            elif name.endswith(".json"):
                json.loads(content)
            elif name.endswith(".html") and not content.rstrip().endswith(b"</html>"):
                self.problems.append(f"{kind}: {output.name}/{name} is half")
        for name, content in (before or {}).items():
            self.kept += 1
            if found.get(name) != content:
                self.problems.append(f"{kind}: {output.name}/{name} was finished and was lost or changed")

    def check_end(self, kind: str, status: int, output: Path, whole: dict[str, bytes]) -> None:
        """After the last resumption: the same files with the same bytes, and nothing besides."""
        if status:
            self.problems.append(f"{kind}: a resumed run ended with status {status}")
        self.check(kind, output, whole)
        if (names := set(files(output))) != set(whole):
            self.problems.append(f"{kind}: after the end, {output.name} differs in {sorted(names ^ set(whole))}")


def finished(door: Door, output: Path) -> dict[str, bytes]:
    """The files of the pairs that have a record, and their records."""
    result = {}
    for record in door.records(output):
        folder = output if door.name == "process.py" else record.parent
        (pair,) = json.loads(record.read_text())["pairs"]
        for path in (record, *(folder / item["file"] for item in pair["outputs"])):
            result[path.relative_to(output).as_posix()] = path.read_bytes()
    return result


def wait_for(condition: Callable[[], bool], pid: int) -> bool:
    """Until something is so, or the process is no more."""
    while not condition():
        with contextlib.suppress(ProcessLookupError):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return condition()
        time.sleep(0.005)
    return True


def signals(door: Door, number: signal.Signals, times: int, seconds: float, folder: Path, whole: dict[str, bytes], tally: Tally,
            moments: random.Random) -> None:
    """Send a signal at random moments of a run, again and again through its resumptions; a new run when one is through."""
    kind, run = f"{number.name} at a random moment", 0
    output = folder / f"{door.name}-{number.name}-{run}"
    sent = 0
    while sent < times:
        before = finished(door, output) if output.exists() else {}
        pid = door.start(output)
        time.sleep(moments.uniform(0, seconds / PAIRS))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        status = ended(pid)
        if status == 0:  # it was through before the signal
            tally.check_end(kind, status, output, whole)
            run += 1
            output = folder / f"{door.name}-{number.name}-{run}"
            continue
        sent += 1
        tally.count(kind)
        expected = -number if number == signal.SIGKILL else 128 + number
        if status != expected:
            tally.problems.append(f"{kind}: expected status {expected}; got {status}")
        if output.exists():
            tally.check(kind, output, whole, before)
            if number != signal.SIGKILL and any(map(temporary, files(output))):
                tally.problems.append(f"{kind}: a file that was being written was left")
    tally.check_end(kind, door.run(output), output, whole)


def full_disk(door: Door, folder: Path, whole: dict[str, bytes], tally: Tally) -> None:
    """No file may grow beyond a size, from nothing to nearly all; then a file system that is too small."""
    largest = max(map(len, whole.values()))
    output = folder / f"{door.name}-limit"
    for limit in (0, 600, largest // 8, largest // 2, largest - 1):
        before = finished(door, output) if output.exists() else {}
        status = door.run(output, limit=limit)
        tally.count("full disk (no file beyond a size)")
        if status != 5:
            tally.problems.append(f"full disk: expected status 5; got {status} at {limit} bytes")
        if output.exists():
            tally.check("full disk", output, whole, before)
    tally.check_end("full disk", door.run(output), output, whole)
    total = sum(map(len, whole.values()))
    for share in (0.1, 0.5, 0.9):
        with mounted(folder / f"{door.name}-small-{share}", int(share * total)) as small:
            if small is None:
                return
            status = door.run(small / "out")
            tally.count("full disk (small file system)")
            if status != 5:
                tally.problems.append(f"full disk: expected status 5; got {status} at {share:.0%} of the space")
            before = finished(door, small / "out")
            tally.check("full disk", small / "out", whole, before)
            subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
            tally.check_end("full disk", door.run(small / "out"), small / "out", whole)
            tally.check("full disk", small / "out", whole, before)


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[Path | None]:
    """A file system of that many bytes; None where this may not mount one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def read_only(door: Door, folder: Path, whole: dict[str, bytes], tally: Tally) -> None:
    """The output becomes read-only after the first pair; at the next run it still is."""
    with mounted(folder / f"{door.name}-read-only", 2**26) as place:
        if place is None:
            return
        output = place / "out"
        pid = door.start(output)
        wait_for(lambda: bool(door.records(output)), pid)
        while subprocess.run(["mount", "-o", "remount,ro", str(place)], capture_output=True, check=False).returncode:
            time.sleep(0.002)  # while a file is open for writing, the system refuses
        before = finished(door, output)
        for status in (ended(pid), door.run(output)):
            tally.count("output turned read-only")
            if status != 5:
                tally.problems.append(f"read-only: expected status 5; got {status}")
            tally.check("read-only", output, whole, before)
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        tally.check_end("read-only", door.run(output), output, whole)
        tally.check("read-only", output, whole, before)


def vanished(door: Door, folder: Path, whole: dict[str, bytes], tally: Tally) -> None:
    """An input of a pair vanishes after the run began, or after its pair was finished."""
    output = folder / f"{door.name}-vanished"
    for pair in (PAIRS, 1):
        path = door.source / f"imagesTr/Blobs_{pair:04d}_0000.nii.gz"
        before = finished(door, output) if output.exists() else {}
        pid = door.start(output) if pair == PAIRS else 0
        if pid:  # later, the pair would be read already: the next one is read while one is solved
            wait_for(output.exists, pid)
        path.rename(path.with_suffix(".away"))
        status = ended(pid) if pid else door.run(output)
        tally.count("input vanished")
        if status != 3:
            tally.problems.append(f"input vanished: expected status 3; got {status}")
        tally.check("input vanished", output, whole, before)
        path.with_suffix(".away").rename(path)
    tally.check_end("input vanished", door.run(output), output, whole)


def cut_weights(door: Door, folder: Path, whole: dict[str, bytes], tally: Tally) -> None:
    """A checkpoint that was cut short ends a run; what is finished stays and is taken up by the next."""
    output, weights = folder / f"{door.name}-weights", folder / f"{door.name}-checkpoint"
    weights.mkdir()
    (weights / "dinov2_vits14_reg4_pretrain.pth").write_bytes(b"PK\x03\x04" + bytes(5000))
    pid = door.start(output)
    wait_for(lambda: bool(door.records(output)), pid)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    before = finished(door, output)
    status = door.run(output, "--features", "dinov2", "--weights", str(weights))
    tally.count("weights cut short")
    if status != 4:
        tally.problems.append(f"weights cut short: expected status 4; got {status}")
    tally.check("weights cut short", output, whole, before)
    tally.check_end("weights cut short", door.run(output), output, whole)
    tally.check("weights cut short", output, whole, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Break runs for real, resume them, and count what was lost.")
    parser.add_argument("--kills", type=int, default=60, help="of kill -9, over both commands (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--workdir", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args(arguments)
    tally, moments = Tally(), random.Random(options.seed)
    code_sha256()  # kept from here on, for all runs: files may be edited meanwhile
    with tempfile.TemporaryDirectory(dir=options.workdir) as place:
        folder = Path(place)
        make_input(folder / "input")
        for index, name in enumerate(("process.py", "dinoreg register --pairs")):
            door = Door(name, folder / "input")
            folder_of = folder / str(index)
            folder_of.mkdir()
            started = time.monotonic()
            if door.run(folder_of / "whole"):
                print(door.log.read_text(), file=sys.stderr)
                return 1
            seconds = time.monotonic() - started
            whole = files(folder_of / "whole")
            print(f"{name}: {PAIRS} pairs, {len(whole)} files, {seconds:.1f} s when left in peace", flush=True)
            signals(door, signal.SIGKILL, (options.kills + 1 - index) // 2, seconds, folder_of, whole, tally, moments)
            for number in (signal.SIGTERM, signal.SIGINT):
                signals(door, number, max(1, options.kills // 20), seconds, folder_of, whole, tally, moments)
            for fault in (full_disk, read_only, vanished, cut_weights):
                fault(door, folder_of, whole, tally)
    for kind, number in tally.injected.items():
        print(f"{kind}: {number}")
    if not {"output turned read-only", "full disk (small file system)"} <= set(tally.injected):
        print("not injected: read-only output, small file system (only root may mount)")
    print(f"injected {sum(tally.injected.values())} faults; {tally.compared} files were there after them, {tally.kept} of "
          f"finished pairs; {tally.half_written} unfinished ones lay beside under temporary names")
    print("\n".join(tally.problems[:20]))
    print(f"lost, half or different: {len(tally.problems)}")
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
