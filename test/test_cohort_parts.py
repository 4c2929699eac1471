"""Lists in parts and their tables; pairs that overlap in time; how far a list is."""

from __future__ import annotations

import io
import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoreg.cohort import read_pairs, shard_of, shard_range, table_names
from dinoreg.errors import ConfigError, InputError
from dinoreg.progress import _duration, _rate, counted
from dinoreg.run import run_overlapped


@pytest.mark.parametrize(("pairs", "parts"), [(10, 3), (3, 5), (1, 1), (100, 100), (10_000, 7)])
def test_parts_of_a_list_are_neighbours_and_together_the_list(pairs: int, parts: int) -> None:
    ranges = [shard_range(number, parts, pairs) for number in range(1, parts + 1)]
    assert [index for part in ranges for index in part] == list(range(pairs))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_each_part_has_a_table_of_its_own() -> None:
    assert shard_of("3/12") == (3, 12)
    assert table_names(None) == ("results.csv", "results.html")
    assert table_names((3, 12)) == ("results-03-of-12.csv", "results-03-of-12.html")


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "-1/3", "1/3/5", "a/b", "1.0/2"])
def test_no_part_of_a_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="I from 1 to N"):
        shard_of(text)


@pytest.mark.parametrize("name", ["results.csv", "results-3-of-7.html"])
def test_a_pair_may_not_be_called_as_a_table(tmp_path: Path, name: str) -> None:
    (tmp_path / "pairs.csv").write_text(f"fixed,moving,name\na,b,{name}\n")
    with pytest.raises(InputError, match="names that are different"):
        read_pairs(tmp_path / "pairs.csv")


def test_a_long_list_is_read_in_time_proportional_to_its_length(tmp_path: Path) -> None:
    """Comparing each name with each took minutes for 100 000; this takes a second at most, and has ten."""
    (tmp_path / "pairs.csv").write_text("fixed,moving\n" + "a,b\n" * 100_000)
    started = time.process_time()
    assert len(read_pairs(tmp_path / "pairs.csv")) == 100_000
    assert time.process_time() - started < 10


class Pair:
    """Notes when its steps begin and end, and by whom they are taken."""

    def __init__(self, number: int, events: list[tuple[str, int, str]], seconds: float = 0.05) -> None:
        self.number, self.events, self.seconds = number, events, seconds

    def _step(self, name: str) -> None:
        self.events.append((f"{name} begins", self.number, threading.current_thread().name))
        time.sleep(self.seconds)
        self.events.append((f"{name} ends", self.number, threading.current_thread().name))

    def read(self) -> Pair:
        self._step("read")
        return self

    def solve(self) -> Pair:
        self._step("solve")
        return self

    def write(self) -> dict[str, Any]:
        self._step("write")
        return {"name": str(self.number)}


def test_reading_and_writing_go_on_while_a_pair_is_solved() -> None:
    events: list[tuple[str, int, str]] = []
    records = list(run_overlapped(Pair(number, events) for number in range(5)))  # type: ignore[misc]
    assert [record["name"] for record in records] == list("01234")
    order = {(what, number): at for at, (what, number, _) in enumerate(events)}
    for number in range(1, 4):
        assert order["read begins", number + 1] < order["solve ends", number]  # the next one is read meanwhile
        assert order["write begins", number - 1] < order["solve ends", number]  # and the one before is written
        assert order["write ends", number - 1] < order["write begins", number]  # one at a time, in order
        assert order["read begins", number + 1] > order["solve ends", number - 1]  # never more than one waits to be solved
    assert {thread for what, _, thread in events if what.startswith("solve")} == {threading.current_thread().name}


def test_nothing_but_one_pair_works_too() -> None:
    assert list(run_overlapped(iter([]))) == []
    assert [record["name"] for record in run_overlapped(iter([Pair(7, [])]))] == ["7"]  # type: ignore[list-item]


def test_the_log_says_how_fast_pairs_are_done_and_what_is_left(monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    clock = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr("dinoreg.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO, "dinoreg"), counted(182, stream=io.StringIO()) as tell:
        tell("001", False)
        tell("002", True)
    assert [record.getMessage() for record in caplog.records] == [
        "001 done: 1 of 182 pairs, 0 failed, 3 a minute, 60.3 min left",
        "002 failed: 2 of 182 pairs, 1 failed, 3 a minute, 60.0 min left"]


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with counted(2, stream=stream) as tell:
        tell("001", True)
        tell("002", False)
    assert "2/2" in stream.getvalue() and "failed=1" in stream.getvalue() and "pair" in stream.getvalue()


def test_rates_and_times_have_units_that_suit() -> None:
    assert [_rate(seconds) for seconds in (0.1, 20, 600, 7200, 90000)] == \
        ["10 a second", "3 a minute", "6 an hour", "12 a day", "0.96 a day"]
    assert [_duration(seconds) for seconds in (3, 89, 90, 5400, 200_000)] == ["3 s", "89 s", "1.5 min", "1.5 h", "2.3 d"]
