"""Large volumes slab by slab: what is done voxel by voxel needs memory for some of them at a time, not for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

VOXELS = 2_000_000  # of a slab: three coordinates in double precision are 48 MB
_voxels: ContextVar[int | None] = ContextVar("voxels", default=None)


@contextmanager
def of(voxels: int) -> Iterator[None]:
    """Have slabs of another size within: results are the same."""
    token = _voxels.set(voxels)
    try:
        yield
    finally:
        _voxels.reset(token)


def slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first of three axes that follow one another, of one plane or of at most ``VOXELS`` voxels (or as many as
    :func:`of` says)."""
    rows = max(1, (_voxels.get() or VOXELS) // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def wider(slab: slice, margin: int, n: int) -> tuple[slice, slice]:
    """A slab of an axis of n with up to ``margin`` more planes on either side, and where the slab itself lies in that."""
    low, high = max(0, slab.start - margin), min(n, slab.stop + margin)
    return slice(low, high), slice(slab.start - low, slab.stop - low)
