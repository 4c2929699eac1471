"""Tensors in, tensors out: where ``dinoreg.kernels`` does the work of a torch form, and how work is shared among threads.

Only for float32 tensors on the CPU that no gradient is asked of (see ``usable``). numba is loaded with the first call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

Floats = npt.NDArray[np.float32]
SLABS = 4  # a thread: the last one to finish keeps the others waiting for less
SMALL = 1 << 15  # cells below which waking threads costs more than they bring
NEGLIGIBLE = 1e-8  # of a matrix' largest entry: less than float32 can tell


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled form can take over."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" and not x.requires_grad for x in tensors)


def kernels() -> ModuleType:
    """``dinoreg.kernels``, loaded when it is first needed."""
    from dinoreg import kernels

    return kernels


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "dinoreg")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def run(kernel: Callable[..., None], n: int, cells: int, *arguments: Any) -> None:
    """Call ``kernel(low, high, *arguments)`` over slabs of range(n), on as many threads as torch has.

    Tensors are handed over as arrays. ``cells`` is the size of the work.
    """
    arguments = tuple(x.numpy() if isinstance(x, Tensor) else x for x in arguments)
    threads = min(torch.get_num_threads(), n)
    if threads <= 1 or cells < SMALL:
        kernel(0, n, *arguments)
        return
    edges = np.linspace(0, n, min(n, threads * SLABS) + 1).astype(int).tolist()
    slabs = [_pool(threads).submit(kernel, low, high, *arguments) for low, high in pairwise(edges)]
    for slab in slabs:
        slab.result()


@lru_cache(maxsize=256)
def _band(matrix: Tensor) -> tuple[npt.NDArray[np.int64], Floats]:
    """The first column of each row that counts, and as many entries from there as the widest row has: (n,), (n, width)."""
    values = matrix.numpy()
    n_in = values.shape[1]
    counts = np.abs(values) > NEGLIGIBLE * np.abs(values).max()
    first, last = counts.argmax(1), n_in - 1 - counts[:, ::-1].argmax(1)
    width = int((last - first).max()) + 1
    start = np.minimum(first, n_in - width)
    return start, np.ascontiguousarray(np.take_along_axis(values, start[:, None] + np.arange(width), 1))


@lru_cache(maxsize=256)
def _diagonals(matrix: Tensor) -> tuple[npt.NDArray[np.int64], Floats]:
    """The diagonals of a square matrix that count, as many below the main one as above: (1,) their number there, (2 n + 1, n)."""
    values = matrix.numpy()
    out, at = np.nonzero(np.abs(values) > NEGLIGIBLE * np.abs(values).max())
    margin = int(np.abs(out - at).max())
    padded = np.pad(values, ((0, 0), (margin, margin)))
    rows = np.arange(len(values))
    return np.array([margin]), np.stack([padded[rows, rows + t] for t in range(2 * margin + 1)])


@lru_cache(maxsize=64)
def _unit(n: int) -> Tensor:
    return torch.eye(n)


def apply_axes(x: Tensor, matrices: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
    """``dinoreg.grid.apply_axes`` of (c, i, j, k), into ``out`` if given."""
    a, b, c = (_unit(n) if m is None else m for n, m in zip(x.shape[1:], matrices, strict=True))
    shape = (x.shape[0], a.shape[0], b.shape[0], c.shape[0])
    out = x.new_empty(shape) if out is None else out
    run(kernels().axes, shape[0] * shape[1], max(x.numel(), out.numel()), x.contiguous(), *_band(a), *_band(b), *_along_row(c),
        out)
    return out


def _along_row(matrix: Tensor) -> tuple[npt.NDArray[np.int64], Floats]:
    return _diagonals(matrix) if matrix.shape[0] == matrix.shape[1] else _band(matrix)


def place(sampled: Sequence[int], lattice: Sequence[int]) -> Floats:
    """Where cells of a lattice and their displacements lie in a volume over the same extent: see ``dinoreg.kernels``."""
    ratio = np.array(sampled) / np.array(lattice)
    return np.stack([ratio, ratio / 2 - 0.5, ratio], 1).astype(np.float32)


def warp(x: Tensor, disp: Tensor, where: Floats, out: Tensor | None = None) -> Tensor:
    """Trilinear samples (c, i, j, k) of x (c, i', j', k'), into ``out`` if given."""
    out = x.new_empty((x.shape[0], *disp.shape[1:])) if out is None else out
    run(kernels().warp, disp.shape[1], out.numel(), x.contiguous(), disp.contiguous(), where, out)
    return out


def warp_slope(x: Tensor, disp: Tensor, where: Floats, upstream: Tensor) -> Tensor:
    """The derivative by disp (3, i, j, k) of the samples of x (i', j', k') times upstream (i, j, k)."""
    slope = torch.empty_like(disp, memory_format=torch.contiguous_format)
    run(kernels().warp_slope, disp.shape[1], slope.numel(), x.contiguous(), disp.contiguous(), where, upstream.contiguous(),
        slope)
    return slope


def channels_last(features: Tensor, margin: int = 0) -> Tensor:
    """Features (c, i, j, k) as (i, j, k, c), with channels of zeros up to a multiple of 8, which fill vector registers, and with
    ``margin`` cells of zeros on either side of each axis."""
    c, *shape = features.shape
    out = features.new_zeros((*(n + 2 * margin for n in shape), -(-c // 8) * 8))
    i, j, k = (slice(margin, margin + n) for n in shape)
    out[i, j, k, :c] = features.permute(1, 2, 3, 0)
    return out


def ssd(fixed: Tensor, moving: Tensor, fixed_weight: Tensor, moving_weight: Tensor, disp: Tensor,
        where: Floats) -> tuple[float, Tensor]:
    """Sum over cells of the weighted squared difference of features (i, j, k, c), and its derivative by disp."""
    slope, loss = torch.empty_like(disp, memory_format=torch.contiguous_format), np.empty(disp.shape[1])
    run(kernels().ssd, disp.shape[1], fixed.numel(), fixed, moving, fixed_weight.contiguous(), moving_weight.contiguous(),
        disp.contiguous(), where, loss, slope)
    return float(loss.sum()), slope


def correlation(means: Tensor, fixed_mean: Tensor, fixed_var: Tensor, fixed_weight: Tensor, moving_weight: Tensor,
                floor: float) -> float:
    """See ``dinoreg.kernels.correlation``; returns the sum over cells."""
    loss = np.empty(means.shape[1])
    run(kernels().correlation, means.shape[1], means.numel(), means, fixed_mean, fixed_var, fixed_weight.contiguous(),
        moving_weight.contiguous(), np.float32(floor), loss)
    return float(loss.sum())


def bend(slope: Tensor, disp: Tensor, scale: Sequence[float], weights: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Add the slope of a diffusion energy to ``scale`` times the given one, in place: see ``dinoreg.kernels.bend``.

    Returns:
        For each component, the sum over cells of the field times its second derivatives, weighted.
    """
    energy = np.empty((disp.shape[1], 3))
    numbers = [np.array(x, np.float32) for x in (scale, weights)]
    run(kernels().bend, disp.shape[1], disp.numel(), slope, disp, *numbers, energy)
    sums: npt.NDArray[np.float64] = energy.sum(0)
    return sums


def adam(slope: Tensor, first: Tensor, second: Tensor, t: int, betas: tuple[float, float], rate: Sequence[float],
         damping: float) -> None:
    """The t-th step of Adam, in place of the slope, and its moments."""
    one, two = betas
    rates = np.array(rate, np.float32) / np.float32(1 - one**t)
    run(kernels().adam, slope.shape[1], slope.numel(), slope, first, second, np.float32(1 - one), np.float32(1 - two), rates,
        np.float32(1 / (1 - two**t)), np.float32(damping))


def _span(matrix: Tensor) -> npt.NDArray[np.int64]:
    """The rows from and to which each column counts: (columns, 2)."""
    counts = matrix.numpy() != 0
    return np.stack([counts.argmax(0), len(counts) - counts[::-1].argmax(0)], 1)


def cost_volume(fixed: Tensor, moving: Tensor, fixed_weight: Tensor, moving_weight: Tensor, average: Sequence[Tensor],
                valid: Tensor, unknown: float, first_axis_fastest: bool = False) -> Tensor:
    """The cost (n^3, i, j, k) of every candidate, see ``dinoreg.convex.cost_volume``.

    Args:
        fixed: (c, i', j', k').
        moving: with half the search range more on either side of each axis.
        fixed_weight, moving_weight: of these sizes without channels.
        average: matrices from the fine to the coarse lattice.
        valid: (i, j, k).
        unknown: negative for a plain sum over channels, averaged.
        first_axis_fastest: order of the candidates; otherwise the last axis is the fastest.
    """
    a, b, c = average
    n = moving.shape[1] - fixed.shape[1] + 1
    channels, longer = (0, 0) * 3 + (0, -len(fixed) % 4), (0, n - 1)
    out = fixed.new_empty((n**3, *(m.shape[0] for m in average)))
    features = [pad(x, channels).contiguous().flatten(2) for x in (pad(fixed, longer), moving)]
    weights = [x.contiguous().flatten(1) for x in (pad(fixed_weight, longer), moving_weight)]
    run(kernels().cost, n**2, n**3 * fixed.numel(), *features, *weights, moving.shape[3], a.contiguous(), _span(a), *_band(b),
        *_along_row(c), valid.contiguous(), np.float32(unknown), first_axis_fastest, out)
    return out


def cheapest(costs: Tensor, penalties: Tensor) -> Tensor:
    """The candidate of each cell that is cheapest with its penalty: (cells,) from (n^3, cells) and (3, n, cells)."""
    pick = torch.empty(costs.shape[1], dtype=torch.int64)
    run(kernels().cheapest, -(-len(pick) // 512), costs.numel(), costs.contiguous(), penalties.contiguous(), pick)
    return pick
