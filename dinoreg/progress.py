"""How far a run is, on a terminal: one bar a stage."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from dinoreg.stages import watched


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
