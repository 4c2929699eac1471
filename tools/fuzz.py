"""Give damaged files to everything that reads one, and see that each ends in a clear error or in a result that holds.

    python tools/fuzz.py [--inputs 3000] [--seed 0] [--only KIND] [--keep FOLDER]

The same seed gives the same files. They are read in a process of its own that may take little memory more than it has at the
start; the reader's own traceback, its death, a wait of more than ``SECONDS`` and memory beyond the limit are failures, and so are
a result that does not pass the checks and zeros in place of data. Exit status 1 if there is a failure.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fuzz_cases import KINDS, DefectError, Kind, files_of, pack, unpack  # noqa: E402
from fuzz_mutations import damaged, damaged_tensors  # noqa: E402

from dinoreg.errors import DinoRegError  # noqa: E402

SECONDS = 20.0  # for one file of some kilobytes
MEMORY = 2**30  # bytes that a file of some kilobytes may make a reader take
GOOD = ("refused", "accepted")


@dataclass(frozen=True)
class Outcome:
    """What became of one file: "refused", "accepted", or the kind of failure, and the message."""

    kind: str
    number: int
    result: str
    message: str


def mutation(kind: Kind, files: dict[str, bytes], number: int, seed: int) -> tuple[bytes, bool]:
    """The damaged file of this number, and whether it is the sound one cut short."""
    random = Random(f"{seed}/{kind.name}/{number}")
    content = files[kind.file]
    if kind.layer and random.random() < 0.5:  # behind the compression, so that its checksum says nothing
        header, body = unpack(kind, content)
        body, cut = damaged(body, "", kind.header if kind.layer == "gzip" else 0, random)
        return pack(kind, header, body), cut
    if kind.layer in ("mha", "nrrd") and random.random() < 0.5:
        end = len(unpack(kind, content)[0])
        head, cut = damaged(content[:end], "lines", 0, random)
        return (head, True) if cut else (head + content[end:], False)
    if kind.file.endswith(".safetensors") and random.random() < 0.5:
        return damaged_tensors(content, random), False
    return damaged(content, kind.text, kind.header, random)


def read(kind: Kind, files: dict[str, bytes], content: bytes, cut: bool, folder: Path) -> tuple[str, str]:
    """Result and message of reading a case with this content in place of the sound file."""
    for name, sound in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if name == kind.file else sound)
    try:
        zeros = kind.read(folder)
    except DinoRegError as error:
        text = str(error)
        return ("no message", repr(error)) if len(text) < 20 or "Traceback" in text else ("refused", text)
    except DefectError as error:
        return "wrong result", str(error)
    except MemoryError:
        return "memory", traceback.format_exc(limit=-4)
    except Exception:
        return "traceback", traceback.format_exc(limit=-4)
    if cut and not kind.text and content != files[kind.file]:
        return "truncated and accepted", f"{len(content)} of {len(files[kind.file])} bytes"
    if zeros and zeros > _zeros_in(kind, content):
        return "zeros in place of data", f"{zeros} values are zero"
    return "accepted", ""


def _zeros_in(kind: Kind, content: bytes) -> int:
    """How many values may be zero: as many as there are zero bytes in the file, packed or not."""
    allowed = content.count(0) + 8  # some, for values that rounding or scaling brings to zero
    if kind.layer:
        try:
            allowed += unpack(kind, content)[1].count(0)
        except Exception:
            return allowed
    return allowed


def child(pipe: Connection, kind: Kind, files: dict[str, bytes], numbers: list[int], seed: int, folder: Path) -> None:
    """Read file after file in this process and report each."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # libraries write to the terminal by themselves
    os.dup2(null, 2)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        content, cut = mutation(kind, files, number, seed)
        shutil.rmtree(folder, ignore_errors=True)
        pipe.send((number, *read(kind, files, content, cut, folder)))
    pipe.close()


def fuzz(kind: Kind, numbers: Iterable[int], seed: int) -> Iterator[Outcome]:
    """The outcome of each number; a process that dies or hangs is replaced."""
    files = files_of(kind)
    context = multiprocessing.get_context("fork")
    left = list(numbers)
    with tempfile.TemporaryDirectory() as folder:
        while left:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(theirs, kind, files, left, seed, Path(folder) / "case"))
            process.start()
            theirs.close()
            while left:
                failure = "hang"
                if ours.poll(SECONDS):
                    try:
                        number, result, message = ours.recv()
                        yield Outcome(kind.name, number, result, message)
                        left.remove(number)
                        continue
                    except EOFError:
                        failure = "crash"
                process.kill() if failure == "hang" else process.join()
                yield Outcome(kind.name, left.pop(0), failure, f"exit code {process.exitcode}")
                break
            process.join()
            ours.close()


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fuzz everything that reads a file.")
    parser.add_argument("--inputs", type=int, default=3000, help="files in all, about the same number of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds whose name contains this")
    parser.add_argument("--number", type=int, help="this file of each kind alone")
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if not options.only or options.only in kind.name]
    each = -(-options.inputs // max(1, len(kinds)))
    numbers = range(each) if options.number is None else [options.number]
    totals: Counter[str] = Counter()
    started = time.monotonic()
    for kind in kinds:
        counts: Counter[str] = Counter()
        for outcome in fuzz(kind, numbers if options.number is not None else numbers[:: kind.every], options.seed):
            counts[outcome.result] += 1
            if outcome.result in GOOD and options.number is None:
                continue
            print(f"{outcome.result}: {kind.name} --number {outcome.number} --seed {options.seed}\n  {outcome.message}")
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                content = mutation(kind, files_of(kind), outcome.number, options.seed)[0]
                (options.keep / f"{kind.name}-{outcome.number}-{Path(kind.file).name}").write_bytes(content)
        totals += counts
        print(f"{kind.name:22}" + ", ".join(f"{count} {result}" for result, count in sorted(counts.items())), flush=True)
    failed = totals.total() - sum(totals[result] for result in GOOD)
    print(f"{totals.total()} files of {len(kinds)} kinds in {time.monotonic() - started:.0f} s: {totals['refused']} refused with "
          f"a clear error, {totals['accepted']} accepted and sound, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
