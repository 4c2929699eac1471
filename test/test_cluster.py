"""Lists of pairs on Dask: real schedulers, workers and clients as processes of their own, killed at will; the same bytes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_encoder import PatchMeans, affine
from small_pair import QUICK, SHIFT_MM, scan, small_pair

from dinoreg.config import EncoderConfig, PcaConfig, get_preset
from dinoreg.io import read_json, read_volume, write_volume
from dinoreg.plan import Pair, plan
from dinoreg.volume import Volume

pytest.importorskip("distributed", reason="needs the extra `cluster`: pip install 'dask[distributed]'")

# What every process of these tests loads first: the quick configuration, an encoder that needs no weights, no pictures, and a
# note of each encoding, so that they can be counted over all processes.
STUB = """
import os, pathlib, sys, time
sys.path.insert(0, {test!r})
from fake_encoder import PatchMeans
from small_pair import QUICK
from dataclasses import replace
from dinoreg import config, encoding, htmlreport, qc, registration
from dinoreg.io import write_text

features = replace(QUICK, features="dinov2", pca=config.PcaConfig(components=1), encoder=config.EncoderConfig(long_side_tokens=8))
config.PRESETS["generic"] = features
config.PRESETS["brain-mr"] = replace(QUICK, preset="brain-mr")
registration.load_encoder = lambda *_, **__: PatchMeans()
encode = registration.encode_volume

def counted(*arguments, **options):
    pathlib.Path({notes!r}, f"{{time.time_ns()}}-{{os.getpid()}}").touch()
    return encode(*arguments, **options)

registration.encode_volume = counted
solve = registration.Registrar.register

def slow(*arguments, **options):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return solve(*arguments, **options)

