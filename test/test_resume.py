"""``--resume``: a pair is left alone only if its record and its results say that it would come out the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_pair import QUICK, small_pair
from test_process import StubRegistrar, _dataset, _files, _report, _single

import process
from dinoreg import completion, htmlreport, qc, run
from dinoreg.__main__ import main
from dinoreg.config import PRESETS
from dinoreg.errors import RegistrationError
from dinoreg.io import write_text, write_volume

PAIR = "0001_0001_0001_0000"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("DINOREG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(PRESETS, "generic", QUICK)
    monkeypatch.setattr(qc, "write_qc", lambda path, *_, **__: write_text(path, "picture"))  # seconds less
    monkeypatch.setattr(htmlreport, "write_html_report", lambda path, *_, **__: write_text(path, "page"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _run(folder: Path, *options: str, registrar: StubRegistrar | None = None) -> int:
    """The status of a run from ``in`` to ``out``."""
    arguments = ["--input", str(folder / "in"), "--output", str(folder / "out"), *options]
    return process.main(arguments, registrar_factory=registrar or StubRegistrar())


def _resumed(folder: Path, *options: str, registrar: StubRegistrar | None = None) -> int:
    """How many pairs a resumed run registered."""
    registrar = registrar or StubRegistrar()
    assert _run(folder, "--resume", *options, registrar=registrar) == 0
    return len(registrar.calls)


def _bytes(folder: Path) -> dict[str, bytes]:
    """All results; reports hold seconds."""
    return {name: (folder / name).read_bytes() for name in _files(folder) if not name.endswith((".json", ".csv", ".html"))}


def test_a_run_that_was_cut_off_is_completed_with_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    _dataset(tmp_path / "in", 3)
    assert _run(tmp_path) == 0
    whole = _bytes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    with pytest.raises(SystemExit):
        _run(tmp_path, registrar=StubRegistrar({1: SystemExit(143)}))
    assert not (tmp_path / "out/report.json").exists()
    record = tmp_path / f"out/records/{PAIR}.json"
    before = record.read_bytes()
    assert _resumed(tmp_path) == 2
    assert _bytes(tmp_path / "out") == whole and record.read_bytes() == before
    report = _report(tmp_path / "out")
    assert [pair.get("resumed", False) for pair in report["pairs"]] == [True, False, False]
    assert (report["status"], report["pairs_registered"], report["pairs_resumed"]) == ("complete", 3, 1)
    assert _resumed(tmp_path) == 0


def test_a_pair_that_failed_is_done_again(tmp_path: Path) -> None:
    _dataset(tmp_path / "in", 2)
    assert _run(tmp_path, registrar=StubRegistrar({0: RegistrationError("no match")})) == 6
    assert _resumed(tmp_path) == 1


def _other_input(folder: Path) -> None:
    path = folder / "in/imagesTr/Task_0001_0000.nii.gz"
    path.write_bytes((folder / "in/imagesTr/Task_0002_0000.nii.gz").read_bytes())


def _new_mask(folder: Path) -> None:
    (folder / "in/masksTr").mkdir()
    (folder / "in/masksTr/Task_0001_0000.nii.gz").write_bytes((folder / "in/imagesTr/Task_0001_0000.nii.gz").read_bytes())


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _no_made_from(path: Path) -> None:
    content = json.loads(path.read_text())
    del content["pairs"][0]["made_from"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("spoil", [
    _other_input, _new_mask,
    lambda folder: _flip(folder / f"out/disp_{PAIR}.nii.gz"),
    lambda folder: (folder / f"out/warped/warped_{PAIR}.nii.gz").unlink(),
    lambda folder: (folder / f"out/qc/{PAIR}.png").write_text("cut"),
    lambda folder: (folder / f"out/records/{PAIR}.json").unlink(),
    lambda folder: (folder / f"out/records/{PAIR}.json").write_text("[]"),
    lambda folder: os.truncate(folder / f"out/records/{PAIR}.json", 1000),
    lambda folder: _no_made_from(folder / f"out/records/{PAIR}.json"),
], ids=["another input", "a mask", "another field", "no warped image", "half a picture", "no record", "no report",
        "half a record", "record of an older version"])
def test_a_result_that_is_not_what_its_record_says_is_made_again_and_no_other(tmp_path: Path,
                                                                              spoil: Callable[[Path], None]) -> None:
    _dataset(tmp_path / "in", 2)
    assert _run(tmp_path) == 0
    spoil(tmp_path)
    assert _resumed(tmp_path) == 1
    assert _resumed(tmp_path) == 0


@pytest.mark.parametrize("change", ["preset", "features", "weights", "device", "code", "packages"])
def test_a_result_of_another_configuration_engine_or_program_is_made_again(tmp_path: Path, change: str,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    _dataset(tmp_path / "in", 2)
    first, second, options = StubRegistrar(), StubRegistrar(), []
    if change in ("preset", "features"):
        options = [f"--{change}", {"preset": "brain-mr", "features": "mind"}[change]]
    elif change in ("weights", "device"):
        second.engine = second.engine | {"device": "cuda"} if change == "device" else second.engine | {"encoder_sha256": "1"}
    assert _run(tmp_path, registrar=first) == 0
    if change in ("code", "packages"):
        now = completion.environment() | {change: {"torch": "0"} if change == "packages" else "other"}
        monkeypatch.setattr(completion, "environment", lambda: now)
    assert _resumed(tmp_path, *options, registrar=second) == 2


def test_times_names_threads_and_the_place_of_the_data_play_no_part(tmp_path: Path) -> None:
    _dataset(tmp_path / "in", 2)
    assert _run(tmp_path) == 0
    for path in (tmp_path / "in").rglob("*.nii.gz"):
        os.utime(path, (1, 1))
    (tmp_path / "in").rename(tmp_path / "moved")
    (tmp_path / "in").symlink_to(tmp_path / "moved")
    assert _resumed(tmp_path, "--threads", "2", "--device", "cpu") == 0


def test_a_finished_pair_whose_input_is_gone_fails_and_keeps_its_results(tmp_path: Path) -> None:
    _dataset(tmp_path / "in", 2)
    assert _run(tmp_path) == 0
    before, record = _bytes(tmp_path / "out"), (tmp_path / f"out/records/{PAIR}.json").read_bytes()
    path = tmp_path / "in/imagesTr/Task_0001_0000.nii.gz"
    path.rename(tmp_path / "away")
    registrar = StubRegistrar()
    assert _run(tmp_path, "--resume", registrar=registrar) == 3 and registrar.calls == []
    assert "no such file" in _report(tmp_path / "out")["pairs"][0]["error"]["message"]
    assert _bytes(tmp_path / "out") == before and (tmp_path / f"out/records/{PAIR}.json").read_bytes() == record
    (tmp_path / "away").rename(path)
    assert _resumed(tmp_path) == 0


def test_an_input_that_changes_while_it_is_read_fails_its_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _dataset(tmp_path / "in", 2)
    load = run.load_case

    def load_and_lose(case: Any, expected: Any) -> Any:
        images = load(case, expected)
        if case.name == PAIR:
            _other_input(tmp_path)
        return images

    monkeypatch.setattr(run, "load_case", load_and_lose)
    assert _run(tmp_path) == 3
    pairs = _report(tmp_path / "out")["pairs"]
    assert "changed while it was read" in pairs[0]["error"]["message"] and "error" not in pairs[1]


def test_what_interrupted_writes_left_is_removed_by_the_next_run_and_nothing_else(tmp_path: Path) -> None:
    _dataset(tmp_path / "in")
    for name in (f".12-disp_{PAIR}.nii.gz", "warped/.7-warped_" + PAIR + ".nii.gz", f"qc/.1-{PAIR}.png",
                 f"records/.9-{PAIR}.json", ".3-report.json", ".4-disp_0009_0001_0009_0000.nii.gz", "notes.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("half")
    assert _resumed(tmp_path) == 1
    left = [name for name in _files(tmp_path / "out") if (tmp_path / "out" / name).read_bytes() == b"half"]
    assert left == [".4-disp_0009_0001_0009_0000.nii.gz", "notes.txt"]  # of another pair, which another run may be writing


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_results_that_are_not_of_this_run_are_gone_before_the_first_pair_is_registered(tmp_path: Path,
                                                                                       options: tuple[str, ...]) -> None:
    _dataset(tmp_path / "in", 2)
    assert _run(tmp_path) == 0
    with pytest.raises(SystemExit):
        _run(tmp_path, "--preset", "brain-mr", *options, registrar=StubRegistrar({0: SystemExit(143)}))
    assert _files(tmp_path / "out") == []


def test_a_record_is_no_reason_to_read_outside_of_its_folder(tmp_path: Path) -> None:
    _dataset(tmp_path / "in")
    assert _run(tmp_path) == 0
    (tmp_path / "secret").write_bytes((tmp_path / f"out/disp_{PAIR}.nii.gz").read_bytes())
    path = tmp_path / f"out/records/{PAIR}.json"
    path.write_text(path.read_text().replace(f'"file": "disp_{PAIR}.nii.gz"', '"file": "../secret"'))
    assert _resumed(tmp_path) == 1


def test_a_pair_that_is_listed_twice_keeps_the_record_of_the_first(tmp_path: Path) -> None:
    source = _dataset(tmp_path / "in")
    content = json.loads((source / "Task_dataset.json").read_text())
    content["registration_val"] *= 2
    (source / "Task_dataset.json").write_text(json.dumps(content))
    for options in ((), ("--resume",)):
        registrar = StubRegistrar()
        assert _run(tmp_path, *options, registrar=registrar) == 3
        assert len(registrar.calls) == (0 if options else 1)
        assert [("error" in pair) for pair in _report(tmp_path / "out")["pairs"]] == [False, True]


def test_a_single_pair_is_resumed_by_its_report(tmp_path: Path) -> None:
    _single(tmp_path / "in")
    assert _run(tmp_path) == 0
    assert _resumed(tmp_path) == 0
    assert _files(tmp_path / "out") == ["images/displacement-field/displacement-field.mha", "report.json"]
    assert _resumed(tmp_path, "--vector-field") == 1
    assert _resumed(tmp_path, "--vector-field") == 0


def test_an_image_under_the_name_of_a_result_is_refused_and_stays(tmp_path: Path) -> None:
    source = _dataset(tmp_path / "in")
    name = f"warped/warped_{PAIR}.nii.gz"
    (source / "warped").mkdir()
    (source / "imagesTr/Task_0001_0000.nii.gz").rename(source / name)
    content = {"name": "Task", "registration_val": [{"fixed": "imagesTr/Task_0001_0001.nii.gz", "moving": name}]}
    (source / "Task_dataset.json").write_text(json.dumps(content))
    before = (source / name).read_bytes()
    arguments = ["--input", str(source), "--output", str(source)]
    assert process.main(arguments, registrar_factory=StubRegistrar()) == 2
    assert (source / name).read_bytes() == before


def test_resume_can_be_asked_for_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _dataset(tmp_path / "in")
    assert _run(tmp_path) == 0
    monkeypatch.setenv("DINOREG_RESUME", "1")
    registrar = StubRegistrar()
    assert _run(tmp_path, registrar=registrar) == 0 and registrar.calls == []


# ---- lists of pairs


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """The command for a list of two pairs, one of them the other way round."""
    for name, volume in zip("ab", small_pair(), strict=True):
        write_volume(tmp_path / f"{name}.nii.gz", volume)
    (tmp_path / "pairs.csv").write_text("fixed,moving,name\na.nii.gz,b.nii.gz,there\nb.nii.gz,a.nii.gz,back\n")
    return ["register", "--pairs", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "out"), "--threads", "1"]


def _statuses(folder: Path) -> list[str]:
    return [line.split(",")[1] for line in (folder / "results.csv").read_text().splitlines()[1:]]


def test_a_list_is_completed_with_the_same_bytes(pairs: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(pairs) == 0
    whole, report = _bytes(tmp_path / "out"), (tmp_path / "out/there/report.json").read_bytes()
    (tmp_path / "out/back/report.json").unlink()
    (tmp_path / "out/back/.99-transform.h5").write_text("half")
    (tmp_path / "out/results.csv").unlink()
    caplog.clear()
    assert main([*pairs, "--resume"]) == 0
    assert "resume: 1 of 2 pairs are done already" in caplog.messages and "back: to be done: it has no record" in caplog.messages
    assert _bytes(tmp_path / "out") == whole and (tmp_path / "out/there/report.json").read_bytes() == report
    assert _statuses(tmp_path / "out") == ["complete", "complete"]


def test_a_list_with_another_option_is_done_again_and_a_lost_image_costs_no_result(pairs: list[str], tmp_path: Path,
                                                                                   caplog: pytest.LogCaptureFixture) -> None:
    assert main(pairs) == 0
    assert main([*pairs, "--resume", "--confidence"]) == 0
    assert (tmp_path / "out/there/confidence.nii.gz").exists()
    before = _bytes(tmp_path / "out")
    (tmp_path / "b.nii.gz").rename(tmp_path / "away")
    assert main([*pairs, "--resume", "--confidence"]) == 3
    assert _bytes(tmp_path / "out") == before and _statuses(tmp_path / "out") == ["failed", "failed"]
    (tmp_path / "away").rename(tmp_path / "b.nii.gz")
    caplog.clear()
    assert main([*pairs, "--resume", "--confidence"]) == 0
    assert "resume: 2 of 2 pairs are done already" in caplog.messages


def test_the_list_itself_is_never_taken_for_an_old_table(pairs: list[str], tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").rename(tmp_path / "results.csv")
    text = (tmp_path / "results.csv").read_text()
    assert main(["register", "--pairs", str(tmp_path / "results.csv"), "-o", str(tmp_path)]) == 2
    assert (tmp_path / "results.csv").read_text() == text
