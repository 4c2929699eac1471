"""The solver of the released DINO-Reg code, for the preset ``published``: ConvexAdam (Siebert, Hansen, Heinrich 2021) with the
numbers of Song, Xu and Yan 2024. Everything is in voxels and cells, whatever the spacing.

    discrete   features averaged over blocks of 6^3; cost of 9^3 candidates = sum over channels of squared differences, two 3^3
               boxes; coupled convex optimisation, a 3^3 box after each arg-min; both directions; inverse consistency; back to
               voxels by trilinear interpolation, times 6
    Adam       w: one vector a voxel, disp = five 7^3 boxes of w;
               minimise mean (moving(x + disp(x)) - fixed(x))^2 + 2 * sum over axes of mean (difference of neighbours)^2

``QuirksConfig`` says which of the released code's departures from this are made; without any, the boxes and the sampling take
the border's own cells for what lies beyond it, sizes are padded before pooling and cropped after, and a displacement of one
cell is one cell.

Memory for c channels and n voxels: 8 c n bytes of features and about 220 n for the rest, measured 2.4 GB for 24 channels at
192 x 160 x 192; an iteration takes 13 CPU seconds there. What is not reproduced, and why: docs/published.md.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinoreg import compiled
from dinoreg.config import PublishedConfig, QuirksConfig
from dinoreg.convex import COUPLING, candidates
from dinoreg.errors import InputError, RegistrationError
from dinoreg.grid import apply_axes, area_matrix, box_matrix, linear_matrix, shape3, warp
from dinoreg.stages import advance

CHUNK = 4  # channels of which the slope is computed at a time: bounds the memory, and changes no sum but in its order
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's usual constants


def pooling(n: int, size: int, truncated: bool) -> tuple[Tensor, Tensor]:
    """Averaging over blocks of ``size`` along an axis of n voxels, and the way back.

    Args:
        n: voxels.
        size: voxels a block.
        truncated: what is left after the last whole block is dropped, and the way back stretches the blocks over all n voxels
            (up to size - 1 voxels of error at the far end). Otherwise the last voxel is repeated until the last block is full.

    Returns:
        Matrices (cells, n), the averages, and (n, cells), linear interpolation at the voxels.
    """
    cells = n // size if truncated else -(-n // size)
    blocks = area_matrix(cells * size, cells)
    if truncated:
        return pad(blocks, (0, n - cells * size)), linear_matrix(cells, n)
    return torch.cat([blocks[:, : n - 1], blocks[:, n - 1 :].sum(1, keepdim=True)], 1), linear_matrix(cells, cells * size)[:n]


def sample(x: Tensor, disp: Tensor, quirks: QuirksConfig) -> Tensor:
    """``x(p + disp(p))`` for a volume (c, i, j, k) and a field (3, i, j, k) on one lattice."""
    if compiled.usable(x, disp):
        return compiled.warp(pad(x, (1,) * 6) if quirks.zero_border else x, disp, _place(disp, quirks))
    if quirks.short_displacement:  # a step of 2 / (n - 1) in place of 2 / n: what is found comes out (n - 1) / n too short
        disp = disp * disp.new_tensor([n / max(n - 1, 1) for n in shape3(disp)])[:, None, None, None]
    return warp(x, disp, padding="zeros" if quirks.zero_border else "border")


def _place(disp: Tensor, quirks: QuirksConfig) -> compiled.Floats:
    """``sample`` for the compiled loops, in a volume that has a cell of zeros around it where the border is zero."""
    where = compiled.place(shape3(disp), shape3(disp))
    if quirks.zero_border:
        where[:, 1] += 1
    if quirks.short_displacement:
        where[:, 2] = [n / max(n - 1, 1) for n in shape3(disp)]
    return where


def cost_volume(fixed: Tensor, moving: Tensor, half_width: int, quirks: QuirksConfig) -> Tensor:
    """Feature difference of every cell for every candidate.

    Args:
        fixed, moving: features (c, i, j, k).
        half_width: largest displacement, cells.

    Returns:
        (n^3, i, j, k) for the n = 2 * half_width + 1 steps an axis; the step along i runs fastest, that along k slowest.
    """
    ni, nj, nk = shape3(fixed)
    wide = pad(moving[None], (half_width,) * 6, mode="constant" if quirks.zero_border else "replicate")[0]
    boxes = [box_matrix(n, 3, 2, quirks.zero_border) for n in (ni, nj, nk)]
    if compiled.usable(fixed, moving):
        return compiled.cost_volume(fixed, wide, fixed[0], wide[0], boxes, fixed[0], -1.0, first_axis_fastest=True)
    steps = range(2 * half_width + 1)
    cost = fixed.new_empty((len(steps) ** 3, ni, nj, nk))
    for out, (dk, dj, di) in zip(cost, itertools.product(steps, steps, steps), strict=True):
        torch.sum((fixed - wide[:, di : di + ni, dj : dj + nj, dk : dk + nk]).square_(), 0, out=out)
    return apply_axes(cost, boxes)


def coupled_convex(cost: Tensor, half_width: int, quirks: QuirksConfig) -> Tensor:
    """Smooth field (3, i, j, k), cells, that follows the cheapest candidates of ``cost_volume``.

    Among equals the first candidate is picked. Where nothing can be told apart, all candidates cost the same, and the first of
    them is the far corner of the search: ``quirks.untied_start`` leaves it at that.
    """
    n, shape = 2 * half_width + 1, shape3(cost)
    steps = candidates(half_width).flip(1).to(cost.device)  # (n^3, 3)
    line = torch.arange(-half_width, half_width + 1, device=cost.device)[:, None]
    boxes = [box_matrix(s, 3, zero_border=quirks.zero_border) for s in shape]
    disp = cost.new_zeros((3, *shape))
    for beta in (0.0 if quirks.untied_start else COUPLING[0], *COUPLING):
        penalties = beta * (line - disp.reshape(3, 1, -1)).square()  # (3, n, cells): beta |d - u|^2 axis by axis
        if compiled.usable(cost):
            pick = compiled.cheapest(cost.flatten(1), penalties.flip(0))
        else:
            i, j, k = penalties
            pick = (cost.reshape(n, n, n, -1) + (i + j[:, None] + k[:, None, None])).reshape(n**3, -1).argmin(0)
        disp = apply_axes(steps[pick].T.reshape(3, *shape), boxes)
    return disp


def discrete(fixed: Tensor, moving: Tensor, config: PublishedConfig, quirks: QuirksConfig) -> tuple[Tensor, float]:
    """Register in both directions on blocks of voxels.

    Args:
        fixed, moving: features (c, i, j, k) at the voxels.

    Returns:
        The field fixed -> moving (3, i, j, k) in voxels, and the share of blocks whose field reaches the edge of the search.

    Raises:
        InputError: an axis is shorter than a block.
    """
    shape = shape3(fixed)
    if min(shape) < config.pool:
        raise InputError(f"this solver averages over {config.pool} voxels along each axis; got {shape}; use another preset")
    ways = [pooling(n, config.pool, quirks.truncated_pooling) for n in shape]
    a, b = (apply_axes(features, [down for down, _ in ways]) for features in (fixed, moving))
    forward, backward = (coupled_convex(cost_volume(*pair, config.half_width, quirks), config.half_width, quirks)
                         for pair in ((a, b), (b, a)))
    saturated = float((forward.abs().amax(0) > 0.9 * config.half_width).float().mean())
    for _ in range(config.consistency_iterations):
        forward, backward = (0.5 * (forward - sample(backward, forward, quirks)),
                             0.5 * (backward - sample(forward, backward, quirks)))
    return apply_axes(forward * config.pool, [up for _, up in ways]), saturated


def refine(features: Iterable[Tensor], disp: Tensor, config: PublishedConfig, quirks: QuirksConfig,
           until: float = math.inf) -> tuple[Tensor, list[float]]:
    """Adam on a vector a voxel, smoothed before it is used.

    Args:
        features: of the fixed and the moving volume (c, i, j, k) at the voxels. Each is laid out anew as it comes: what the
            caller does not hold is never there twice.
        disp: start (3, i, j, k), voxels. It is smoothed as well.
        until: of ``time.monotonic()``; after it no iteration is begun.

    Returns:
        The field of the last evaluation, which the last step has not yet changed (as released), and the loss of each: fewer where
        time was up. Where a loss was not finite, the last one is NaN and the field is the one before.

    Raises:
        RegistrationError: if the first loss is not finite.
    """
    smooth = [box_matrix(n, config.box_width, config.boxes, quirks.zero_border).to(disp.device) for n in shape3(disp)]
    adjoint = [matrix.T.contiguous() for matrix in smooth]
    vectors, first, second = disp.clone(), torch.zeros_like(disp), torch.zeros_like(disp)
    fast = compiled.usable(disp)
    if fast:
        data = _compiled_data(iter(features), quirks)
    else:
        fixed, moving = features
        data = partial(_data, fixed, moving, quirks)
    losses = []
    for t in range(1, config.iterations + 1):
        if time.monotonic() > until:
            break
        before, disp = disp, apply_axes(vectors, smooth)
        loss, slope = data(disp)
        if fast:
            counts = [disp.numel() * max(n - 1, 1) / n for n in shape3(disp)]  # of neighbours along each axis
            weights = [[2 * config.regularity / n for n in counts]] * 3
            losses.append(loss - 0.5 * float(compiled.bend(slope, disp, (1, 1, 1), weights).sum()))
        else:
            roughness, bend = _diffusion(disp)
            losses.append(loss + config.regularity * roughness)
            slope.add_(bend, alpha=config.regularity)
        if not math.isfinite(losses[-1]):
            if t == 1:
                raise RegistrationError("the similarity of the features is not finite before the first step; please report this "
                                        "with the images' headers")
            losses[-1] = math.nan
            return before, losses
        slope = apply_axes(slope, adjoint)
        if fast:
            compiled.adam(slope, first, second, t, (BETA1, BETA2), [config.rate] * 3, EPSILON)
            vectors += slope
        else:
            first.lerp_(slope, 1 - BETA1)
            second.lerp_(slope.square_(), 1 - BETA2)
            vectors.addcdiv_(first, (second / (1 - BETA2**t)).sqrt_().add_(EPSILON), value=-config.rate / (1 - BETA1**t))
        advance(t, config.iterations)
    return disp, losses


def _compiled_data(features: Iterator[Tensor], quirks: QuirksConfig) -> Callable[[Tensor], tuple[float, Tensor]]:
    """``_data`` of a pair, which is laid out for it once."""
    fixed = next(features)
    f, count = compiled.channels_last(fixed), fixed.numel()
    del fixed
    m = compiled.channels_last(next(features), int(quirks.zero_border))
    weights = f.new_full(f.shape[:3], 1 / count), m.new_ones(m.shape[:3])
    return lambda disp: compiled.ssd(f, m, *weights, disp, _place(disp, quirks))


def _data(fixed: Tensor, moving: Tensor, quirks: QuirksConfig, disp: Tensor) -> tuple[float, Tensor]:
    """Mean squared difference over channels and voxels, and its derivative by the field."""
    loss, slope = 0.0, torch.zeros_like(disp)
    for f, m in zip(torch.split(fixed, CHUNK), torch.split(moving, CHUNK), strict=True):
        at = disp.detach().requires_grad_()
        with torch.enable_grad():
            warped = sample(m, at, quirks)
        difference = warped.detach() - f
        loss += float(difference.square().sum(dtype=torch.float64)) / fixed.numel()
        slope += torch.autograd.grad(warped, at, difference.mul_(2 / fixed.numel()))[0]
    return loss, slope


def _diffusion(disp: Tensor) -> tuple[float, Tensor]:
    """Sum over the axes of the mean squared difference of neighbours, and its derivative by the field (3, i, j, k)."""
    energy, slope = 0.0, torch.zeros_like(disp)
    for dim in (1, 2, 3):
        difference = disp.diff(dim=dim)
        if difference.numel() == 0:
            continue
        energy += float(difference.square().mean(dtype=torch.float64))
        difference *= 2 / difference.numel()
        slope.narrow(dim, 1, disp.shape[dim] - 1).add_(difference)
        slope.narrow(dim, 0, disp.shape[dim] - 1).sub_(difference)
    return energy, slope
