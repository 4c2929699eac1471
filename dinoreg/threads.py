"""How threads wait for one another."""

from __future__ import annotations

import os


def sleep_while_waiting() -> None:
    """Let threads, of this process and of those that it starts, sleep while they wait for one another, unless the environment
    says something else.

    Spinning, which is OpenMP's way otherwise, makes two threads on a shared processor up to ten times slower than one. OpenMP
    looks when torch is loaded: afterwards this has no effect.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
