"""Discrete registration: a cost volume over displacements, solved by coupled convex optimisation.

Heinrich, Papiez, Schnabel, Handels 2014 (coupled convex), as used by ConvexAdam (Siebert, Hansen, Heinrich 2021): every cell
picks the candidate that is cheapest in cost plus its squared distance from a smooth field, the picks are smoothed, and the
coupling grows. Both directions are solved and made inverse consistent.

Two lattices are used over the same extent. Features are compared cell by cell on the fine one, and candidates are whole fine
cells; the comparisons are then averaged onto the coarse one, where the field lives. Averaging squared differences keeps what
averaging features first would lose.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinoreg import compiled
from dinoreg.grid import Shape, apply_axes, area_matrix, box_matrix, gaussian_matrix, shape3, warp

COUPLING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # published schedule, for a cost of order 1 and distances in coarse cells
CLEAR_CELLS, CLEAR_COST = 1.5, 0.1  # see ``confidence``
AMBIGUOUS = 0.02  # what a match without any confidence weighs in ``settled``, against 1
UNKNOWN = 0.1  # share of a cell that counts as compared with unrelated tissue (cost 1): decides where little overlaps


@dataclass(frozen=True)
class FeatureVolume:
    """Features (c, i, j, k), scaled so that unrelated voxels differ by a squared distance of about 1, and weights (i, j, k)."""

    features: Tensor
    weight: Tensor

    def warp(self, disp: Tensor) -> FeatureVolume:
        """The same, pulled back by a field (3, i, j, k) of its lattice."""
        warped = warp(torch.cat([self.features, self.weight[None]]), disp)
        return FeatureVolume(warped[:-1], warped[-1])


def candidates(half_width: int) -> Tensor:
    """All displacements up to ``half_width`` cells along each axis: (n, 3) float32, last axis fastest."""
    steps = torch.arange(-half_width, half_width + 1, dtype=torch.float32)
    return torch.cartesian_prod(steps, steps, steps)


def cost_volume(fixed: FeatureVolume, moving: FeatureVolume, half_width: int, coarse: Shape) -> Tensor:
    """Mean squared feature difference of every coarse cell for every candidate displacement.

    Args:
        fixed, moving: on one fine lattice.
        half_width: largest displacement, fine cells.
        coarse: lattice of the result.

    Returns:
        (n, *coarse) in the order of ``candidates``: weighted mean over the cell and two 3^3 boxes around it, 1 (unrelated) where
        nothing overlaps, times the share of valid fixed voxels.
    """
    ni, nj, nk = shape3(fixed.features)
    wide, n = nk + 2 * half_width, 2 * half_width + 1
    f, wf = fixed.features, fixed.weight[None]
    m = pad(moving.features[None], (half_width,) * 6, mode="replicate")[0]
    wm = pad(moving.weight[None, None], (half_width,) * 6, mode="replicate")[0]
    lines = zip((ni, nj, nk), coarse, strict=True)
    average = [(box_matrix(b, 3, repeats=2)[:, :, None] * area_matrix(a, b)).sum(1) for a, b in lines]  # their products, (b, a)
    valid = apply_axes(fixed.weight, average)
    if compiled.usable(f, m):
        return compiled.cost_volume(f, m, fixed.weight, wm[0], average, valid, UNKNOWN)
    # wf wm |f - m|^2 = (wf |f|^2) wm - 2 (wf f).(wm m) + wf (wm |m|^2): one inner product of augmented channels
    left = torch.cat([wf * f.square().sum(0, keepdim=True), -2 * wf * f, wf])
    right = torch.cat([wm, wm * m, wm * m.square().sum(0, keepdim=True)])
    c = left.shape[0]
    rows_f = left.permute(1, 2, 3, 0).reshape(ni * nj, nk, c).contiguous()
    rows_m = right.permute(1, 2, 0, 3).contiguous()  # (i, j, c, k)
    cost = f.new_empty((n, n, n, *coarse))
    for di, dj in itertools.product(range(n), range(n)):
        row = rows_m[di : di + ni, dj : dj + nj].reshape(ni * nj, c, wide)
        products = rows_f @ row  # (i j, k, k'): every k against every k'; the bands k' = k + dk are wanted
        band = products.as_strided((n, ni, nj, nk), (1, nj * nk * wide, nk * wide, wide + 1))
        overlap = wf * wm[0, di : di + ni, dj : dj + nj].unfold(2, nk, 1).permute(2, 0, 1, 3)
        cost[di, dj] = (apply_axes(band, average) + UNKNOWN) / (apply_axes(overlap, average) + UNKNOWN) * valid
    return cost.reshape(n**3, *coarse)


def coupled_convex(cost: Tensor, steps: Tensor) -> Tensor:
    """Smooth field that follows the cheapest candidates.

    Args:
        cost: (n, i, j, k), of order 1.
        steps: the candidates (n, 3), cells of the cost's lattice.

    Returns:
        disp (3, i, j, k), cells.
    """
    n, shape = cost.shape[0], shape3(cost)
    flat = cost.reshape(n, -1)
    boxes = [box_matrix(s, 3) for s in shape]
    square = steps.square().sum(1)
    disp = steps.new_zeros((3, *shape))
    for beta in (COUPLING[0], *COUPLING):  # the first pass is tied weakly to no motion: it settles cells without any evidence
        if compiled.usable(flat, steps):
            pick = compiled.cheapest(flat, beta * (lines(steps)[:, :, None] - disp.reshape(3, 1, -1)).square())
        else:
            # |d - u|^2 = |d|^2 - 2 d.u + const: one matrix product instead of n differences
            penalty = torch.addmm(square[:, None], steps, disp.reshape(3, -1), alpha=-2.0)
            pick = penalty.mul_(beta).add_(flat).argmin(0)
        disp = apply_axes(steps[pick].T.reshape(3, *shape), boxes)
    return disp


def lines(steps: Tensor) -> Tensor:
    """What ``candidates`` go through along each axis, (3, n), from all (n^3, 3) of them."""
    n = round(len(steps) ** (1 / 3))
    grid = steps.reshape(n, n, n, 3)
    return torch.stack([grid[:, 0, 0, 0], grid[0, :, 0, 1], grid[0, 0, :, 2]])


def confidence(cost: Tensor, steps: Tensor, disp: Tensor) -> Tensor:
    """How clear the match of each cell is: how much dearer every candidate is that lies elsewhere.

    Elsewhere is more than ``CLEAR_CELLS`` cells from the field. With m the cheapest cost there less the cheapest cost around the
    field, confidence is 1 - exp(-m / CLEAR_COST), and 0 where m < 0: elsewhere is cheaper, and the field is what its
    neighbours say. Unrelated tissue has a cost of 1. Compared with the spread and entropy of exp(-cost / T), the distance of the
    cheapest candidate from the field and the disagreement of both directions, this margin says most about the error
    (benchmarks/confidence.py).

    Args:
        cost: (n, i, j, k), of order 1.
        steps: the candidates (n, 3), cells of the cost's lattice.
        disp: (3, i, j, k), the field, cells.

    Returns:
        (i, j, k) in [0, 1).
    """
    field = disp.reshape(3, -1)
    near = cost.new_full((field.shape[1],), torch.inf)
    far = near.clone()
    for some, costs in zip(torch.split(steps, 128), torch.split(cost.flatten(1), 128), strict=True):  # keeps the memory small
        squared = some.square().sum(1)[:, None] - 2 * some @ field + field.square().sum(0)
        elsewhere = squared > CLEAR_CELLS**2
        near = torch.minimum(near, costs.masked_fill(elsewhere, torch.inf).amin(0))
        far = torch.minimum(far, costs.masked_fill(~elsewhere, torch.inf).amin(0))
    margin = torch.where(near.isfinite() & far.isfinite(), far - near, 0.0).clamp_min(0)
    return (1 - torch.exp(-margin / CLEAR_COST)).reshape(shape3(disp))


def inverse_consistent(forward: Tensor, backward: Tensor, iterations: int = 15) -> tuple[Tensor, Tensor]:
    """Move a pair of fields (3, i, j, k) towards being each other's inverse: half the way an iteration (ConvexAdam)."""
    for _ in range(iterations):
        forward, backward = (0.5 * (forward - warp(backward, forward)), 0.5 * (backward - warp(forward, backward)))
    return forward, backward


