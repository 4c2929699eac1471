"""Continuous refinement: Adam on a displacement field, from a coarse lattice to a fine one.

The field grows by composition, ``disp <- disp o (id + step)``, with steps of a fraction of a cell that are smoothed before
they are used: each is a small diffeomorphism, and so is their composition, so that folds are left to what linear interpolation
between cells loses: some 0.01 % of the cells (greedy composition as in ANTs and Greedy; Adam on the composed step as in FireANTs,
Jena et al. 2024). Per iteration:

    g = d(similarity)/d(disp) - regularity * laplacian(disp)       the gradient of similarity + diffusion
    step = -rate * m / (sqrt(v) + damping)                         m, v: Adam's moments of g
    disp = compose(disp, smooth(step))

Lengths are in units of the level's cell size h (mm), so that anisotropic voxels neither bend nor favour an axis.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dinoreg import compiled
from dinoreg.config import RefineConfig
from dinoreg.convex import FeatureVolume
from dinoreg.errors import RegistrationError
from dinoreg.grid import (
    Shape,
    apply_axes,
    box_matrix,
    compose,
    gaussian_matrix,
    lattice_shape,
    limited_cell,
    shape3,
    total,
    warp,
    warp_slope,
)

KEPT = 0.9  # share of the objective's fall that the last field has to have kept to be the result: below, Adam went astray


def lattices(shape: Shape, spacing: Sequence[float], config: RefineConfig) -> list[Shape]:
    """The lattice of each level over a grid of voxels: their cells are counted in the smallest spacing, or, where the finest one
    would have more than ``max_cells``, in the smallest length for which it does not."""
    finest = min((factor for factor, _ in config.levels), default=1.0)
    unit = limited_cell(shape, spacing, finest * min(spacing), config.max_cells) / finest
    return [lattice_shape(shape, spacing, factor * unit) for factor, _ in config.levels]


class Similarity(Protocol):
    """A data term on one lattice."""

    def gradient(self, disp: Tensor) -> tuple[Tensor, Tensor]:
        """Mean dissimilarity (scalar) and its derivative by the field in cells, times the number of cells (3, i, j, k).

        The derivative is a tensor of its own: the caller may write into it.
        """
        ...


class FeatureSSD:
    """Sum over channels of squared feature differences, weighted by where both images are valid.

    The weight follows the field, but its change is no part of the derivative: tissue is not rewarded for leaving the view.
    """

    def __init__(self, fixed: FeatureVolume, moving: FeatureVolume) -> None:
        self.compiled = compiled.usable(fixed.features, moving.features)
        if self.compiled:
            self.fixed, self.moving = compiled.channels_last(fixed.features), compiled.channels_last(moving.features)
            self.weights, self.place = (fixed.weight, moving.weight), compiled.place(shape3(moving.weight), shape3(fixed.weight))
        else:
            self.fixed, self.moving = fixed.features, torch.cat([moving.features, moving.weight[None]])
            self.weights = (fixed.weight, moving.weight)

    def gradient(self, disp: Tensor) -> tuple[Tensor, Tensor]:
        if self.compiled:
            loss, slope = compiled.ssd(self.fixed, self.moving, *self.weights, disp, self.place)
            return torch.tensor(loss / disp[0].numel()), slope
        disp = disp.detach().requires_grad_()
        with torch.enable_grad():
            warped = warp(self.moving, disp)
        values = warped.detach()
        weight = self.weights[0] * values[-1]
        difference = values[:-1] - self.fixed
        upstream = torch.cat([2 * weight * difference, torch.zeros_like(weight)[None]])
        return (total(weight * difference.square().sum(0)) / weight.numel(),
                torch.autograd.grad(warped, disp, upstream)[0])


class LNCC:
    """Negative squared local cross-correlation of intensities over a cubic window (Avants et al. 2008).

    With window means F, M and window (co)variances: ``cc = cov(f, m)^2 / (var f var m)``, 1 where one image is locally a linear
    function of the other. ``FLOOR`` is added to both variances and to the size of the covariance: two windows without contrast
    match, one without and one with contrast do not, and equal images are at their optimum where they are.
    """

    FLOOR = 1e-5  # variance below which a window has no contrast, intensities in [0, 1]: a standard deviation of 0.3 %

    def __init__(self, fixed: Tensor, moving: Tensor, fixed_weight: Tensor, moving_weight: Tensor, window: int) -> None:
        """Images and weights (i, j, k), intensities in [0, 1]; ``window`` is the odd width in cells."""
        self.boxes = [box_matrix(n, window).to(fixed.device) for n in shape3(fixed)]
        self.adjoint = [box.T.contiguous() for box in self.boxes]
        self.fixed, self.fixed_weight = fixed, fixed_weight
        self.moving = torch.stack([moving, moving_weight])
        self.fixed_mean = apply_axes(fixed, self.boxes)
        self.fixed_var = (apply_axes(fixed.square(), self.boxes) - self.fixed_mean.square()).clamp_min(0) + self.FLOOR

    def gradient(self, disp: Tensor) -> tuple[Tensor, Tensor]:
        moving, moving_weight = warp(self.moving, disp)
        fields = torch.stack([moving, moving.square(), self.fixed * moving])
        means = apply_axes(fields, self.boxes)
        if compiled.usable(means):
            mean_cc = compiled.correlation(means, self.fixed_mean, self.fixed_var, self.fixed_weight, moving_weight, self.FLOOR)
            cc = torch.tensor(mean_cc / moving.numel())
        else:
            mean, square, product = means
            variance = (square - mean.square()).clamp_min(0) + self.FLOOR
            covariance = product - self.fixed_mean * mean
            covariance = covariance + torch.where(covariance >= 0, self.FLOOR, -self.FLOOR)
            a = self.fixed_weight * moving_weight * covariance / (self.fixed_var * variance)
            ab = a * covariance / variance
            cc = total(a * covariance) / moving.numel()
            means = torch.stack([a, ab, a * self.fixed_mean - ab * mean])
        # d cc / d m(y) = 2 sum_x W(x, y) a(x) [(f(y) - F(x)) - b(x) (m(y) - M(x))]
        a, ab, rest = apply_axes(means, self.adjoint)
        return -cc, warp_slope(self.moving[:1], disp, (-2 * (self.fixed * a - moving * ab - rest))[None])


class MutualInformation:
    """Negative mutual information of intensities over the whole view (Viola, Wells 1997; Maes et al. 1997).

    It asks what a grey value of one image says about that of the other, wherever they lie: no relation between the two is
    assumed, as it is for tissue in CT and MR. Intensities are replaced by their ranks, so that every bin holds about as many
    voxels and no window decides what can be told apart. The joint histogram of bins a, b is linear in the moving value and
    smoothed along both axes; a voxel's slope is that of the smoothed ``log p(a, b) / (p(a) p(b))`` along b.
    """

    BINS = 32
    SMOOTHING = 1.0  # bins, Gaussian
    FLOOR = 1e-4  # share of the voxels spread over all bins: the logarithm stays finite

    def __init__(self, fixed: Tensor, moving: Tensor, fixed_weight: Tensor, moving_weight: Tensor) -> None:
        """Images and weights (i, j, k), intensities in [0, 1], 0 for what has none."""
        self.fixed = (ranks(fixed, fixed_weight) * (self.BINS - 1)).round().long()
        self.fixed_weight = fixed_weight
        self.moving = torch.stack([ranks(moving, moving_weight) * (self.BINS - 1), moving_weight])
        smoother = gaussian_matrix(self.BINS, self.SMOOTHING)
        assert smoother is not None
        self.smoother = smoother.double().to(fixed.device)

    def gradient(self, disp: Tensor) -> tuple[Tensor, Tensor]:
        moving, moving_weight = warp(self.moving, disp)
        weight, n = self.fixed_weight * moving_weight, self.BINS
        low = moving.floor().clamp_(0, n - 2)
        upper = (moving - low).double().flatten()
        low = low.long()
        pairs, w = (self.fixed * n + low).flatten(), weight.double().flatten()
        joint = torch.bincount(pairs, w * (1 - upper), n * n) + torch.bincount(pairs + 1, w * upper, n * n)
        joint = self.smoother @ (joint / joint.sum().clamp_min(1e-12)).reshape(n, n) @ self.smoother.T + self.FLOOR / n**2
        joint = joint / joint.sum()
        relation = (joint / (joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True))).log()
        slope = (self.smoother.T @ relation @ self.smoother).diff(dim=1).float()
        by_moving = -weight * slope[self.fixed, low]
        return -(joint * relation).sum().float(), warp_slope(self.moving[:1], disp, by_moving[None])


def ranks(image: Tensor, weight: Tensor) -> Tensor:
    """Intensities (i, j, k) by rank: the share of the valid voxels above zero that are darker, scaled to [0.1, 1]; zeros stay 0.

    The ranks of 65 quantiles, with straight lines between them.
    """
    known = image[(weight > 0.5) & (image > 0)].cpu().numpy()
    if not known.size:
        return torch.zeros_like(image)
    values, index = np.unique(np.quantile(known, np.linspace(0, 1, 65)), return_index=True)
    rank = 0.1 + 0.9 * np.interp(image.cpu().numpy(), values, index / 64)
    return torch.from_numpy(rank.astype(np.float32)).to(image.device) * (image > 0)


class Sum:
    """Weighted sum of data terms."""

    def __init__(self, terms: Sequence[tuple[float, Similarity]]) -> None:
        self.terms = tuple(terms)

    def gradient(self, disp: Tensor) -> tuple[Tensor, Tensor]:
        loss, slope = disp.new_zeros(()), torch.zeros_like(disp)
        for weight, term in self.terms:
            value, by_disp = term.gradient(disp)
            loss = loss + weight * value
            slope.add_(by_disp, alpha=weight)
        return loss, slope


def laplacian(disp: Tensor, stretch: Sequence[float]) -> Tensor:
    """Sum of second derivatives of every component, zero slope across the border; axis a counts ``stretch[a]`` squared."""
    padded = pad(disp[None], (1,) * 6, mode="replicate")[0]
    core = (slice(1, -1),) * 3
    total = torch.zeros_like(disp)
    for axis in range(3):
        low, high = list(core), list(core)
        low[axis], high[axis] = slice(0, -2), slice(2, None)
        total += stretch[axis] ** 2 * (padded[(slice(None), *low)] + padded[(slice(None), *high)] - 2 * disp)
    return total


def refine(similarity: Similarity, disp: Tensor, spacing: Sequence[float], iterations: int, *, rate: float, regularity: float,
           step_sigma: float, damping: float, anchor: Tensor | None = None, until: float = math.inf,
           progress: Callable[[int, float], None] | None = None) -> tuple[Tensor, list[float]]:
    """Run Adam on one lattice.

    The objective is what the steps go down: the data term plus ``regularity`` times the diffusion energy a cell. It is known at
    every field but the one after the last step; that one is returned as long as the objective kept most of its fall
    (``KEPT``), else the field with the lowest one. The energy costs one product of field and Laplacian, and is not finite as
    soon as the field is not: no other check is needed.

    Args:
        similarity: the data term on this lattice.
        disp: start, (3, i, j, k), cells.
        spacing: cell size (mm) along each axis of the lattice.
        iterations: number of Adam steps.
        rate: step length, in the smallest cell size.
        regularity: weight of the diffusion energy against the data term.
        step_sigma: Gaussian smoothing of each step, in the smallest cell size.
        damping: added to Adam's denominator: gradients well below it move little.
        anchor: a field (3, i, j, k), cells, from which differences cost diffusion energy; the whole field costs it without.
        until: of ``time.monotonic()``; no step is begun that would end after it, by the mean length of those before.
        progress: called with the iteration and its loss.

    Returns:
        The field, and the data term's value before each step: fewer than ``iterations`` where time was up. Where the objective
        was not finite, the last value is NaN and the field is the best one before.

    Raises:
        RegistrationError: if the objective is not finite at the start.
    """
    disp, h = disp.contiguous(), min(spacing)
    stretch = [h / s for s in spacing]
    to_cells = disp.new_tensor(stretch)[:, None, None, None]
    smoother = [gaussian_matrix(n, step_sigma * r) for n, r in zip(shape3(disp), stretch, strict=True)]
    first, second = torch.zeros_like(disp), torch.zeros_like(disp)
    losses: list[float] = []
    best, start, lowest, last = disp, math.inf, math.inf, math.inf
    began = time.monotonic()
    for t in range(1, iterations + 1):
        if until < math.inf and (now := time.monotonic()) + (now - began) / max(t - 1, 1) > until:
            break
        loss, slope = similarity.gradient(disp)
        losses.append(float(loss))
        added = disp if anchor is None else disp - anchor
        if compiled.usable(disp, slope):
            weights = [[regularity * a**2 / c for a in stretch] for c in stretch]
            bending = -sum(e / c for e, c in zip(compiled.bend(slope, added, stretch, weights), stretch, strict=True))
            compiled.adam(slope, first, second, t, (0.9, 0.99), [rate * c for c in stretch], damping)
            step = slope
        else:
            in_h = added / to_cells  # in units of h
            bend = laplacian(in_h, stretch)
            bending = -regularity * float(total(in_h * bend))
            slope = slope * to_cells - regularity * bend  # by the field in units of h
            first.lerp_(slope, 0.1)
            second.lerp_(slope.square_(), 0.01)
            step = (first / (1 - 0.9**t)).div_((second / (1 - 0.99**t)).sqrt_().add_(damping)).mul_(-rate * to_cells)
        last = losses[-1] + 0.5 * bending / disp[0].numel()
        if not math.isfinite(last):
            if t == 1:
                raise RegistrationError("the similarity of the images is not finite before the first step; please report "
                                        "this with the images' headers")
            losses[-1] = math.nan
            break
        start = last if t == 1 else start
        if last <= lowest:
            best, lowest = disp, last
        disp = compose(disp, apply_axes(step, smoother))
        if progress is not None:
            progress(t, losses[-1])
    kept = last <= start - KEPT * (start - lowest)  # False for NaN
    return disp if kept or not losses else best, losses
