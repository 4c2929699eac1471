"""Slab by slab the same as at once: slabs bound the memory, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_encoder import affine
from scipy import ndimage

from dinoreg import draw, metrics
from dinoreg.config import IntensityConfig
from dinoreg.initial import folded
from dinoreg.preprocess import body_mask, on_grid, to_unit_range
from dinoreg.report import field_metrics
from dinoreg.result import Registration
from dinoreg.slabs import slabs, wider
from dinoreg.transforms import invert, read_transform, write_composite, write_field_mm
from dinoreg.volume import Volume

SHAPE = (13, 11, 9)
HEADER = affine((1.0, 1.5, 2.0), "LPS", 20.0)


def noise(*shape: int, seed: int = 0, sigma: float = 2.0) -> np.ndarray:
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), [0] * (len(shape) - 3) + [sigma] * 3)
    return np.asarray(smooth / smooth.std(), dtype=np.float32)


DISP, IMAGE = noise(3, *SHAPE), Volume(np.rint(300 * noise(15, 12, 10, seed=1)).astype(np.int16), affine((1.1, 1.4, 1.9), "RAS"))


def written(path: Path, write: Callable[[Path], None]) -> Any:
    write(path)
    return read_transform(path).points(np.random.default_rng(2).uniform(-5, 5, (20, 3)))


WAYS: dict[str, Callable[[Path], Any]] = {
    "determinant": lambda _: metrics.jacobian_determinant(DISP),
    "warped labels": lambda _: metrics.warp_array(IMAGE.array, DISP, 0),
    "warped image": lambda _: Registration(DISP, HEADER).warp(IMAGE).array,
    "warped mask": lambda _: Registration(DISP, HEADER).warp(Volume(IMAGE.array > 0, IMAGE.affine), order=0).array,
    "inverse": lambda _: np.concatenate([part.ravel() for part in invert(DISP, HEADER, IMAGE)]),
    "resampled": lambda _: on_grid(IMAGE, Volume(DISP[0], HEADER)),
    "scaled": lambda _: to_unit_range(noise(*SHAPE), "MR", IntensityConfig()),
    "body": lambda _: body_mask(noise(*SHAPE), np.ones(SHAPE, dtype=bool)),
    "folded": lambda _: folded(DISP, affine((1.1, 1.0, 0.9), "RAS", 5.0), HEADER),
    "field in mm": lambda folder: written(folder / "f.mha", lambda path: write_field_mm(path, DISP, HEADER)),
    "composite": lambda folder: written(folder / "t.h5", lambda path: write_composite(path, DISP, HEADER, np.eye(4))),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("voxels", [1, 250])  # a plane at a time, and planes that do not divide the volume
def test_slab_by_slab_is_the_same_to_the_bit(name: str, voxels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = WAYS[name](tmp_path)
    monkeypatch.setattr("dinoreg.slabs.VOXELS", voxels)
    assert len(list(slabs(SHAPE))) > 5
    np.testing.assert_array_equal(WAYS[name](tmp_path), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_spreads_and_lengths_are_the_same_but_for_the_order_of_sums(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    determinant, mask = metrics.jacobian_determinant(0.4 * DISP), (IMAGE.array[:13, :11, :9] > 0) if masked else None
    results = []
    for voxels in (2_000_000, 1):
        monkeypatch.setattr("dinoreg.slabs.VOXELS", voxels)
        results.append([metrics.sdlogj(determinant, mask), metrics.sdlogj_official(determinant, mask),
                        *(value or 0.0 for value in field_metrics(DISP, (1.0, 2.0, 3.0)).values())])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-12)
    inside = determinant if mask is None else determinant[mask]
    assert results[1][0] == pytest.approx(float(np.log(inside[inside > 0].astype(np.float64)).std()), rel=1e-12)


def test_slabs_follow_one_another_and_cover_the_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.slabs.VOXELS", 3 * 11 * 9 + 5)
    assert [(s.start, s.stop) for s in slabs(SHAPE)] == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 13)]
    rows, inner = wider(slice(3, 6), 2, 13)
    assert (rows, inner) == (slice(1, 8), slice(2, 5)) and list(range(13))[rows][inner] == [3, 4, 5]
    assert wider(slice(0, 3), 2, 4) == (slice(0, 4), slice(0, 3))


def test_pictures_of_large_volumes_take_every_second_voxel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With lengths in mm as they were, and the folds of all voxels."""
    volumes = [Volume(noise(*SHAPE, seed=n), HEADER) for n in range(3)]
    whole = draw.turned(*volumes, DISP, confidence=DISP[0])
    monkeypatch.setattr(draw, "_VOXELS", 500)
    coarse = draw.turned(*volumes, DISP, confidence=DISP[0])
    assert coarse.fixed.shape == (7, 6, 5) and coarse.spacing == pytest.approx([2 * s for s in whole.spacing])
    assert coarse.folds == whole.folds > 0
    for name in ("fixed", "moving", "warped", "determinant", "confidence"):
        assert np.array_equal(getattr(coarse, name), getattr(whole, name)[::2, ::2, ::2])
    np.testing.assert_allclose(coarse.disp_mm, whole.disp_mm[:, ::2, ::2, ::2], rtol=1e-6)
