"""Runs that are broken for real lose nothing: the short form of tools/faults.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_nothing_is_lost_half_or_different_after_faults(tmp_path: Path) -> None:
    """Seven kills, three of them of process.py; and each of the other faults, if at all, as often as in the long form."""
    command = [sys.executable, str(ROOT / "tools/faults.py"), "--kills", "7", "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL at a random moment: 7\n" in done.stdout and "lost, half or different: 0\n" in done.stdout
    assert int(re.search(r"(\d+) of finished pairs", done.stdout)[1]) > 0
    assert list(tmp_path.iterdir()) == []
