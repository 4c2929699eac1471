"""Counted work of the solver, not seconds: what a change must not make dearer without saying so here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dinoreg import compiled
from dinoreg.convex import FeatureVolume, discrete
from dinoreg.refine import LNCC, FeatureSSD, Similarity, refine

SHAPE = (20, 18, 22)
CELLS = 20 * 18 * 22
ITERATIONS = 3


class Allocated(TorchDispatchMode):
    """Bytes of all new float tensors of at least a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.numel() >= CELLS and out.untyped_storage().data_ptr() not in inputs:
            self.bytes += out.numel() * out.element_size()
        return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each compiled loop is called."""
    counted: Counter[str] = Counter()
    run = compiled.run

    def counting(kernel: Callable[..., None], *arguments: Any) -> None:
        counted[kernel.__name__] += 1
        run(kernel, *arguments)

    monkeypatch.setattr(compiled, "run", counting)
    return counted


def lncc() -> Similarity:
    generator = torch.Generator().manual_seed(0)
    return LNCC(torch.rand(SHAPE, generator=generator), torch.rand(SHAPE, generator=generator), torch.ones(SHAPE),
                torch.ones(SHAPE), 7)


def ssd() -> Similarity:
    generator = torch.Generator().manual_seed(0)
    return FeatureSSD(*(FeatureVolume(torch.rand(12, *SHAPE, generator=generator), torch.ones(SHAPE)) for _ in range(2)))


@pytest.mark.parametrize(("term", "loops", "fields"), [
    # Warps of image and field, windows there and back, smoothing of the step. New volumes: 2 warped, a square and a product, 3 to
    # stack them, 3 + 3 windows, 5 of arithmetic, and as below.
    (lncc, {"warp": 2, "axes": 3, "correlation": 1, "warp_slope": 1, "bend": 1, "adam": 1}, 30),
    (ssd, {"warp": 1, "axes": 1, "ssd": 1, "bend": 1, "adam": 1}, 12)])  # slope, smooth step, field there, sum: 3 each
def test_an_iteration_of_the_refinement(term: Callable[[], Similarity], loops: dict[str, int], fields: int,
                                        calls: Counter[str]) -> None:
    similarity, start = term(), torch.zeros(3, *SHAPE)
    calls.clear()
    with Allocated() as allocated, FlopCounterMode(display=False) as flops:
        refine(similarity, start, (1.0, 1.0, 1.0), ITERATIONS, rate=0.25, regularity=0.5, step_sigma=1.0, damping=0.01)
    assert calls == {name: number * ITERATIONS for name, number in loops.items()}
    assert flops.get_total_flops() == 0  # no dense matrix
    moments = 2 * 3  # once
    assert allocated.bytes <= (fields * ITERATIONS + moments) * 4 * CELLS


def test_the_discrete_stage(calls: Counter[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = [FeatureVolume(torch.rand(12, *SHAPE, generator=generator), torch.ones(SHAPE)) for _ in range(2)]
    coarse, half_width = (10, 9, 11), 2
    with FlopCounterMode(display=False) as flops:
        discrete(*pair, half_width, coarse, 15)
    assert (calls["cost"], calls["cheapest"], calls["warp"]) == (2, 2 * 7, 2 * 15)
    candidates, cells = 5**3, 10 * 9 * 11
    assert flops.get_total_flops() <= 2 * 3 * candidates * cells  # of the confidence: three products a candidate and cell
