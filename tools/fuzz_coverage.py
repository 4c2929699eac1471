"""Coverage-guided fuzzing of everything that reads a file: what reaches a new line of dinoreg is kept and damaged further.

    pip install atheris
    python tools/fuzz_coverage.py [--seconds 120] [--only KIND] [--corpus FOLDER]

Kinds of files, readers and checks are those of tools/fuzz.py. The first failure ends the run with exit status 1 and the name of a
file that holds it; ``--repeat FILE`` reads that again. Atheris is no dependency of anything else here.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


def work(kinds: str, folder: Path, arguments: list[str]) -> None:
    """Fuzz in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["dinoreg"]):
        from fuzz import GOOD, read
        from fuzz_cases import KINDS, files_of
    chosen = [kind for kind in KINDS if kinds in kind.name and kind.every == 1]
    sound = [files_of(kind) for kind in chosen]
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)

    def one(data: bytes) -> None:
        number = data[0] % len(chosen) if data else 0
        kind, files = chosen[number], sound[number]
        shutil.rmtree(folder / "case", ignore_errors=True)
        result, message = read(kind, files, data[1:], False, folder / "case")
        if result not in GOOD and not (result == "zeros in place of data" and len(data) < 100):
            raise RuntimeError(f"{kind.name}: {result}: {message}")

    for number, (kind, files) in enumerate(zip(chosen, sound, strict=True)):
        (folder / "corpus" / f"sound-{number}").write_bytes(bytes([number]) + files[kind.file])
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Coverage-guided fuzzing, for a bounded time.")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="folder that keeps what was found worth keeping, and failures")
    parser.add_argument("--repeat", type=Path, help="read this one file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.worker:
        work(options.only, options.worker, rest)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.corpus or Path(temporary)
        (folder / "corpus").mkdir(parents=True, exist_ok=True)
        flags = [str(options.repeat)] if options.repeat else [
            str(folder / "corpus"), f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-max_len=6000", "-timeout=20",
            "-rss_limit_mb=4096", f"-artifact_prefix={folder}/failure-", "-print_final_stats=1"]
        done = subprocess.run([sys.executable, __file__, "--worker", str(folder), "--only", options.only, *flags], check=False,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, errors="replace")
        kept = len(list((folder / "corpus").iterdir()))
        lines = done.stderr.splitlines()
        failures = list(folder.glob("failure-*"))
        for path in failures:
            shutil.copy(path, Path(tempfile.gettempdir()) / path.name)
            print(f"failure: {Path(tempfile.gettempdir()) / path.name}")
        if done.returncode:
            print("\n".join(line for line in lines[-60:] if not line.startswith("#")))
        tried = next((line.split()[-1] for line in lines if "number_of_executed_units" in line), "?")
        last = next((line for line in reversed(lines) if " cov: " in line), "")
        print(f"{tried} files in at most {options.seconds} s, {kept} kept, {len(failures)} failures; {last}")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
