"""Automatic initial alignment: a moved body is found, an untouched one is left alone, and what is reported is what was done."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import cache

import numpy as np
import pytest
import torch
from fake_encoder import affine
from scipy import ndimage
from small_pair import QUICK
from test_initial import turned
from torch.nn.functional import pad

import dinoreg
from dinoreg import align as align_module
from dinoreg.align import Alignment, Search, View, align, applied, explained, polish, reached
from dinoreg.config import IntensityConfig, get_preset
from dinoreg.errors import InputError
from dinoreg.features import unrelated_distance
from dinoreg.registration import Registrar
from dinoreg.volume import Volume

SHAPE, SPACING = (40, 36, 32), (5.0, 5.0, 6.0)
MOVING_SHAPE, MOVING_SPACING = (38, 44, 42), (6.0, 5.0, 5.0)
NEAR = np.array([6.0, -4.0, 5.0])  # mm between the two before anything is moved: the registration's own business


@pytest.fixture(autouse=True)
def _small_lattices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_module, "CELLS", 16**3)  # of 12 mm: a third of the time


@cache
def anatomy() -> np.ndarray:
    """Organs of some 40 mm in an ellipsoid of 80 x 65 x 75 mm half axes; 2 mm, in the middle of 200 mm."""
    at = np.indices((100, 100, 100)) * 2.0 - 99
    blobs = ndimage.gaussian_filter(np.random.default_rng(5).standard_normal((100, 100, 100)), 9.0)
    inside = sum((x / r) ** 2 for x, r in zip(at, (80, 65, 75), strict=True)) < 1
    organs = np.digitize(blobs / blobs.std(), (-0.7, 0.7)) - 1
    return np.where(inside, 500 + 300 * organs, 0).astype(np.float32)


def scan(header: np.ndarray, shape: tuple[int, int, int], matrix: np.ndarray, inverted: bool = False) -> Volume:
    """What a scanner sees of the anatomy after ``matrix`` (RAS mm) moved it; the grid's middle at the origin."""
    header = header.copy()
    header[:3, 3] = -header[:3, :3] @ ((np.array(shape) - 1) / 2)
    world = np.diag([0.5, 0.5, 0.5, 1.0])
    world[:3, 3] = 49.5  # mm -> voxels of the anatomy
    index = world @ np.linalg.inv(matrix) @ header
    body = ndimage.affine_transform(anatomy(), index[:3, :3], index[:3, 3], output_shape=shape, order=1)
    return Volume(np.where(body > 20, 1100 - body, 0) if inverted else body, header)


def pair(matrix: np.ndarray | None = None, **options: bool) -> tuple[Volume, Volume]:
    """Fixed (RAS) and moving (LPS, oblique, other spacing), whose header ``matrix`` moves."""
    near = np.eye(4)
    near[:3, 3] = NEAR
    moving = scan(affine(MOVING_SPACING, "LPS", 10.0), MOVING_SHAPE, near, **options)
    return (scan(affine(SPACING, "RAS"), SHAPE, np.eye(4)),
            moving if matrix is None else Volume(moving.array, matrix @ moving.affine))


def body_points() -> np.ndarray:
    return np.array(list(itertools.product((-50, 0, 50), repeat=3)), dtype=np.float64)


def off_mm(matrix: np.ndarray, moved: np.ndarray | None = None) -> float:
    """Largest distance in the body of where a matrix leads from where the anatomy is."""
    points = body_points()
    truth = applied(np.eye(4) if moved is None else moved, points + NEAR)
    return float(np.linalg.norm(applied(matrix, points) - truth, axis=1).max())


# ---- the estimate

FAR_OFF = turned(-25.0, (360.0, -5.0, 8.0), 1.15)


@cache
def far_off() -> Alignment:
    return align(*pair(FAR_OFF))


def test_a_moved_header_is_found() -> None:
    assert far_off().needed and far_off().by_headers == 0
    assert off_mm(far_off().matrix, FAR_OFF) < 8  # a finer cell (12 mm / 1.6), at the edge of the body


def test_the_contrast_may_be_another() -> None:
    moved = turned(20.0, (50.0, 0.0, 0.0), 1.0)
    found = align(*pair(moved, inverted=True))
    assert found.needed and off_mm(found.matrix, moved) < 12  # a cell: the air beyond the body is no contrast of its inverse


def test_masks_come_along() -> None:
    """A second, brighter body outside both masks that stays where it is."""
    fixed, moving = pair(FAR_OFF)
    arrays = [image.array.copy() for image in (fixed, moving)]
    masks = [ndimage.binary_dilation(array > 20, iterations=2) for array in arrays]
    noise = np.random.default_rng(1)
    for array, mask in zip(arrays, masks, strict=True):
        away = ~ndimage.binary_dilation(mask, np.ones((3, 3, 3)), iterations=3)
        array[away] = 3000 * ndimage.gaussian_filter(noise.standard_normal(array.shape), 2)[away]
    found = align(Volume(arrays[0], fixed.affine), Volume(arrays[1], moving.affine), Volume(masks[0], fixed.affine),
                  Volume(masks[1], moving.affine))
    assert found.needed and off_mm(found.matrix, FAR_OFF) < 12  # contours, which are part of what is known, are damaged


def test_any_number_of_threads_gives_the_same_bits() -> None:
    expected, before = far_off().matrix.tobytes(), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 3)
        assert align(*pair(FAR_OFF)).matrix.tobytes() == expected
    finally:
        torch.set_num_threads(before)


# ---- its parts


