"""The picture: patient directions, folds and other grids are shown as they are, and drawing it has no side effects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread
from scipy import ndimage

from dinoreg import draw, qc
from dinoreg.errors import InputError
from dinoreg.result import Registration
from dinoreg.volume import Volume

SHAPE = (24, 20, 16)
LPS = np.array([[-2.0, 0, 0, 20], [0, -3.0, 0, 25], [0, 0, 4.0, -30], [0, 0, 0, 1]])


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    grid = np.indices(SHAPE)
    return (sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < radius ** 2).astype(np.float32)


def scene() -> tuple[Volume, Volume, np.ndarray]:
    """A head-like ball with an off-centre bright spot, and a smooth field."""
    image = 100 * ball((12, 10, 8), 7) + 400 * ball((15, 7, 10), 2.5)
    rng = np.random.default_rng(0)
    disp = np.stack([ndimage.gaussian_filter(rng.standard_normal(SHAPE), 3) * 20 for _ in range(3)]).astype(np.float32)
    return Volume(image, LPS), Volume(np.roll(image, 1, axis=0), LPS), disp


def reoriented(volume: Volume, codes: str) -> tuple[Volume, np.ndarray]:
    """The same volume with its axes stored in another order and direction, and nibabel's table of the change."""
    change = nib.orientations.ornt_transform(nib.io_orientation(volume.affine), nib.orientations.axcodes2ornt(tuple(codes)))
    array = nib.orientations.apply_orientation(volume.array, change)
    return Volume(array, volume.affine @ nib.orientations.inv_ornt_aff(change, volume.shape)), change


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "RPI", "PSR", "SLA", "ARI"])
def test_every_storage_order_gives_the_same_view(codes: str) -> None:
    fixed, moving, disp = scene()
    expected = draw.turned(fixed, moving, moving, disp)
    turned_fixed, change = reoriented(fixed, codes)
    turned_moving, _ = reoriented(moving, codes)
    assert turned_fixed.orientation == codes
    turned_disp = np.empty((3, *turned_fixed.shape), dtype=np.float32)
    for axis, (target, flip) in enumerate(change):  # old axis -> new axis, and whether it is reversed
        turned_disp[int(target)] = flip * nib.orientations.apply_orientation(disp[axis], change)
    view = draw.turned(turned_fixed, turned_moving, turned_moving, turned_disp)
    assert view.spacing == expected.spacing == (2.0, 3.0, 4.0)
    for name in ("fixed", "moving", "body", "disp_mm"):
        assert np.array_equal(getattr(view, name), getattr(expected, name)), name
    assert np.allclose(view.determinant, expected.determinant, atol=1e-5)  # float32, other order of summation


