"""Every package that is installed has its licence in docs/licences.md."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("licences", ROOT / "tools/licences.py")
assert _spec is not None and _spec.loader is not None
licences = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(licences)


def test_every_package_of_the_locks_is_listed_with_its_version() -> None:
    assert licences.problems(ROOT) == []
    assert len(licences.locked(ROOT)) > 70  # the packages are found at all


def _new_package(root: Path) -> None:
    with (root / "locks/packages.txt").open("a") as lock:
        lock.write("leftpad==1.0 \\\n    --hash=sha256:00\n")


def _replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(("change", "problem"), [
    (_new_package, "leftpad 1.0 is not listed"),
    (_replace("locks/packages.txt", "numpy==2.2.6", "numpy==2.2.7"), "numpy 2.2.7 is not listed"),
    (_replace("locks/packages.txt", "numpy==2.2.6", "numpy==2.2.7"), "numpy 2.2.6 is listed, but in no lock"),
    (_replace("docs/licences.md", "| h5py | 3.16.0 | BSD-3-Clause |", "| h5py | 3.16.0 | GPL-3.0-or-later |"), "h5py: look at"),
    (_replace("docs/licences.md", "| h5py | 3.16.0 | BSD-3-Clause |", "| h5py | 3.16.0 | unknown |"), "h5py: look at"),
], ids=["new", "other version", "gone", "GPL", "unknown"])
def test_what_is_not_listed_or_not_free_is_named(tmp_path: Path, change: Callable[[Path], None], problem: str) -> None:
    shutil.copytree(ROOT / "locks", tmp_path / "locks")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/licences.md", tmp_path / "docs")
    change(tmp_path)
    assert any(found.startswith(problem) for found in licences.problems(tmp_path))


@pytest.mark.parametrize(("metadata", "expected"), [
    ({"license_expression": "MIT", "license": "x"}, "MIT"),
    ({"classifier": ["License :: OSI Approved :: BSD License"], "license": "Copyright ..."}, "BSD License"),
    ({"license": "Apache 2.0\nmore"}, "Apache 2.0"), ({}, "unknown"),
])
def test_licence_is_what_the_metadata_says(metadata: dict[str, object], expected: str) -> None:
    assert licences.licence(metadata) == expected