def settled(disp: Tensor, clear: Tensor) -> Tensor:
    """A field (3, i, j, k) averaged over about a cell, each cell by its confidence (i, j, k): a match that is ambiguous gives way
    to clear ones beside it, and where all are alike nothing but a little smoothing happens (normalised convolution, Knutsson and
    Westin 1993)."""
    blur = [gaussian_matrix(n, 1.0) for n in shape3(disp)]
    weight = clear + AMBIGUOUS
    return apply_axes(disp * weight, blur) / apply_axes(weight, blur)


def discrete(fixed: FeatureVolume, moving: FeatureVolume, half_width: int, coarse: Shape,
             consistency_iterations: int) -> tuple[Tensor, float, Tensor]:
    """Register in both directions.

    Args:
        fixed, moving: on one fine lattice.
        half_width: largest displacement, fine cells.
        coarse: lattice of the field.
        consistency_iterations: of ``inverse_consistent``; 0 skips the other direction.

    Returns:
        The field fixed -> moving (3, *coarse) in coarse cells, the share of cells whose field reaches the edge of the search, and
        ``confidence`` (*coarse).
    """
    ratio = torch.tensor([b / a for a, b in zip(shape3(fixed.features), coarse, strict=True)])
    steps = (candidates(half_width) * ratio).to(fixed.features.device)
    cost = cost_volume(fixed, moving, half_width, coarse)
    forward = coupled_convex(cost, steps)
    clear = confidence(cost, steps, forward)
    del cost  # the other direction needs as much
    reach = (forward.abs() / (half_width * ratio.to(forward))[:, None, None, None]).amax(0)
    saturated = float((reach > 0.9).float().mean())
    if consistency_iterations:
        backward = coupled_convex(cost_volume(moving, fixed, half_width, coarse), steps)
        forward, _ = inverse_consistent(forward, backward, consistency_iterations)
    return settled(forward, clear), saturated, clear
