"""Large volumes slab by slab: what is done voxel by voxel needs memory for some of them at a time, not for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

VOXELS = 2_000_000  # of a slab: three coordinates in double precision are 48 MB


def slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first of three axes that follow one another, each of at most ``VOXELS`` voxels or of one plane."""
    rows = max(1, VOXELS // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def wider(slab: slice, margin: int, n: int) -> tuple[slice, slice]:
    """A slab of an axis of n with up to ``margin`` more planes on either side, and where the slab itself lies in that."""
    low, high = max(0, slab.start - margin), min(n, slab.stop + margin)
    return slice(low, high), slice(slab.start - low, slab.stop - low)
