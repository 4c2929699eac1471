"""A list of pairs on a Dask cluster: local processes, Slurm, Kubernetes, whatever ``dask.distributed`` runs on.

Two kinds of tasks. One encodes a volume into the cache, once however many pairs it is part of; a pair is a task that waits for
its volumes. Dask sends a pair to the worker that encoded its volumes unless another is free much sooner: a volume's result stands
for as many bytes as its tokens have. What a task needs of this program is made once a process (``dinoreg.work``).

No more than ``WINDOW`` pairs are with the scheduler at any time, so that its memory does not grow with the list. A worker that
dies takes nothing along: its tasks go to others, and a pair that was being written is written again, to the same bytes. A client
that dies leaves finished pairs; the next one waits for those that are still being done, and goes on with ``--resume``.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from dinoreg.config import Config
from dinoreg.encoding import same_view
from dinoreg.errors import ConfigError, DinoRegError, RegistrationError
from dinoreg.grid import Shape
from dinoreg.initial import undone
from dinoreg.io import read_volume, remove
from dinoreg.jobs import Case
from dinoreg.plan import Pair, plan
from dinoreg.report import failure_record
from dinoreg.run import Record
from dinoreg.vit import ARCHITECTURES
from dinoreg.work import Order, worker

try:
    import psutil  # Dask needs it, too
    from distributed import Client, LocalCluster, as_completed
    from distributed.system import MEMORY_LIMIT
except ImportError as missing:
    raise ConfigError("--scheduler and --jobs need Dask, which is missing; run: pip install 'dinoreg[cluster]'") from missing

WINDOW = 2000  # pairs that the scheduler knows of: four for each of 500 workers
CONNECT_SECONDS = 30
PROCESS_BYTES = 2**30  # a worker with the program and Dask loaded, and what it keeps between pairs
LARGEST = "vitl14_reg4"  # whose weights may be found where a preset leaves the choice

log = logging.getLogger(__name__)
logging.getLogger("distributed").setLevel(logging.WARNING)  # it would tell of every connection
_busy: set[Path] = set()  # folders of the pairs that this process is registering


class Encoded:
    """An encoded volume in the cache of a worker, or of all; Dask takes it for as large as its tokens."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __sizeof__(self) -> int:
        return self.size


class Cluster:
    """Workers that register pairs. They and the client see the same files under the same names.

    Args:
        client: connected to the scheduler.
        order: how pairs are registered; its paths absolute.
    """

    def __init__(self, client: Client, order: Order) -> None:
        self.client, self.order = client, order
        self.resources = {"GPU": 1} if order.device == "cuda" else None

    def shared(self) -> dict[str, Any]:
        """What all results follow from, as the first worker that is there says: see :attr:`dinoreg.work.Worker.shared`.

        Raises:
            DinoRegError: the worker cannot register with this order.
        """
        if not self.client.scheduler_info(n_workers=-1)["workers"]:
            log.info("waiting for the first worker")
        shared: dict[str, Any] = self.client.submit(_shared, self.order, pure=False, resources=self.resources).result()
        return shared

    def wait_for_others(self, folder: Path) -> None:
        """Let the pairs in a folder be finished that workers are doing for a client that is gone."""
        told = False
        while any(self.client.run(_works_in, folder).values()):
            if not told:
                log.info("waiting for pairs that an earlier run began")
            told = True
            time.sleep(0.5)

    def run(self, cases: Mapping[int, tuple[Case, Path]], shared: Mapping[str, Any]) -> Iterator[tuple[int, Record]]:
        """Register pairs.

        Args:
            cases: each with its folder; paths absolute.
            shared: of :meth:`shared`; pairs fail on workers of which something else holds.

        Yields:
            The key of a pair and its record, as pairs are finished.

        Raises:
            RegistrationError: the scheduler is gone.
        """
        uses = Counter(name for case, _ in cases.values() for name, _ in self._volumes(case))
        volumes: dict[str, Any] = {}  # futures
        running: dict[str, int] = {}
        token, waiting = secrets.token_hex(4), iter(cases.items())  # names of an earlier client's tasks must not return
        done = as_completed(loop=self.client.loop)

        def submit() -> None:
            for index, (case, folder) in waiting:
                needed = []
                for name, arguments in self._volumes(case):
                    if name not in volumes:
                        volumes[name] = self.client.submit(_encode, self.order, *arguments, key=f"encode-{token}-{name}",
                                                           resources=self.resources)
                    needed.append(volumes[name])
                future = self.client.submit(_register, self.order, dict(shared), case, folder, *needed,
                                            key=f"pair-{token}-{index}", resources=self.resources)
                running[future.key] = index
                done.add(future)
                return

        for _ in range(min(WINDOW, len(cases))):
            submit()
        for future in done:
            index = running.pop(future.key)
            case, _ = cases[index]
            if future.status == "cancelled" or self.client.status != "running":
                raise RegistrationError("the scheduler is gone; start it and its workers again, and this command with --resume")
            error = future.exception()
            yield index, _record(case, error) if error else future.result()
            for name, _ in self._volumes(case):
                uses[name] -= 1
                if not uses[name]:
                    volumes.pop(name, None)  # and the scheduler forgets it
            submit()

    def _volumes(self, case: Case) -> list[tuple[str, tuple[Any, ...]]]:
        """The volumes of a case that are worth a task of their own, by a name that is the same for the same volume."""
        if self.order.cache is None or case.problem:
            return []
        found = []
        for side, path, mask in ((0, case.fixed, case.fixed_mask), (1, case.moving, case.moving_mask)):
            kind = case.modalities[side] or self.order.config.modalities[side]
            arguments = (path, mask, kind, side == 1 and isinstance(self.order.initial, tuple))
            found.append((hashlib.sha256(repr(arguments).encode()).hexdigest()[:16], arguments))
        return found[:1] if found[0] == found[1] else found


