"""Say what a build would take as it comes instead of as it was tested: ``build.sh --check`` calls this.

One line for each thing that is not pinned, on stdout. Exit status 0: all is pinned; 1: something is not.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==(\S+)")


def normal(name: str) -> str:
    """The name of a package as the lock files write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def entries(lock: Path) -> list[str]:
    """The entries of a lock file, each with its hashes."""
    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return re.split(r"\n(?=\S)", "\n".join(lines)) if lines else []


def unpinned(root: Path, base: str) -> list[str]:
    """What is not pinned, in words, for the repository in ``root`` and a base image."""
    problems = []
    if not re.search(r"@sha256:[0-9a-f]{64}$", base):
        problems.append(f"base image {base}: no digest (NAME@sha256:...)")
    locked: dict[str, str] = {}
    for lock in sorted((root / "locks").glob("*.txt")):
        for entry in entries(lock):
            pin = PIN.match(entry)
            if pin is None:
                problems.append(f"locks/{lock.name}: {entry.splitlines()[0]}: no version (NAME==VERSION)")
                continue
            if not re.search(r"--hash=sha256:[0-9a-f]{64}", entry):
                problems.append(f"locks/{lock.name}: {pin[0]}: no sha256")
            if lock.name == "packages.txt":
                locked[normal(pin[1])] = pin[2]
    for name in ("requirements.txt", "requirements-test.txt"):
        for line in (root / name).read_text(encoding="utf-8").splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            pin = PIN.fullmatch(line.strip())
            if pin is None:
                problems.append(f"{name}: {line.strip()}: no version (NAME==VERSION)")
            elif name == "requirements.txt" and normal(pin[1]) != "torch" and locked.get(normal(pin[1])) != pin[2]:
                found = locked.get(normal(pin[1]), "nothing")
                problems.append(f"locks/packages.txt: {pin[1]} is {found}, requirements.txt has {pin[2]}; run tools/lock.py")
    return problems


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Say what a build of the image would not pin.")
    parser.add_argument("--base", required=True, help="base image of the build")
    problems = unpinned(ROOT, parser.parse_args().base)
    for problem in problems:
        print(f"not pinned: {problem}")
    print("note: python3 comes from the base image, or from its distribution on the day of the build where the base has none")
    print(f"{len(problems)} not pinned" if problems else "all packages and the base image are pinned by version and sha256")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
