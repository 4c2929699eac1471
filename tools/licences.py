"""Write docs/licences.md: the licence of every package in locks/, as its own metadata says.

``python tools/licences.py`` after ``tools/lock.py``; asks the package index for metadata and installs nothing. ``--check`` only
says which packages of the locks are not listed with their version, or have a licence to be looked at first (exit status 1).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIST = Path("docs") / "licences.md"
WHERE = {"packages.txt": "everywhere", "torch-cpu.txt": "CPU", "torch-cuda12.txt": "image with CUDA"}
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", re.MULTILINE)
ROW = re.compile(r"^\| ([a-z0-9-]+) \| (\d[^ |]*) \| ([^|]+) \|", re.MULTILINE)
LOOKED_AT = {  # whose metadata says nothing, or gives a choice
    "cookiecutter": "BSD-3-Clause (its LICENSE file)",
    "text-unidecode": "Artistic-1.0-Perl (its own choice of two)",
}
STRICT = re.compile(r"\b(?:A?GPL|GNU (?:Affero )?General|SSPL|Commons Clause|non-?commercial|unknown)", re.IGNORECASE)

HEAD = """# Licences of what DINO-Reg runs on

Every package of `locks/`, which is all that `run.sh` and the image install, with the licence that its own metadata names. Made
by `tools/licences.py`; a test fails when a lock has a package that is not listed here, or one whose licence has to be looked at
first (GPL, AGPL, unknown). NVIDIA's libraries are proprietary, under NVIDIA's own terms: read them before you pass an image on.

| package | version | licence | installed |
|---|---|---|---|
"""


def locked(root: Path) -> dict[tuple[str, str], str]:
    """(name, version) of every package of the locks, and where it is installed."""
    found: dict[tuple[str, str], str] = {}
    for file, where in WHERE.items():
        for pin in PIN.findall((root / "locks" / file).read_text(encoding="utf-8")):
            found[pin] = f"{found[pin]}, {where}" if pin in found else where
    return found


def licence(metadata: Mapping[str, Any]) -> str:
    """What a package says of its licence, on one line: the expression, else the classifiers, else the first line of the text."""
    classifiers = [text.rsplit(" :: ", 1)[-1] for text in metadata.get("classifier", []) if text.startswith("License :: ")]
    classifiers = [text for text in classifiers if text != "OSI Approved"]
    text = str(metadata.get("license") or "").strip().split("\n")[0]
    return str(metadata.get("license_expression") or ", ".join(classifiers) or text[:80] or "unknown").replace("|", "/")


def problems(root: Path) -> list[str]:
    """What is missing in the list, or has to be looked at, in words."""
    listed = {(name, version): text.strip() for name, version, text in ROW.findall((root / LIST).read_text(encoding="utf-8"))}
    missing = [f"{name} {version} is not listed" for name, version in locked(root) if (name, version) not in listed]
    gone = [f"{name} {version} is listed, but in no lock" for name, version in listed if (name, version) not in locked(root)]
    return missing + gone + [f"{name}: look at its licence ({text})" for (name, _), text in listed.items() if STRICT.search(text)]


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write or check the list of licences.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        pins, metadata = locked(ROOT), {}
        for file in WHERE:  # one resolution a lock: torch is in two
            names = [f"{name}=={version}" for name, version in PIN.findall((ROOT / "locks" / file).read_text(encoding="utf-8"))]
            command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet",
                       "--disable-pip-version-check", "--report", "-", *names]
            report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for item in report["install"]:
                known = item["metadata"]
                version = known["version"].split("+")[0]  # 2.13.0+cpu
                name = re.sub(r"[-_.]+", "-", known["name"]).lower()
                metadata[name, version] = LOOKED_AT.get(name) or licence(known)
        rows = [f"| {name} | {version} | {metadata[name, version]} | {where} |\n"
                for (name, version), where in sorted(pins.items())]
        (ROOT / LIST).write_text(HEAD + "".join(rows), encoding="utf-8")
        print(f"{LIST}: {len(rows)} packages")
    found = problems(ROOT)
    print("\n".join(found or ["every package of the locks is listed"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