def view(seed: int, shape: tuple[int, int, int], header: np.ndarray | None = None) -> View:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.0).astype(np.float32)
    weight = np.random.default_rng(seed + 100).uniform(0.2, 1, shape).astype(np.float32)
    return View(noise, weight, np.diag([5.0, 4.0, 6.0, 1.0]) if header is None else header)


def test_the_best_shift_is_that_of_trying_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Fourier transforms against plain sums over every overlap, for a turned and scaled moving image."""
    fixed = view(0, (7, 6, 5))
    moving = view(1, (6, 7, 8), turned(10.0, (500.0, 20.0, -7.0), 1.1) @ np.diag([5.0, 4.0, 6.0, 1.0]))
    search, made, original = Search(fixed, moving), [], View.features
    monkeypatch.setattr(View, "features", lambda *args: made.append(original(*args)) or made[-1])
    share = search.explained((2, -1, 1, 1))
    f, (m,) = search.seen, made
    scale = 1 / unrelated_distance(f.features, m.features, f.weight, m.weight)
    size = f.weight.shape
    around = [n for k in reversed(size) for n in (k, k)]
    features, weight = pad(m.features, around), pad(m.weight, around)
    best, there = -np.inf, torch.zeros(size)
    for at in itertools.product(*(range(n - k + 1) for n, k in zip(weight.shape, size, strict=True))):
        part = tuple(slice(a, a + k) for a, k in zip(at, size, strict=True))
        same = 1 - scale * (features[(slice(None), *part)] - f.features).square().sum(0)
        found = float((f.weight * weight[part] * same).sum() / f.weight.sum())
        if found > best:
            best, there = found, weight[part]
    assert share == pytest.approx(best, abs=1e-5)  # float32
    placed = original(moving, search.tried[2, -1, 1, 1][1] @ fixed.affine, size)
    np.testing.assert_allclose(placed.weight.numpy(), there.numpy(), rtol=0, atol=1e-4)


def test_polish_ends_within_a_twentieth_of_a_cell() -> None:
    still = scan(affine(SPACING, "RAS"), SHAPE, np.eye(4))
    image = View.of(still, None, "", IntensityConfig(), "fixed")
    away = turned(6.0, (4.0, -3.0, 5.0), 1.04)
    found = polish(image, View(image.image, image.weight, away @ image.affine), np.eye(4))
    assert np.linalg.norm(applied(found, body_points()) - applied(away, body_points()), axis=1).max() < 0.25  # a cell is 5 mm


def test_what_is_explained_lies_between_nothing_and_all() -> None:
    image = view(3, (12, 12, 12))
    same = image.features(image.affine, image.image.shape)
    assert explained(same, same) == pytest.approx(float(same.weight.square().sum() / same.weight.sum()), abs=1e-6)
    nowhere = np.eye(4)
    nowhere[:3, 3] = 1e4
    assert reached(image, image, nowhere) == 0


@pytest.mark.parametrize("shape", [(2, 12, 20), (3, 3, 3), (16, 16, 2)])
def test_thin_and_tiny_images_do_no_harm(shape: tuple[int, int, int]) -> None:
    image = Volume(np.random.default_rng(0).uniform(0, 100, shape), np.diag([3.0, 3.0, 3.0, 1.0]))
    found = align(image, image)
    assert np.isfinite(found.matrix).all() and not found.needed


def test_images_without_anything_to_see_are_refused_by_name() -> None:
    fixed, moving = pair()
    with pytest.raises(InputError, match="moving image: the image has one value"):
        align(fixed, Volume(np.ones((5, 5, 5)), np.eye(4)))
    with pytest.raises(InputError, match="fixed mask leaves nothing"):
        align(fixed, moving, Volume(np.zeros(fixed.shape), fixed.affine))


def test_words_say_what_was_done() -> None:
    text = str(Alignment(turned(20.0, (60.0, 0.0, 0.0), 0.5), 0.2, 0.7, 61.0, True))
    assert "61 mm" in text and "20 degrees" in text and "2.00 times as large" in text and "70 %" in text and "20 %" in text


# ---- in a registration


def test_an_untouched_pair_keeps_its_field_to_the_bit() -> None:
    registrar = Registrar(QUICK, device="cpu")
    plain, found = registrar.register(*pair()), registrar.register(*pair(), initial="auto")
    assert found.disp.tobytes() == plain.disp.tobytes()
    assert np.array_equal(found.initial, np.eye(4)) and found.warnings == plain.warnings
    assert "alignment" not in plain.info
    told = found.info["alignment"]
    assert told["needed"] is False and min(told["by_headers"], told["by_matrix"]) > 0.5
    assert off_mm(np.array(told["matrix"])) < 8  # it was found all the same


def test_a_moved_pair_ends_where_the_untouched_one_does() -> None:
    """Point by point in the body: half a voxel of 5 mm in the mean."""
    found = dinoreg.register(*pair(FAR_OFF), preset=QUICK)
    off = found.map_points(body_points() * 0.8) - applied(FAR_OFF, body_points() * 0.8 + NEAR)
    assert np.linalg.norm(off, axis=1).mean() < 2.5
    assert not np.array_equal(found.initial, np.eye(4))
    assert any("was moved before it was registered" in text and "turned by" in text for text in found.warnings)
    assert any("[apart]" in text for text in found.warnings)
    assert json.loads(json.dumps(found.info["alignment"]))["matrix"] == found.initial.tolist()


def test_the_published_solver_never_moves_an_image_by_itself() -> None:
    config = dataclasses.replace(get_preset("published"), features="mind")
    fixed, moving = pair(turned(0.0, (400.0, 0.0, 0.0), 1.0))
    with pytest.raises(InputError, match="no voxel in common"):
        Registrar(config, device="cpu").register(fixed, moving, initial="auto")
