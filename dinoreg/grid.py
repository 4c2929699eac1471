"""The one place that knows how voxels, lattices and displacements relate.

Conventions (everything else relies on them):

* A volume or lattice of n cells along an axis covers the normalised interval [-1, 1]; cell x has its centre at
  u = (2x + 1) / n - 1 (``align_corners=False``). Lattices of different size over the same volume cover the same extent, so
  resizing maps u to u and cell a of m lies at voxel (a + 1/2) n / m - 1/2 of n. Sizes need not divide one another.
* A displacement field ``disp`` has shape (3, i, j, k), component c along array axis c, in cells of its own lattice, and pulls
  back: ``warped(x) = moving(x + disp(x))``. One cell is 2 / n in normalised coordinates.
* Outside a volume the nearest voxel is meant (border replication): smoothing and sampling never fade towards zero.

Linear operations along one axis (averaging, interpolation, smoothing) are (n_out, n_in) matrices with rows that sum to one,
exact at the borders; three of them make a separable operation on a volume, and the transposes make its adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, grid_sample, max_pool3d, pad

from dinoreg import compiled
from dinoreg.slabs import slabs, wider

Shape = tuple[int, int, int]
GAUSS_REACH = 14  # cells: exp(-15^2 / 2) is zero in float32
SLABS = 8  # a warp is cut into this many slabs whatever the machine, so that the result does not depend on the thread count


def shape3(x: Tensor) -> Shape:
    """The last three sizes of a tensor."""
    i, j, k = x.shape[-3:]
    return i, j, k


def apply_axes(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Apply one (n_out, n_in) matrix along each of the last three axes; ``None`` leaves an axis as it is.

    Args:
        x: shape (..., i, j, k).
        matrices: three matrices, for i, j and k.

    Returns:
        Tensor of shape (..., i', j', k').

    Every product is a batch of small ones: a single large one is cut up by the number of threads, which shows in its last bits.
    """
    lead = x.shape[:-3]
    x = x.reshape(-1, *x.shape[-3:])  # (c, i, j, k)
    if compiled.usable(x):
        return (out := compiled.apply_axes(x, matrices)).reshape(*lead, *out.shape[1:])
    a, b, c = matrices
    if c is not None:
        n, i, j, k = x.shape
        x = torch.bmm(x.reshape(n * i, j, k), c.to(x).T.expand(n * i, -1, -1)).reshape(n, i, j, -1)
    if b is not None:
        x = b.to(x) @ x
    if a is not None:
        n, i, j, k = x.shape
        if n > 1:
            x = (a.to(x) @ x.reshape(n, i, j * k)).reshape(n, -1, j, k)
        else:
            x = (a.to(x) @ x[0].transpose(0, 1)).transpose(0, 1)[None]
    return x.reshape(*lead, *x.shape[1:])


def total(x: Tensor) -> Tensor:
    """Sum over everything in double precision, line by line: in an order that the number of threads does not change."""
    x = x.sum(-1, dtype=torch.float64)
    while x.ndim:
        x = x.sum(-1)
    return x


