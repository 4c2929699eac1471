"""How far a run is: on a terminal one bar a stage, or one for all pairs of a list; elsewhere a line a pair."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dinoreg.stages import watched

log = logging.getLogger(__name__)


class Bars:
    """A bar for the present stage; call it as :data:`dinoreg.stages.Progress`. Finished bars stay, with their time."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.bar: tqdm | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done == 0:  # a stage begins
            self.close()
            self.bar = tqdm(total=total, desc=f"{stage:<10}", file=self.stream,
                            bar_format="{desc} {bar:30} {elapsed}<{remaining}")
        if self.bar is not None:
            self.bar.total, self.bar.n = total, done
            self.bar.refresh()
            if done >= total:
                self.close()

    def close(self) -> None:
        """Leave the present bar as it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@contextmanager
def shown(stream: TextIO | None = None) -> Iterator[None]:
    """Show the stages within as bars if ``stream`` (standard error if not given) is a terminal; elsewhere they are told by a line
    each in the log."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield
        return
    bars, lines = Bars(stream), logging.getLogger("dinoreg.stages")
    before = lines.level
    lines.setLevel(logging.WARNING)  # a bar says it already
    try:
        with watched(bars):
            yield
    finally:
        bars.close()
        lines.setLevel(before)


@contextmanager
def counted(total: int, unit: str = "pair", stream: TextIO | None = None) -> Iterator[Callable[[str, bool], None]]:
    """Show how many pairs of a list are done, how fast that goes and how long the rest will take.

    Args:
        total: pairs (or whatever ``unit`` says) to be done.
        stream: standard error if not given; on a terminal a bar that stays below the log, elsewhere a line in the log a pair.

    Returns:
        To be called with the name of each pair that is done, and whether it failed.
    """
    stream = stream or sys.stderr
    started, done, failed = time.monotonic(), 0, 0

    def tell(name: str, wrong: bool) -> None:
        nonlocal done, failed
        done, failed = done + 1, failed + wrong
        if bar is not None:
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()
            return
        each = (time.monotonic() - started) / done
        log.info("%s %s: %d of %d %ss, %d failed, %s, %s left", name, "failed" if wrong else "done", done, total, unit,
                 failed, _rate(each), _duration(each * (total - done)))

    bar = tqdm(total=total, unit=unit, file=stream, dynamic_ncols=True) if stream.isatty() else None
    if bar is None:
        yield tell
        return
    with logging_redirect_tqdm(), bar:
        yield tell


def _rate(seconds: float) -> str:
    """How many in a time in which there is at least one."""
    for unit, length in (("a second", 1), ("a minute", 60), ("an hour", 3600)):
        if seconds <= length:
            return f"{length / max(seconds, 1e-3):.3g} {unit}"
    return f"{86400 / seconds:.3g} a day"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
