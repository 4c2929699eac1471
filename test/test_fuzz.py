"""Damaged files of every kind end in a clear error or in a result that holds; see tools/fuzz.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from fuzz import mutation, read  # noqa: E402
from fuzz_cases import KINDS, DefectError, Kind, files_of  # noqa: E402

from dinoreg.errors import InputError  # noqa: E402


@pytest.mark.parametrize("inputs", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_end_in_a_clear_error_or_a_sound_result(inputs: int) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools/fuzz.py"), "--inputs", str(inputs), "--seed", str(inputs)],
                          capture_output=True, text=True, check=False)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    tried, refused, accepted, failed = map(int, re.fullmatch(
        r"(\d+) files of \d+ kinds in \d+ s: (\d+) refused .*, (\d+) accepted .*, (\d+) failures", last).groups())
    assert tried >= 0.9 * inputs and tried == refused + accepted and failed == 0
    assert refused > tried / 4 and accepted > tried / 10  # the damage is neither always nor never fatal


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_is_sound_before_it_is_damaged_and_the_seed_decides_how(kind: Kind, tmp_path: Path) -> None:
    files = files_of(kind)
    assert read(kind, files, files[kind.file], False, tmp_path / "case") == ("accepted", "")
    assert mutation(kind, files, 3, 0) == mutation(kind, files, 3, 0)
    assert len({mutation(kind, files, number, seed)[0] for number in range(4) for seed in range(4)}) > 8


def _raises(error: Exception) -> Kind:
    def call(folder: Path) -> int:
        raise error

    return Kind("a", "a", lambda folder: None, call)


@pytest.mark.parametrize(("kind", "result"), [
    (_raises(InputError("a: expected this; got that; do something")), "refused"), (_raises(InputError("")), "no message"),
    (_raises(DefectError("")), "wrong result"), (_raises(MemoryError()), "memory"), (_raises(ValueError()), "traceback"),
    (Kind("a", "a", lambda folder: None, lambda folder: 100), "zeros in place of data"),
    (Kind("a", "a", lambda folder: None, lambda folder: 0), "accepted"),
])
def test_what_fails_is_told_apart(kind: Kind, result: str, tmp_path: Path) -> None:
    assert read(kind, {"a": b"sound"}, Random(0).randbytes(4), False, tmp_path)[0] == result


def test_a_cut_file_that_is_accepted_is_a_failure(tmp_path: Path) -> None:
    kind = Kind("a", "a", lambda folder: None, lambda folder: 0)
    assert read(kind, {"a": b"sound"}, b"sou", True, tmp_path)[0] == "truncated and accepted"
