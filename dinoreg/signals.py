"""Leaving at a signal."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def leave_at_signals() -> None:
    """From now on SIGTERM and SIGINT end the process with status 128 + number and a line that says so. What is being written is
    discarded, finished pairs stay."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)


def _end(number: int, _frame: object) -> NoReturn:
    sys.stderr.write(f"dinoreg: ended by {signal.Signals(number).name}; finished pairs are kept\n")
    sys.exit(128 + number)
