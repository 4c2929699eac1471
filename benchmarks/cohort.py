"""What a list of pairs costs beside the registrations: encodings saved by the cache, and the scheduler's work for each pair.

    python benchmarks/cohort.py [--scans 6] [--pairs 10,100,1000,10000] [--workers 2]

First an atlas run: N scans to one atlas through ``dinoreg.work`` with a ViT-S of seeded random weights and small volumes, without
a cache, with an empty one and with that filled: encodings, seconds, and whether a filled cache gives the same fields to the bit.

Then lists of growing length through the command line (``dinoreg register --pairs --scheduler``) on a scheduler and workers that
are processes of their own. Registration and encoding are stubs that return at once, so what is left is reading the list, checking
it, scheduling one task for each pair and one for each volume, collecting records and writing the tables. Processor time does not
depend on what else the machine does; wall time does. Memory is each process's peak, for the scheduler
also that before the list, when it has loaded this program.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STUB = """
from dinoreg import cluster

def register(order, shared, case, folder, *encoded):
    return {"name": case.name, "modalities": ["", ""], "warnings": [], "stages": {}, "field": {}, "scores": {}}

cluster._shared = lambda order: {}
cluster._encode = lambda *arguments: cluster.Encoded(1_000_000)
cluster._register = register
"""


def atlas_run(scans: int) -> list[str]:
    """Lines of the table of encodings."""
    from scipy import ndimage

    from dinoreg import registration
    from dinoreg.config import DiscreteConfig, EncoderConfig, RefineConfig, get_preset
    from dinoreg.io import write_volume
    from dinoreg.jobs import Case
    from dinoreg.volume import Volume
    from dinoreg.weights import random_encoder
    from dinoreg.work import Order, Worker

    encoder = random_encoder("vits14_reg4", 0)
    registration.load_encoder = lambda *_, **__: encoder  # type: ignore[assignment]
    config = replace(get_preset("generic"), features="dinov2", encoder=EncoderConfig(long_side_tokens=8, gap_mm=12.0),
                     discrete=DiscreteConfig(levels=((24, 2, 3),)), refine=RefineConfig(levels=((2, 5),)))
    lines = ["| cache | pairs | volumes encoded | CPU s | fields |", "| --- | --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texture = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((44, 44, 40)), 3).astype(np.float32)
        paths = []
        for number in range(scans + 1):
            moved = ndimage.shift(texture, (number / 2, -number / 3, 0), order=1, mode="nearest")[2:-2, 2:-2, 2:-2]
            paths.append(folder / f"{number}.nii.gz")
            write_volume(paths[-1], Volume(moved, np.diag([3.0, 3.0, 3.0, 1.0])))
        fields: list[list[bytes]] = []
        for state, cache in (("warm up", None), ("none", None), ("empty", folder / "cache"), ("filled", folder / "cache")):
            worker = Worker(Order(config, device="cpu", threads=1, cache=cache, cache_bytes=2**30))
            cases = [(Case(path.stem, paths[0], path, None, None, ("", ""), (), None, None, False),
                      folder / state / path.stem) for path in paths[1:]]
            if state == "warm up":  # loops are compiled, fonts are found
                list(worker.pairs(cases[:1]))
                continue
            started = time.process_time()
            records = list(worker.pairs(cases))
            seconds = time.process_time() - started
            fields.append([(target / "disp_voxels.nii.gz").read_bytes() for _, target in cases])
            encoded = sum(record["info"].get("volumes_encoded", 2) for record in records)
            same = "" if state != "filled" else "the same bytes" if fields[1] == fields[2] else "DIFFERENT"
            lines.append(f"| {state} | {scans} | {encoded} | {seconds:.1f} | {same} |")
    return lines


def client(pairs: int, address: str, folder: Path) -> None:
    """In a process of its own: run a list and print what that took."""
    from dinoreg import cluster  # noqa: F401 (loaded before the clock starts)
    from dinoreg.__main__ import main

    table = folder / "pairs.csv"
    table.write_text("fixed,moving\n" + "".join(f"atlas.nii.gz,scan{n}.nii.gz\n" for n in range(pairs)))
    started, cpu = time.monotonic(), time.process_time()
    with (folder / "log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        status = main(["register", "--pairs", str(table), "-o", str(folder / "out"), "--scheduler", address, "--cache",
                       str(folder / "cache")])
    found = {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu, "status": status,
             "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    print(json.dumps(found))


def usage(pid: int) -> tuple[float, float]:
    """Seconds of processor time and peak memory in MiB of another process (Linux)."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), int(peak.split()[1]) / 1024


def scheduled(pairs: int, workers: int) -> dict[str, Any]:
    """One list on a fresh cluster."""
    with tempfile.TemporaryDirectory() as name:
        folder, running = Path(name), []
        (folder / "stub.py").write_text(STUB)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}

        def start(*arguments: str) -> int:
            process = subprocess.Popen([sys.executable, *arguments], env=environment, cwd=folder, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            running.append(process)
            return process.pid

        try:
            scheduler = start("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                              "--scheduler-file", str(folder / "scheduler.json"))
            while not (folder / "scheduler.json").exists():
                time.sleep(0.1)
            address = json.loads((folder / "scheduler.json").read_text())["address"]
            for _ in range(workers):
                start("-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny",
                      "--memory-limit", "0", "--preload", "stub")

            def run(number: int) -> dict[str, Any]:
                child = subprocess.run([sys.executable, __file__, "--client", f"{number},{address},{folder}"], env=environment,
                                       capture_output=True, text=True, check=True)
                found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
                return found

            run(1)  # workers and scheduler load this program, once
            before = usage(scheduler)
            found = run(pairs)
            after = usage(scheduler)
        finally:
            for process in running:
                process.send_signal(signal.SIGKILL)
                process.wait()
    return found | {"scheduler_cpu": after[0] - before[0], "scheduler_mib": after[1], "scheduler_mib_before": before[1]}


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scans", type=int, default=6, help="of the atlas run (default: 6)")
    parser.add_argument("--pairs", default="10,100,1000,10000", help="lengths of lists (default: 10,100,1000,10000)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        number, address, folder = options.client.split(",")
        client(int(number), address, Path(folder))
        return 0
    print("\n".join(atlas_run(options.scans)), "\n", flush=True)
    print("| pairs | wall s | wall ms a pair | client: CPU ms a pair | scheduler: CPU ms a pair | client MiB | scheduler MiB "
          "(idle) |")
    print("| --- " * 7 + "|", flush=True)
    for pairs in map(int, options.pairs.split(",")):
        found = scheduled(pairs, options.workers)
        if found["status"]:
            print("error: the list failed", file=sys.stderr)
            return 1
        print(f"| {pairs} | {found['wall']:.1f} | {1000 * found['wall'] / pairs:.1f} | {1000 * found['cpu'] / pairs:.2f} | "
              f"{1000 * found['scheduler_cpu'] / pairs:.2f} | {found['mib']:.0f} | {found['scheduler_mib']:.0f} "
              f"({found['scheduler_mib_before']:.0f}) |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