registration.Registrar.register = slow
qc.write_qc = lambda path, *_, **__: write_text(path, "picture")
htmlreport.write_html_report = lambda path, *_, **__: write_text(path, "page")
"""


class Lab:
    """A folder with images and a list of pairs, and the processes of a test."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self.folder, self.processes = folder, []  # type: ignore[var-annotated]
        fixed, moving = small_pair()
        write_volume(folder / "atlas.nii.gz", fixed)
        rows = ["fixed,moving"]
        for number in range(pairs):
            noise = np.random.default_rng(number).integers(0, 9, moving.shape)
            write_volume(folder / f"scan{number}.nii.gz", Volume((moving.array + noise).astype(np.int16), moving.affine))
            rows.append(f"atlas.nii.gz,scan{number}.nii.gz")
        (folder / "pairs.csv").write_text("\n".join(rows))
        (folder / "notes").mkdir()
        test = Path(__file__).parent
        (folder / "stub.py").write_text(STUB.format(test=str(test), notes=str(folder / "notes")))
        self.environment = {**os.environ, "PYTHONPATH": f"{test.parent}:{folder}", "OMP_NUM_THREADS": "1",
                            "OMP_WAIT_POLICY": "PASSIVE", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "60s",
                            "DASK_TEMPORARY_DIRECTORY": str(folder / "scratch")}

    def start(self, *arguments: str, slow: float = 0) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, *arguments], env=self.environment | {"SLOW": str(slow)}, cwd=self.folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        self.processes.append(process)
        return process

    def scheduler(self) -> str:
        process = self.start("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                             "--scheduler-file", str(self.folder / "scheduler.json"))
        wait(lambda: (self.folder / "scheduler.json").exists() or process.poll() is not None, 60)
        return str(read_json(self.folder / "scheduler.json")["address"])

    def worker(self, address: str, slow: float = 0) -> subprocess.Popen[str]:
        return self.start("-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny",
                          "--memory-limit", "0", "--preload", "stub", slow=slow)

    def client(self, out: str, *options: str) -> subprocess.Popen[str]:
        code = "import stub, sys; from dinoreg.__main__ import main; sys.exit(main(sys.argv[1:]))"
        return self.start("-c", code, "register", "--pairs", "pairs.csv", "-o", out, "--preset", "generic", "--initial-transform",
                          "none", *options)

    def done(self, out: str) -> int:
        return len(list((self.folder / out).glob("*/report.json")))

    def encodings(self) -> int:
        return len(list((self.folder / "notes").iterdir()))

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    found = Lab(tmp_path, getattr(request, "param", 4))
    yield found
    found.stop()


def wait(until: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def finished(process: subprocess.Popen[str], seconds: float = 200) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def same_bytes(one: Path, other: Path) -> None:
    """Every result of every pair; reports hold seconds."""
    names = [{str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} for root in (one, other)]
    assert names[0] == names[1] and len(names[0]) > 20
    for name in names[0]:
        if not name.endswith((".json", ".csv", "results.html")):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("lab", [6], indirect=True)
def test_every_pair_is_done_once_whatever_dies_or_comes_late(lab: Lab) -> None:
    """A worker is killed in the middle of a pair, another comes late, then the client is killed and started again."""
    finished(lab.client("alone", "--cache", "cache-alone"))
    assert lab.encodings() == 7
    address = lab.scheduler()
    options = ("--scheduler", address, "--cache", "cache", "--resume")
    first = lab.worker(address, slow=1.5)
    client = lab.client("out", *options)
    wait(lambda: lab.done("out") == 1, 120)
    late = lab.worker(address, slow=1.5)
    time.sleep(0.7)  # into the next pair
    os.kill(first.pid, signal.SIGKILL)
    wait(lambda: lab.done("out") >= 3, 120)
    os.killpg(client.pid, signal.SIGKILL)
    assert late.poll() is None
    before = {path: path.stat().st_mtime_ns for path in (lab.folder / "out").glob("*/report.json")}
    assert len(before) < 6
    output = finished(lab.client("out", *options))
    assert re.search(r"resume: [3-5] of 6 pairs are done already", output)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())  # and were left alone
    same_bytes(lab.folder / "alone", lab.folder / "out")
    records = [read_json(path)["pairs"][0] for path in sorted((lab.folder / "out").glob("*/report.json"))]
    assert [record.get("error") for record in records] == [None] * 6
    assert len(list((lab.folder / "cache").iterdir())) == 7
    assert 7 <= lab.encodings() - 7 <= 8  # once each, but for one that the killed worker was at
    assert not [path for path in (lab.folder / "out").rglob(".*")]


@pytest.mark.slow
def test_an_atlas_is_encoded_once_for_all_workers(lab: Lab) -> None:
    address = lab.scheduler()
    for _ in range(2):
        lab.worker(address)
    output = finished(lab.client("out", "--scheduler", address, "--cache", "cache"))
    assert "4 of 4 pairs, 0 failed" in output
    assert lab.encodings() == 5 and len(list((lab.folder / "cache").iterdir())) == 5


def test_a_worker_of_another_program_does_nothing(lab: Lab) -> None:
    from dinoreg import cluster
    from dinoreg.jobs import Case
    from dinoreg.work import Order, worker

    order = Order(QUICK, device="cpu")
    case = Case("1", lab.folder / "atlas.nii.gz", lab.folder / "scan0.nii.gz", None, None, ("", ""), (), None, None, False)
    record = cluster._register(order, worker(order).shared | {"program": "other"}, case, lab.folder / "out")
    assert record["error"]["exit_code"] == 2 and "expected the program of the first worker" in record["error"]["message"]
    assert not (lab.folder / "out").exists()


@pytest.mark.parametrize("initial", [None, "auto", tuple(map(tuple, np.eye(4).tolist()))])
def test_a_volume_is_encoded_for_its_pairs_whatever_they_start_from(lab: Lab, monkeypatch: pytest.MonkeyPatch,
                                                                    initial: str | tuple[tuple[float, ...], ...] | None) -> None:
    from dinoreg import cluster, registration
    from dinoreg.jobs import Case
    from dinoreg.work import Order, worker

    monkeypatch.setattr(registration, "load_encoder", lambda *_, **__: PatchMeans())
    config = replace(QUICK, features="dinov2", pca=PcaConfig(components=1), encoder=EncoderConfig(long_side_tokens=8))
    order = Order(config, device="cpu", initial=initial, cache=lab.folder / "cache", cache_bytes=2**30)
    scan_file = lab.folder / "straight.nii.gz"
    write_volume(scan_file, scan(affine((2.0, 1.8, 2.2), "LPS"), (32, 34, 30), moved_mm=SHIFT_MM))
    case = Case("1", lab.folder / "atlas.nii.gz", scan_file, None, None, ("", ""), (), None, None, False)
    for _, arguments in cluster.Cluster(None, order)._volumes(case):  # type: ignore[arg-type]
        assert cluster._encode(order, *arguments).size > 1000
    record = cluster._register(order, worker(order).shared, case, lab.folder / "out")
    assert "error" not in record and record["info"]["volumes_encoded"] == 0


def test_no_scheduler_is_a_clear_error(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dinoreg import cluster
    from dinoreg.__main__ import main

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    status = main(["register", "--pairs", str(lab.folder / "pairs.csv"), "-o", str(lab.folder / "out"), "--features", "mind",
                   "--scheduler", "tcp://127.0.0.1:9"])
    assert status == 2 and "expected the address of a Dask scheduler" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (["--jobs", "0"], "a number from 1"), (["--jobs", "2", "--scheduler", "tcp://x:1"], "no --scheduler"),
    (["--shard", "0/4"], "I from 1 to N"), (["--shard", "5/4"], "I from 1 to N"), (["--shard", "a"], "I/N")])
def test_what_cannot_be_distributed_is_refused(lab: Lab, options: list[str], message: str,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    from dinoreg.__main__ import main

    status = main(["register", "--pairs", str(lab.folder / "pairs.csv"), "-o", str(lab.folder / "out"), "--features", "mind",
                   *options])
    assert status == 2 and message in capsys.readouterr().err


def test_jobs_keep_to_the_memory_that_is_free(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoreg import cluster
    from dinoreg.jobs import Case

    case = Case("1", lab.folder / "atlas.nii.gz", lab.folder / "scan0.nii.gz", None, None, ("", ""), (), None, None, False)
    config = replace(get_preset("generic"), features="mind")
    fixed, moving = read_volume(case.fixed), read_volume(case.moving)
    pair = replace(Pair.of(fixed, moving), held=4 * (fixed.array.size + moving.array.size), moving_item=4, same_grid=False)
    need = cluster.PROCESS_BYTES + plan(config, pair, output="all").peak
    monkeypatch.setattr(cluster.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * need))
    for free, jobs in ((10 * need, 4), (2.5 * need, 2), (0.1 * need, 1)):
        monkeypatch.setattr(cluster, "MEMORY_LIMIT", free)
        assert cluster.fitting(4, [(case, lab.folder)], config) == jobs