def test_an_oblique_header_is_turned_by_its_main_directions() -> None:
    fixed, moving, disp = scene()
    angle = np.radians(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0, 0], [np.sin(angle), np.cos(angle), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    expected = draw.turned(fixed, moving, moving, disp)
    view = draw.turned(Volume(fixed.array, turn @ LPS), Volume(moving.array, turn @ LPS), Volume(moving.array, turn @ LPS), disp)
    assert np.array_equal(view.fixed, expected.fixed) and np.allclose(view.disp_mm, expected.disp_mm)


def test_left_is_on_the_right_and_front_and_head_are_on_top(tmp_path: Path) -> None:
    # in a picture of a uniform body the only bright spot lies left, in front, towards the head
    image = 100 * ball((12, 10, 8), 7) + 900 * ball((16, 7, 10), 2.5)  # axes run to L, P, S
    fixed = Volume(image, LPS)
    disp = np.zeros((3, *SHAPE), dtype=np.float32)
    disp[0] = ball((16, 7, 10), 5)  # the planes go through the greatest displacement
    figure = qc._draw(draw.turned(fixed, fixed, fixed, disp), "", "")
    path = tmp_path / "qc.png"
    qc.write_qc(path, fixed, fixed, fixed, Registration(disp, LPS))
    grey = imread(path)[..., :3].mean(axis=2)
    for row, (horizontal, vertical) in enumerate(((1, -1), (1, -1), (-1, -1))):  # axial, coronal: L right; sagittal: A left
        box = figure.axes[6 * row].get_position()
        top, bottom = (round((1 - y) * grey.shape[0]) for y in (box.y1, box.y0))
        left, right = (round(x * grey.shape[1]) for x in (box.x0, box.x1))
        panel = grey[top:bottom, left:right]
        inner = panel[panel.shape[0] // 8:-panel.shape[0] // 8, panel.shape[1] // 8:-panel.shape[1] // 8]  # without the letters
        y, x = (np.mean(index) for index in np.nonzero(inner > 0.95))
        assert np.sign(x - inner.shape[1] / 2) == horizontal and np.sign(y - inner.shape[0] / 2) == vertical, row


def yellow_dots(path: Path) -> int:
    picture = (imread(path)[..., :3] * 255).round()
    last_column = picture[:, -picture.shape[1] // 6:]
    return int((np.abs(last_column - np.array([0xFF, 0xEE, 0x00])).max(axis=2) <= 2).sum())


def test_folds_are_marked_and_only_folds(tmp_path: Path) -> None:
    fixed, moving, disp = scene()
    disp *= 0.2
    qc.write_qc(tmp_path / "smooth.png", fixed, moving, moving, Registration(disp, LPS))
    disp[0, 12] += 3.0
    qc.write_qc(tmp_path / "folded.png", fixed, moving, moving, Registration(disp, LPS))
    assert yellow_dots(tmp_path / "smooth.png") == 0
    assert yellow_dots(tmp_path / "folded.png") > 20


def test_a_moving_image_on_another_grid_is_brought_over_by_its_header() -> None:
    fixed, _, _ = scene()
    header = LPS.copy()
    header[:3, 3] += LPS[:3, 0]  # its first voxel lies where the fixed image has its second
    placed = draw.turned(fixed, Volume(fixed.array[1:], header), fixed, np.zeros((3, *SHAPE), dtype=np.float32))
    assert np.allclose(placed.moving, fixed.array, atol=1e-4)


@pytest.mark.parametrize("codes", ["RAS", "PSR", "SLA", "ARI"])
def test_no_face_of_a_moving_image_stored_in_another_order_is_lost(codes: str) -> None:
    spacing = (0.7, 1.3, 2.9)  # with an origin of 0.1: coordinates of the outermost voxels are off by some 1e-15
    header = np.diag([*spacing, 1.0])
    header[:3, 3] = 0.1, -7.3, 11.7
    fixed = Volume(np.random.default_rng(0).uniform(1, 2, SHAPE).astype(np.float32), header)
    moving, _ = reoriented(fixed, codes)
    view = draw.turned(fixed, moving, fixed, np.zeros((3, *SHAPE), dtype=np.float32))
    assert np.allclose(view.moving, view.fixed, atol=1e-4)  # values of 1 to 2, interpolated at centres up to rounding


def test_warnings_are_in_the_picture_in_orange(tmp_path: Path) -> None:
    fixed, moving, disp = scene()
    heights, oranges = [], []
    for warnings in ([], ["look here", "a long one " * 50]):
        qc.write_qc(tmp_path / "qc.png", fixed, moving, moving, Registration(disp, LPS, warnings=warnings))
        picture = (imread(tmp_path / "qc.png")[..., :3] * 255).round()
        heights.append(len(picture))
        where = np.abs(picture - np.array([0xFF, 0xB5, 0x4D])).max(axis=2) <= 2
        oranges.append(where.sum())
    assert heights[1] - heights[0] == pytest.approx(2 * qc._LINE_INCHES * qc._DPI, abs=2)
    assert oranges[0] == 0 and oranges[1] > 100 and not where[:, -10:].any()  # cut before the edge


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    fixed, moving, disp = scene()
    for name in ("a.png", "b.png"):
        qc.write_qc(tmp_path / name, fixed, moving, moving, Registration(disp, LPS), title="pair", summary="TRE 1 mm")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_constant_image_can_be_drawn(tmp_path: Path) -> None:
    flat = Volume(np.full(SHAPE, 7, dtype=np.int16), LPS)
    qc.write_qc(tmp_path / "flat.png", flat, flat, flat, Registration(np.zeros((3, *SHAPE), dtype=np.float32), LPS))
    assert imread(tmp_path / "flat.png").ndim == 3


def test_what_dinov2_saw_is_drawn_where_it_is_known(tmp_path: Path) -> None:
    fixed, moving, disp = scene()
    colours = np.zeros((2, 6, 5, 4, 3), dtype=np.uint8)
    colours[0, ..., 0] = colours[1, ..., 2] = 255  # all red, all blue
    for name, found in (("without.png", None), ("with.png", colours)):
        qc.write_qc(tmp_path / name, fixed, moving, moving, Registration(disp, LPS, colours=found))
    without, pictures = (imread(tmp_path / name)[..., :3] for name in ("without.png", "with.png"))
    assert abs(pictures.shape[1] / without.shape[1] - 8 / 6) < 0.01
    middle = pictures[pictures.shape[0] // 4]  # through the axial plane
    for column, channel in ((6, 0), (7, 2)):
        pixel = middle[int((column + 0.5) / 8 * pictures.shape[1])]
        assert pixel[channel] > 0.9 and np.delete(pixel, channel).max() < 0.1


def test_a_field_of_another_grid_is_refused(tmp_path: Path) -> None:
    fixed, moving, disp = scene()
    with pytest.raises(InputError, match="shape"):
        qc.write_qc(tmp_path / "x.png", fixed, moving, moving, Registration(disp[:, 1:], LPS))
    assert not list(tmp_path.iterdir())


def test_drawing_needs_no_window_system_state() -> None:
    code = "import sys, dinoreg.qc; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parent.parent)
