"""The released algorithm once more, as plainly as its formulas are written: loops, autograd, torch's optimiser.

Nothing here uses dinoreg; arrays are (i, j, k) or (c, i, j, k).
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy import ndimage
from torch.nn.functional import affine_grid, avg_pool3d, grid_sample

Array = np.ndarray
BETAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def resize_axis(x: Array, axis: int, size: int) -> Array:
    """Linear interpolation, half-pixel convention: sample a of ``size`` lies at (a + 1/2) n / size - 1/2."""
    n = x.shape[axis]
    at = (np.arange(size) + 0.5) * n / size - 0.5
    weights = np.stack([np.interp(at, np.arange(n), unit) for unit in np.eye(n)])  # (n, size)
    return np.moveaxis(np.moveaxis(x, axis, -1) @ weights, -1, axis)


def resize(x: Array, shape: tuple[int, int, int]) -> Array:
    for axis, size in enumerate(shape):
        x = resize_axis(x, x.ndim - 3 + axis, size)
    return x


def unit_range(image: Array, low: float, high: float) -> Array:
    return (np.clip(image, low, high) - low) / (high - low)


def largest(mask: Array) -> Array:
    labels, count = ndimage.label(mask)
    return labels == 1 + np.argmax([(labels == n).sum() for n in range(1, count + 1)]) if count else mask


def body(unit: Array, threshold: float) -> Array:
    planes = [largest(ndimage.binary_opening(ndimage.binary_fill_holes(largest(unit[:, :, k] > threshold)), np.ones((5, 5))))
              for k in range(unit.shape[2])]
    return np.stack(planes, 2)


def encoded_slices(count: int, gap: int) -> list[int]:
    return [*range(0, count - 1, gap), count - 1]


def images(unit: Array, tokens: tuple[int, int], gap: int) -> torch.Tensor:
    """What the encoder is shown: (slices, 3, 14 h, 14 w)."""
    planes = [resize_axis(resize_axis(unit[:, :, k], 0, 14 * tokens[0]), 1, 14 * tokens[1])
              for k in encoded_slices(unit.shape[2], gap)]
    return torch.tensor(np.stack(planes), dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)


def all_slices(encoded: Array, count: int, gap: int) -> Array:
    """Tokens (encoded, h, w, c) -> (count, h, w, c); the last segment as the released code fills it."""
    index = encoded_slices(count, gap)
    result = np.zeros((count, *encoded.shape[1:]))
    result[index] = encoded
    for n in range(1, len(index)):
        before, here, last = encoded[n - 1], encoded[n], n == len(index) - 1
        span = count - index[n - 1] if last else gap
        for i in range(1, span):  # i steps back from the end of the segment, which for the last one is a slice too far
            result[(count if last else index[n]) - i] = (here * (span - i) + before * i) / span
    return result


def whole_patches(mask: Array, tokens: tuple[int, int]) -> Array:
    """(slices, h, w): patches that lie inside the mask as a whole."""
    fine = [np.kron(mask[:, :, k], np.ones(tokens)) for k in range(mask.shape[2])]  # each patch is now (n_i, n_j) cells
    n, m = mask.shape[:2]
    return np.stack([plane.reshape(tokens[0], n, tokens[1], m).mean((1, 3)) > 0.99 for plane in fine])


def features(tokens: list[Array], masks: list[Array], components: int, shape: tuple[int, int, int],
             seed: int) -> tuple[torch.Tensor, list[Array]]:
    """Joint randomised PCA of foreground tokens (slices, h, w, c); the components and both volumes at the voxels."""
    everything = torch.tensor(np.concatenate([t[m] for t, m in zip(tokens, masks, strict=True)]), dtype=torch.float32)
    torch.manual_seed(seed)
    _, _, v = torch.pca_lowrank(everything, q=components)
    volumes = []
    for t, m in zip(tokens, masks, strict=True):
        projected = np.where(m[..., None], t @ v.double().numpy(), 0)  # (slices, h, w, k)
        volumes.append(resize(projected.transpose(3, 1, 2, 0), shape))
    return v, volumes


def pool(x: Array, size: int) -> Array:
    c, i, j, k = x.shape[0], *(n // size for n in x.shape[1:])
    return x[:, : i * size, : j * size, : k * size].reshape(c, i, size, j, size, k, size).mean((2, 4, 6))


def box(x: Array) -> Array:
    """3^3 moving average over the last three axes, zero beyond the border."""
    wide = np.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1)] * 3)
    i, j, k = x.shape[-3:]
    return sum(wide[..., a : a + i, b : b + j, c : c + k] for a, b, c in itertools.product(range(3), repeat=3)) / 27


def one_way(fixed: Array, moving: Array, half_width: int) -> Array:
    """Field (3, i, j, k) in cells by coupled convex optimisation."""
    h, (i, j, k) = half_width, fixed.shape[1:]
    wide = np.pad(moving, [(0, 0), (h, h), (h, h), (h, h)])
    steps = [(a, b, c) for c, b, a in itertools.product(range(-h, h + 1), repeat=3)]
    moved = (wide[:, h + a : h + a + i, h + b : h + b + j, h + c : h + c + k] for a, b, c in steps)
    cost = box(box(np.stack([((fixed - m) ** 2).sum(0) for m in moved])))
    vectors = np.array(steps, dtype=float)
    disp = box(vectors[cost.argmin(0)].transpose(3, 0, 1, 2))
    for beta in BETAS:
        distance = ((vectors[:, :, None, None, None] - disp) ** 2).sum(1)
        disp = box(vectors[(cost + beta * distance).argmin(0)].transpose(3, 0, 1, 2))
    return disp


def follow(x: Array, disp: Array) -> Array:
    """x(p + disp(p)) with displacements n / (n - 1) too long and zeros beyond the border."""
    shape = x.shape[1:]
    longer = [d * n / (n - 1) for d, n in zip(disp, shape, strict=True)]
    at = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")) + longer
    return np.stack([ndimage.map_coordinates(channel, at, order=1, mode="grid-constant") for channel in x])


def discrete(fixed: Array, moving: Array, size: int, half_width: int, iterations: int) -> Array:
    """Field (3, i, j, k) in voxels."""
    a, b = pool(fixed, size), pool(moving, size)
    there, back = one_way(a, b, half_width), one_way(b, a, half_width)
    for _ in range(iterations):
        there, back = (there - follow(back, there)) / 2, (back - follow(there, back)) / 2
    return resize(there, fixed.shape[1:]) * size


def adam(fixed: Array, moving: Array, disp: Array, iterations: int, rate: float, regularity: float) -> Array:
    """Field of the last evaluation."""
    f, m = (torch.tensor(x, dtype=torch.float32)[None] for x in (fixed, moving))
    shape = f.shape[2:]
    vectors = torch.tensor(disp, dtype=torch.float32)[None].requires_grad_()
    optimiser = torch.optim.Adam([vectors], lr=rate)
    base = affine_grid(torch.eye(3, 4)[None], [1, 1, *shape], align_corners=False)
    unit = torch.tensor([2 / (n - 1) for n in shape])
    for _ in range(iterations):
        optimiser.zero_grad()
        u = vectors
        for _ in range(5):
            u = avg_pool3d(u, 7, stride=1, padding=3)
        where = base + (u[0].permute(1, 2, 3, 0) * unit).flip(-1)[None]
        data = (grid_sample(m, where, align_corners=False) - f).square().mean()
        bend = sum((u.narrow(d, 1, u.shape[d] - 1) - u.narrow(d, 0, u.shape[d] - 1)).square().mean() for d in (2, 3, 4))
        (data + regularity * bend).backward()
        optimiser.step()
    return u[0].detach().numpy()
