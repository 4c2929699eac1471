"""What a process needs to register any pair of a list: in plain values, so that it can be sent to other processes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dinoreg.basis import load_basis
from dinoreg.cache import TokenCache
from dinoreg.completion import recipe
from dinoreg.config import Config
from dinoreg.jobs import Case, Images
from dinoreg.registration import Registrar
from dinoreg.result import Registration
from dinoreg.run import PairRun, Record, run_overlapped
from dinoreg.volume import Volume


@dataclass(frozen=True)
class Order:
    """How all pairs of a list are registered; two that are equal give equal results.

    Attributes:
        config, weights, device, threads, time_limit, max_memory: see :class:`dinoreg.registration.Registrar`.
        initial: rows of the affine start of all pairs; "auto", or None for none.
        confidence: also write the confidence.
        cache, cache_bytes: folder of encoded volumes, and how large it may grow; None for no cache.
        basis: file of the principal components of all pairs; None for each pair's own.
    """

    config: Config
    weights: Path | None = None
    device: str = "auto"
    threads: int | None = None
    time_limit: float | None = None
    max_memory: int | None = None
    initial: tuple[tuple[float, ...], ...] | str | None = None
    confidence: bool = False
    cache: Path | None = None
    cache_bytes: int = 0
    basis: Path | None = None


class Worker:
    """A process's registrar for an order."""

    def __init__(self, order: Order) -> None:
        cache = TokenCache(order.cache, order.cache_bytes) if order.cache else None
        basis = load_basis(order.basis) if order.basis else None
        self.order = order
        self.registrar = Registrar(order.config, weights=order.weights, device=order.device, threads=order.threads,
                                   time_limit=order.time_limit, max_memory=order.max_memory, cache=cache, basis=basis)
        self.shared = recipe(order.config, self.registrar.engine, {"confidence": order.confidence, "time_limit": order.time_limit,
                                                                       "initial": order.initial})

    def pair(self, case: Case, folder: Path) -> PairRun:
        """A pair to be read, solved and written into its folder, the report last."""
        order = self.order

        def register(case: Case, images: Images) -> Registration:
            return self.registrar.register(images.fixed, images.moving, fixed_mask=images.fixed_mask,
                                           moving_mask=images.moving_mask, modalities=case.modalities, initial=order.initial,
                                           colours=True, output="all")

        def write(case: Case, images: Images, registration: Registration, warped: Volume | None) -> list[Path]:
            return registration.save(folder, images.moving, warped=warped, confidence=order.confidence)

        run = {"contract": "register", "preset": order.config.preset, "config": order.config.to_dict(), "warnings": []}
        return PairRun(case, order.config, register, write, output=folder, root=None, run=run, shared=self.shared)

    def pairs(self, cases: Iterable[tuple[Case, Path]]) -> Iterator[Record]:
        """Pairs with their folders, one after the other; their records."""
        return run_overlapped(self.pair(case, folder) for case, folder in cases)


@functools.lru_cache(maxsize=1)
def worker(order: Order) -> Worker:
    """The worker of this process, made once."""
    return Worker(order)