@contextmanager
def connected(address: str, order: Order) -> Iterator[Cluster]:
    """The cluster of a scheduler.

    Raises:
        ConfigError: there is none at this address.
    """
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False, name="dinoreg")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--scheduler {address}: expected the address of a Dask scheduler, such as tcp://host:8786; got: "
                          f"{error}; start one with: dask scheduler") from error
    with client:
        yield Cluster(client, order)


@contextmanager
def local(jobs: int, order: Order) -> Iterator[Cluster]:
    """Processes on this machine, one pair each at a time."""
    with LocalCluster(n_workers=jobs, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=":0",
                      silence_logs=logging.ERROR) as cluster, \
            Client(cluster, set_as_default=False, name="dinoreg") as client:
        yield Cluster(client, order)


def fitting(jobs: int, cases: Sequence[tuple[Case, Path]], config: Config) -> int:
    """How many of so many processes have room for the dearest pair of a list (``dinoreg.plan``) in the memory that is free; at
    least one."""
    free = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    arch = config.encoder.arch if config.encoder.arch in ARCHITECTURES else LARGEST if "dinov2" in config.features else None
    images = {(case.fixed, case.moving) for case, _ in cases}
    dearest = max((plan(config, pair, arch=arch, output="all").peak for names in images if (pair := _pair(*names))), default=0)
    needed = PROCESS_BYTES + dearest
    room = max(1, int(free / needed))
    if room < jobs:
        log.warning("%d jobs in place of %d: %.1f GiB of memory are free, and a pair of this list takes up to %.1f GiB", room,
                    jobs, free / 2**30, needed / 2**30)
    return min(jobs, room)


def _pair(fixed: Path, moving: Path) -> Pair | None:
    """Two images by their headers; None if one has none that can be read: the pair will fail."""
    (shape, spacing), (other, _) = _header(fixed), _header(moving)
    voxels, more = math.prod(shape), math.prod(other)
    return Pair(shape, spacing, more, 4 * (voxels + more), 4, same_grid=False) if voxels and more else None


def _header(path: Path) -> tuple[Shape, tuple[float, float, float]]:
    """Shape and spacing of an image by its header; no voxels if it has none that can be read."""
    try:
        if path.is_dir():  # DICOM, two bytes a voxel and more
            voxels = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) // 2
            return (1, 1, voxels), (1.0, 1.0, 1.0)
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        (i, j, k), (a, b, c) = reader.GetSize(), reader.GetSpacing()
        return (i, j, k), (a, b, c)
    except (OSError, RuntimeError, ValueError):  # the last one: not three axes
        return (0, 0, 0), (1.0, 1.0, 1.0)


def absolute(case: Case) -> Case:
    """The case for a process that may be in another folder."""
    masks = [mask and mask.absolute() for mask in (case.fixed_mask, case.moving_mask)]
    return replace(case, fixed=case.fixed.absolute(), moving=case.moving.absolute(), fixed_mask=masks[0], moving_mask=masks[1],
                   known={role: path.absolute() for role, path in case.known.items()})


def _record(case: Case, error: BaseException) -> Record:
    """Of a pair whose task came to no end, such as one on which workers died again and again."""
    failure = RegistrationError(f"the worker ended ({type(error).__name__}: {error}); look at its log, give it more memory")
    log.error("%s: %s", case.name, failure)
    return {"name": case.name, "modalities": list(case.modalities), "error": failure_record(failure)}


# ---- on the workers


def _shared(order: Order) -> dict[str, Any]:
    return worker(order).shared


def _works_in(folder: Path) -> bool:
    return any(path.is_relative_to(folder) for path in _busy)


def _encode(order: Order, path: Path, mask: Path | None, modality: str, moving: bool) -> Encoded:
    """Encode a volume into the cache, if it is not there."""
    try:
        volume, volume_mask = read_volume(path), read_volume(mask) if mask else None
        if moving and isinstance(order.initial, tuple):  # what "auto" finds mostly leaves the view as it is
            start = np.array(order.initial)
            if not same_view(volume, moved := undone(volume, start)):
                volume, volume_mask = moved, volume_mask and undone(volume_mask, start)
        entry, _ = worker(order).registrar.encode(volume, volume_mask, modality)
    except DinoRegError:  # the pairs say what is wrong
        return Encoded(0)
    return Encoded(entry.grid.tokens.nbytes)


def _register(order: Order, shared: dict[str, Any], case: Case, folder: Path, *_: Encoded) -> Record:
    """Register a pair into its folder."""
    try:
        here = worker(order)
        if differs := [name for name in shared if here.shared[name] != shared[name]]:
            raise ConfigError(f"worker on {socket.gethostname()}: expected the {', '.join(differs)} of the first worker, got "
                              "another; install the same versions, weights and devices everywhere")
    except DinoRegError as error:
        return {"name": case.name, "modalities": list(case.modalities), "error": failure_record(error)}
    _busy.add(folder)
    try:
        remove(folder / name for name in (case.record, *case.results))  # what a worker left that was killed
        return here.pair(case, folder).read().solve().write()
    finally:
        _busy.discard(folder)
