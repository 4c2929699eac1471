"""Initial alignment: how it is given, what it does to the field, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from test_registration import CONFIG, HEADERS, SHAPE, SHIFT, centred, errors, motion_mm, picture, register

from dinoreg.errors import InputError
from dinoreg.initial import folded, undone
from dinoreg.volume import Volume


def turned(degrees: float = 20.0, shift: tuple[float, float, float] = (60.0, -5.0, 8.0), scale: float = 1.15) -> np.ndarray:
    """Rotation about an oblique axis, scaling and translation, RAS mm."""
    x, y, z = np.array([1.0, 2.0, 2.0]) / 3
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:3, :3] = scale * (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)
    matrix[:3, 3] = shift
    return matrix


# ---- the mathematics


@pytest.mark.parametrize("name", HEADERS)
def test_total_field_is_the_initial_transform_after_the_found_one(name: str) -> None:
    """T(p) = A(p + u(p)), point by point in world space."""
    header, matrix = centred(HEADERS[name]), turned()
    disp = np.random.default_rng(1).uniform(-3, 3, (3, *SHAPE)).astype(np.float32)
    total = folded(disp, matrix, header)
    assert total.dtype == np.float32
    for voxel in ((0, 0, 0), (27, 32, 24), (5, 20, 11)):
        there = matrix @ header @ [*(np.array(voxel) + disp[(slice(None), *voxel)].astype(np.float64)), 1]
        found = header @ [*(np.array(voxel) + total[(slice(None), *voxel)].astype(np.float64)), 1]
        np.testing.assert_allclose(found, there, rtol=0, atol=1e-4)  # float32 of 100 voxels: 4e-6, a voxel is 2 mm


def test_identity_leaves_the_field_to_the_bit() -> None:
    disp = np.random.default_rng(1).uniform(-3, 3, (3, *SHAPE)).astype(np.float32)
    assert folded(disp, np.eye(4), centred(HEADERS["oblique"])).tobytes() == disp.tobytes()


# ---- in a registration


@pytest.mark.parametrize("name", ["LPS", "oblique"])
def test_a_header_that_is_off_is_made_good_by_the_start(name: str) -> None:
    """A header moved by A and A given as the start: the same registration, and the total leads to the same voxels."""
    header, matrix = centred(HEADERS[name]), turned()
    fixed, moving = picture(header), picture(header, moved_mm=motion_mm(header))
    off = Volume(moving.array, matrix @ header)
    plain, found = register(fixed, moving), register(fixed, off, initial=matrix)
    np.testing.assert_allclose(found.initial, matrix)
    # headers agree to 1e-13 mm, which Adam makes some 1e-4 voxel of; grey values vary by some 100 a voxel
    np.testing.assert_allclose(found.disp, folded(plain.disp, matrix, header), rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.warp(off).array[3:-3, 3:-3, 3:-3], plain.warp(moving).array[3:-3, 3:-3, 3:-3], atol=0.5)


def test_a_mask_of_the_moving_image_goes_with_it() -> None:
    """The mask is on the moving image's header: if it stayed behind, nothing would be left of the image."""
    header, matrix = centred(HEADERS["RAS"]), turned(shift=(300.0, 0.0, 0.0))
    fixed, moving = picture(header), picture(header, moved_mm=motion_mm(header))
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[:20] = 1
    plain = register(fixed, moving, moving_mask=Volume(mask, header))
    found = register(fixed, Volume(moving.array, matrix @ header), moving_mask=Volume(mask, matrix @ header), initial=matrix)
    np.testing.assert_allclose(found.disp, folded(plain.disp, matrix, header), rtol=0, atol=1e-3)


def test_a_motion_of_the_voxels_given_as_the_start_is_part_of_the_field() -> None:
    header = centred(HEADERS["RAS"])
    matrix = np.eye(4)
    matrix[:3, 3] = motion_mm(header)
    found = register(picture(header), picture(header, moved_mm=motion_mm(header)), initial=matrix)
    assert np.median(errors(found.disp, SHIFT)) < 0.15  # of a voxel: 3 to 4 voxels of motion were taken away before


def test_without_a_start_nothing_changes() -> None:
    header = centred(HEADERS["LAS"])
    fixed, moving = picture(header), picture(header, moved_mm=motion_mm(header))
    plain, given = register(fixed, moving), register(fixed, moving, initial=np.eye(4))
    assert np.array_equal(plain.initial, np.eye(4)) and np.array_equal(given.initial, np.eye(4))
    assert plain.disp.tobytes() == given.disp.tobytes()


def test_undoing_moves_the_header_alone() -> None:
    header, matrix = centred(HEADERS["RAS"]), turned()
    moving = picture(header)
    assert undone(moving, matrix).array is moving.array
    np.testing.assert_allclose(matrix @ undone(moving, matrix).affine, header, atol=1e-9)


# ---- errors


@pytest.mark.parametrize(("matrix", "message"), [
    (np.eye(3), "finite 4x4"), (np.full((4, 4), np.nan), "finite 4x4"), (np.ones((4, 4)), "last row 0 0 0 1"),
    (np.diag([-1.0, 1, 1, 1]), "left and right"), (np.diag([0.0, 1, 1, 1]), "determinant of 0"),
    (np.diag([10.0, 10, 10, 1]), "units"), ("somewhere", "matrix of numbers")])
def test_matrices_that_cannot_be_a_start_are_refused(matrix: object, message: str) -> None:
    fixed = picture(centred(HEADERS["RAS"]))
    with pytest.raises(InputError, match=message):
        register(fixed, fixed, CONFIG, initial=matrix)