@lru_cache(maxsize=256)
def area_matrix(n_in: int, n_out: int) -> Tensor:
    """Average over the part of the input that each of ``n_out`` equal cells covers, split cells counted by their share."""
    edges_out = torch.arange(n_out + 1, dtype=torch.float64) * (n_in / n_out)
    cells = torch.arange(n_in, dtype=torch.float64)
    overlap = torch.minimum(edges_out[1:, None], cells + 1) - torch.maximum(edges_out[:-1, None], cells)
    overlap = overlap.clamp_min(0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


@lru_cache(maxsize=256)
def linear_matrix(n_in: int, n_out: int) -> Tensor:
    """Linear interpolation of ``n_in`` cells at the centres of ``n_out`` cells over the same extent."""
    return linear_weights((torch.arange(n_out, dtype=torch.float64) + 0.5) * (n_in / n_out) - 0.5, n_in)


def linear_weights(x: Tensor, n: int) -> Tensor:
    """Matrix (len(x), n) that interpolates n cells linearly at positions ``x`` (cells, replicated beyond the borders)."""
    x = x.double().clamp(0, n - 1)
    low = x.floor().clamp(max=max(n - 2, 0)).long()
    matrix = torch.zeros(len(x), n, dtype=torch.float64)
    rows = torch.arange(len(x))
    matrix[rows, low] += 1 - (x - low)
    if n > 1:
        matrix[rows, low + 1] += x - low
    return matrix.float()


@lru_cache(maxsize=256)
def gaussian_matrix(n: int, sigma: float) -> Tensor | None:
    """Gaussian smoothing over n cells, sigma in cells, weights renormalised at the borders; ``None`` for no smoothing."""
    if sigma <= 0:
        return None
    x = torch.arange(n, dtype=torch.float64)
    matrix = torch.exp(-0.5 * ((x[:, None] - x) / sigma) ** 2)
    return (matrix / matrix.sum(1, keepdim=True)).float()


@lru_cache(maxsize=256)
def box_matrix(n: int, width: int, repeats: int = 1, zero_border: bool = False) -> Tensor:
    """Moving average of odd ``width`` over n cells, ``repeats`` times.

    Near a border the average is taken over the cells that exist; ``zero_border`` counts the missing ones as zero instead
    (which damps a field near the border: only the published algorithm wants that).
    """
    columns = torch.eye(n, dtype=torch.float64)
    for _ in range(repeats):
        columns = avg_pool1d(columns, width, stride=1, padding=width // 2, count_include_pad=zero_border)
    return columns.T.float()


def resize(x: Tensor, shape: Shape) -> Tensor:
    """Bring (..., i, j, k) to another lattice over the same extent: area average where it gets coarser, linear where finer."""
    return apply_axes(x, [None if n == m else area_matrix(n, m) if m < n else linear_matrix(n, m)
                          for n, m in zip(shape3(x), shape, strict=True)])


def resize_disp(disp: Tensor, shape: Shape) -> Tensor:
    """Bring a displacement field (3, i, j, k) to another lattice over the same extent, in cells of that lattice."""
    if shape3(disp) == shape:
        return disp.clone()
    scale = disp.new_tensor([m / n for n, m in zip(shape3(disp), shape, strict=True)])
    return resize(disp, shape).mul_(scale[:, None, None, None])


def lattice_shape(shape: Shape, spacing: Sequence[float], cell_mm: float) -> Shape:
    """Cells of about ``cell_mm`` millimetres over a volume, never finer than its voxels and at least one an axis."""
    i, j, k = (max(1, min(n, round(n * s / cell_mm))) for n, s in zip(shape, spacing, strict=True))
    return i, j, k


def limited_cell(shape: Shape, spacing: Sequence[float], cell_mm: float, max_cells: int) -> float:
    """The smallest cell from ``cell_mm`` on, to 1 %, whose lattice (``lattice_shape``) has at most ``max_cells`` cells."""
    while (cells := math.prod(lattice_shape(shape, spacing, cell_mm))) > max_cells:
        cell_mm *= max(1.001, (cells / max_cells) ** (1 / 3))  # too little where an axis keeps its voxels: then once more
    return cell_mm


def identity(shape: Shape, device: torch.device | str = "cpu") -> Tensor:
    """Cell indices (3, i, j, k) of a lattice, float32."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=device) for n in shape), indexing="ij"))


def warp(x: Tensor, disp: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Sample ``x`` where a displacement field of the same lattice points: ``out(p) = x(p + disp(p))``.

    Args:
        x: (c, i, j, k), or any lattice over the same extent as ``disp``.
        disp: (3, i', j', k') in cells of its own lattice.
        mode: "bilinear" (trilinear in 3D) or "nearest".
        padding: "border", or "zeros" for the published algorithm, which takes what lies outside for zero.

    Returns:
        (c, i', j', k'), with the nearest voxel of ``x`` where ``disp`` points outside.
    """
    c, shape = x.shape[0], shape3(disp)
    if mode == "bilinear" and padding == "border" and compiled.usable(x, disp):
        return compiled.warp(x, disp, compiled.place(shape3(x), shape))
    coordinates = []
    for axis in (2, 1, 0):  # grid_sample wants the fastest axis first
        n = shape[axis]
        at = [1, 1, 1]
        at[axis] = n
        base = ((2 * torch.arange(n, dtype=disp.dtype, device=disp.device) + 1) / n - 1).reshape(at)
        coordinates.append(base + disp[axis] * (2 / n))
    grid = torch.stack(coordinates, dim=-1)  # (i', j', k', 3)
    if disp.is_cuda:
        return grid_sample(x[None], grid[None], mode=mode, padding_mode=padding, align_corners=False)[0]
    # On a CPU grid_sample runs one thread a batch item: slabs along the first axis become the batch.
    slabs = -(-shape[0] // SLABS)
    grid = pad(grid, (0, 0, 0, 0, 0, 0, 0, slabs * SLABS - shape[0])).reshape(SLABS, slabs, *grid.shape[1:])
    out = grid_sample(x.expand(SLABS, *x.shape), grid, mode=mode, padding_mode=padding, align_corners=False)
    out = out.transpose(0, 1).reshape(c, SLABS * slabs, *shape[1:])
    return out[:, : shape[0]]


def warp_slope(x: Tensor, disp: Tensor, upstream: Tensor) -> Tensor:
    """The derivative by ``disp`` of the sum of ``upstream * warp(x, disp)``: (3, i', j', k').

    Args:
        x: (1, i, j, k).
        disp: (3, i', j', k').
        upstream: (1, i', j', k').
    """
    if compiled.usable(x, disp, upstream):
        return compiled.warp_slope(x[0], disp, compiled.place(shape3(x), shape3(disp)), upstream[0])
    disp = disp.detach().requires_grad_()
    with torch.enable_grad():
        warped = warp(x, disp)
    return torch.autograd.grad(warped, disp, upstream)[0]


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The field that first follows ``inner``, then ``outer``: ``x + inner(x) + outer(x + inner(x))``; all (3, i, j, k)."""
    return inner + warp(outer, inner)


def gradient(x: Tensor, axis: int) -> Tensor:
    """Derivative along the last-but-(3 - axis) axis, per cell: central differences inside, one-sided at the borders."""
    dim = x.ndim - 3 + axis
    n = x.shape[dim]
    if n == 1:
        return torch.zeros_like(x)
    inner = (x.narrow(dim, 2, n - 2) - x.narrow(dim, 0, n - 2)) / 2 if n > 2 else x.narrow(dim, 0, 0)
    first = x.narrow(dim, 1, 1) - x.narrow(dim, 0, 1)
    last = x.narrow(dim, n - 1, 1) - x.narrow(dim, n - 2, 1)
    return torch.cat([first, inner, last], dim)


def jacobian_determinant(disp: Tensor) -> Tensor:
    """det(I + grad disp) of a field (3, i, j, k) at every cell: (i, j, k), 1 where nothing changes volume, <= 0 at folds."""
    rows = [[gradient(disp[c], axis) + (1.0 if c == axis else 0.0) for axis in range(3)] for c in range(3)]
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def unfold(disp: Tensor, floor: float = 0.05, passes: int = 50) -> int:
    """Smooth a field just where it folds or nearly does, until det(I + grad disp) >= ``floor`` everywhere.

    Each pass replaces the field within some voxels of every offending one by its Gaussian average (sigma 1 voxel), so that the
    rest stays as it is, to the bit. The determinant is that of central differences at the voxels, as folds are counted.

    Args:
        disp: (3, i, j, k), voxels; is changed in place.
        floor: smallest determinant wanted; 1 means no change of volume.
        passes: at most; the neighbourhood grows by a voxel every ten.

    Returns:
        The number of voxels that were below ``floor`` at first.
    """
    shape = shape3(disp)
    first = 0
    for number in range(passes):
        bad = torch.empty(shape, dtype=torch.bool, device=disp.device)
        for slab in slabs(shape):
            rows, inner = wider(slab, 1, shape[0])
            bad[slab] = (jacobian_determinant(disp[:, rows]) < floor)[inner]
        count = int(bad.sum())
        first = first or count
        if not count:
            break
        smooth_near(disp, bad, 1 + number // 10)
    return first


def smooth_near(disp: Tensor, marked: Tensor, reach: int) -> None:
    """Replace a field (3, i, j, k), in place, by its Gaussian average (sigma 1 cell) within ``reach`` cells of the marked ones
    (i, j, k) bool, and by part of it one cell farther: a soft edge, so that none is cut into the field."""
    shape = shape3(disp)
    blur = [gaussian_matrix(n, 1.0) for n in shape]
    assert blur[0] is not None
    changed = []
    for slab in slabs(shape):
        rows, inner = wider(slab, reach + 1, shape[0])
        if not bool(marked[rows].any()):
            continue
        near = max_pool3d(marked[rows][None, None].float(), 2 * reach + 1, stride=1, padding=reach)[0]
        near = apply_axes(near, [box_matrix(n, 3) for n in shape3(near)])[:, inner]
        rows, inner = wider(slab, GAUSS_REACH, shape[0])
        average = apply_axes(disp[:, rows], [blur[0][slab, rows], *blur[1:]])
        changed.append((slab, torch.lerp(disp[:, slab], average, near)))
    for slab, field in changed:
        disp[:, slab] = field
