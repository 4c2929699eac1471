"""Checks of a case: each finds what it is for, nothing else, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dinoreg.errors import InputError
from dinoreg.io import read_volume
from dinoreg.validate import (
    CODES,
    Problem,
    check_header,
    check_mask,
    check_pair,
    check_roles,
    check_volume,
    raise_errors,
    unreadable,
)
from dinoreg.volume import Volume

SHAPE = (6, 7, 8)


def _volume(array: np.ndarray | None = None, spacing: float = 2.0, origin: float = 0.0) -> Volume:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = origin
    return Volume(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) if array is None else array, affine)


def _codes(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(problem.code, problem.severity) for problem in problems]


def test_sound_images_have_no_problem() -> None:
    assert check_volume(_volume(), "x") == [] and check_pair(_volume(), _volume(), same_grid=True) == []
    assert check_pair(_volume(), _volume(spacing=3.0), same_grid=False) == []
    assert check_mask(_volume(np.ones(SHAPE, bool)), _volume(), "m") == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(bad: float) -> None:
    array = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    array[0, 0, :3] = bad
    (problem,) = check_volume(_volume(array), "x.nii.gz")
    assert (problem.code, problem.severity) == ("non-finite", "error")
    assert "x.nii.gz" in problem.message and "3 NaN" in problem.message
    assert np.count_nonzero(~np.isfinite(array)) == 3  # left as it was


def test_constant_image_is_an_error() -> None:
    assert _codes(check_volume(_volume(np.full(SHAPE, -1024, np.int16)), "x")) == [("constant", "error")]


def test_slice_is_no_volume() -> None:
    assert ("not-3d", "error") in _codes(check_volume(_volume(np.arange(42.0).reshape(6, 7, 1)), "x"))


@pytest.mark.parametrize(("spacing", "problems"), [(0.049, 1), (0.05, 0), (20.0, 0), (20.5, 1)])
def test_spacing_outside_of_what_scanners_make_is_a_warning(spacing: float, problems: int) -> None:
    assert _codes(check_volume(_volume(spacing=spacing), "x")) == [("spacing", "warning")] * problems


def test_learn2reg_pair_needs_one_shape_and_is_warned_of_two_headers() -> None:
    other = _volume(np.arange(6 * 7 * 9.0).reshape(6, 7, 9))
    assert _codes(check_pair(_volume(), other, same_grid=True)) == [("shape-mismatch", "error")]
    assert _codes(check_pair(_volume(), _volume(origin=500.0), same_grid=True)) == [("affine-mismatch", "warning")]


@pytest.mark.parametrize(("origin", "codes"), [(0.0, []), (9.0, [("small-overlap", "warning")]),
                                               (16.5, [("no-overlap", "error")])])
def test_overlap_is_judged_through_the_headers(origin: float, codes: list[tuple[str, str]]) -> None:
    # extents are 12, 14 and 16 mm: an offset of 9 mm along each axis leaves (3 x 5 x 7) / (12 x 14 x 16) = 4 %
    assert _codes(check_pair(_volume(), _volume(origin=origin), same_grid=False)) == codes


def test_a_start_of_its_own_takes_the_place_of_overlap() -> None:
    fixed, moving = _volume(), _volume(origin=99.0)
    assert _codes(check_pair(fixed, moving, same_grid=False, initial="auto")) == [("apart", "warning")]
    assert _codes(check_pair(fixed, moving, same_grid=False, initial="given")) == []


def test_small_image_inside_a_large_one_overlaps() -> None:
    small = Volume(np.arange(8.0).reshape(2, 2, 2), np.diag([0.1, 0.1, 0.1, 1.0]))
    assert "no-overlap" not in dict(_codes(check_pair(_volume(), small, same_grid=False)))


def test_mask_lies_on_its_images_grid_and_selects_something() -> None:
    ones = np.ones(SHAPE, np.uint8)
    assert _codes(check_mask(_volume(ones, origin=1.0), _volume(), "m")) == [("mask-mismatch", "error")]
    assert _codes(check_mask(_volume(0 * ones), _volume(), "m")) == [("mask-empty", "error")]


def test_errors_are_raised_together_and_warnings_returned() -> None:
    warning, first, second = (Problem("spacing", "warning", "odd", "look"), Problem("constant", "error", "a.nii: flat", "export"),
                              Problem("no-overlap", "error", "far apart", "align"))
    assert raise_errors([warning]) == ["odd; look [spacing]"]
    lost = unreadable(InputError("b.nii: expected this; got that; copy it", "too-large"))
    with pytest.raises(InputError) as raised:
        raise_errors([lost, warning, first, second])
    assert str(raised.value) == ("b.nii: expected this; got that; copy it [too-large] | a.nii: flat; export [constant] | "
                                 "far apart; align [no-overlap]")
    assert raised.value.code == "too-large"


def test_what_a_reader_refuses_is_a_problem_with_advice() -> None:
    assert unreadable(InputError("a: b; got c; do d")) == Problem("unreadable", "error", "a: b; got c", "do d")
    assert unreadable(InputError("nothing else")) == Problem("unreadable", "error", "nothing else", "correct the input")


@pytest.mark.parametrize(("value", "dtype", "code"), [
    (9e36, np.float64, None), (-9e36, np.float32, None), (1.1e37, np.float32, "out-of-range"),
    (1e300, np.float64, "out-of-range"), (-1e300, np.float64, "out-of-range"), (np.nan, np.float64, "non-finite")])
def test_values_that_single_precision_cannot_calculate_with_are_an_error(value: float, dtype: type, code: str | None) -> None:
    array = np.arange(np.prod(SHAPE), dtype=dtype).reshape(SHAPE)
    array[1, 2, 3] = value
    assert _codes(check_volume(_volume(array), "x")) == ([(code, "error")] if code else [])


def test_an_image_that_is_constant_in_single_precision_is_an_error() -> None:
    array = np.full(SHAPE, 2**30, np.int32)
    array[0] += 7  # float32 has steps of 64 there
    assert _codes(check_volume(_volume(array), "x")) == [("constant", "error")]


@pytest.mark.parametrize(("cosine", "problems"), [(0.0, 0), (5e-4, 0), (2e-3, 1), (0.5, 1)])
def test_sheared_axes_are_an_error_where_the_header_counts(cosine: float, problems: int) -> None:
    turn = np.array([[0.6, -0.8, 0, 0], [0.8, 0.6, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    affine[:2, 1] = 1.5 * cosine, 1.5 * np.sqrt(1 - cosine**2)
    volume = Volume(_volume().array, turn @ affine)
    assert _codes(check_volume(volume, "x")) == [("sheared", "error")] * problems
    assert check_volume(volume, "x", straight=False) == []


@pytest.mark.parametrize(("kind", "low", "high", "codes"), [
    ("CT", -1024, 2000, []), ("CT", -199, 2000, ["not-hu"]), ("CT", 0, 4095, ["not-hu"]), ("CBCT", 0, 4095, []), ("", 0, 1, []),
    ("MR", 0, 4095, []), ("MR", -1024, 3071, ["not-mr"]), ("", -1024, 3071, [])])
def test_values_are_compared_with_the_modality(kind: str, low: int, high: int, codes: list[str]) -> None:
    array = np.linspace(low, high, int(np.prod(SHAPE))).round().astype(np.int16).reshape(SHAPE)
    assert _codes(check_volume(_volume(array), "x", kind=kind)) == [(code, "warning") for code in codes]


def test_a_normalised_mr_may_be_negative() -> None:
    array = np.random.default_rng(0).normal(size=SHAPE) * 1000
    assert check_volume(_volume(array), "x", kind="MR") == []


ONCOREG, MRCT = ("CBCT", "CT"), ("MR", "CT")


@pytest.mark.parametrize(("fixed", "moving", "given", "expected", "swapped"), [
    ("a_cbct.nii", "a_ct.nii", ("", ""), ONCOREG, False), ("a_ct.nii", "a_cbct.nii", ("", ""), ONCOREG, True),
    ("ct.nii", "mr.nii", ("MR", "CT"), MRCT, True), ("ct.nii", "mr.nii", ("CT", "MR"), MRCT, False),
    ("ct.nii", "mr.nii", ("", ""), MRCT, False), ("a.nii", "b.nii", ("CT", "CBCT"), ONCOREG, True),
    ("a.nii", "b.nii", ("CT", "CT"), ONCOREG, False), ("moving.nii", "fixed.nii", ("", ""), ("", ""), True),
    ("fixed.nii", "moving.nii", ("", ""), ("", ""), False), ("removing.nii", "fixed.nii", ("", ""), ("", ""), False),
    ("moving/fixed.nii", "fixed/moving.nii", ("", ""), ("", ""), False),
    ("OncoReg_0001_0000.nii.gz", "OncoReg_0001_0001.nii.gz", ("", ""), ONCOREG, True),
    ("OncoReg_0001_0000.nii.gz", "OncoReg_0001_0002.nii.gz", ("", ""), ONCOREG, True),
    ("OncoReg_0001_0001.nii.gz", "OncoReg_0001_0000.nii.gz", ("", ""), ONCOREG, False),
    ("X_0001_0000.nii.gz", "X_0001_0001.nii.gz", ("", ""), ("", ""), False)])
def test_swapped_images_are_told_by_their_names(fixed: str, moving: str, given: tuple[str, str], expected: tuple[str, str],
                                                swapped: bool) -> None:
    problems = check_roles(fixed, moving, given, expected)
    assert _codes(problems) == [("swapped", "warning")] * swapped
    assert all(Path(fixed).name in problem.message for problem in problems)


def _two_headers(path: Path, shift: float, turn: float = 0.0, codes: tuple[int, int] = (1, 1)) -> Path:
    image = nib.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), np.diag([2.0, 2.0, 2.0, 1.0]))
    c, s = np.cos(turn), np.sin(turn)
    other = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ image.affine
    other[0, 3] += shift
    image.set_sform(image.affine, code=codes[0])
    image.set_qform(other, code=codes[1])
    image.to_filename(path)
    return path


@pytest.mark.parametrize(("shift", "turn", "codes", "problems"), [
    (0.0, 0.0, (1, 1), 0), (0.9, 0.0, (1, 1), 0), (1.1, 0.0, (1, 1), 1), (0.0, 0.01, (1, 1), 0), (0.0, 0.2, (1, 2), 1),
    (50.0, 0.0, (1, 0), 0), (50.0, 0.0, (0, 1), 0)])
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_two_headers_more_than_half_a_voxel_apart_are_a_warning(tmp_path: Path, name: str, shift: float, turn: float,
                                                                codes: tuple[int, int], problems: int) -> None:
    path = _two_headers(tmp_path / name, shift, turn, codes)
    read_volume(path)
    assert _codes(check_header(path)) == [("two-headers", "warning")] * problems


def test_a_quaternion_that_is_none_is_two_headers(tmp_path: Path) -> None:
    path = _two_headers(tmp_path / "x.nii", 0.0)
    raw = bytearray(path.read_bytes())
    raw[256:268] = np.array([1.0, 1.0, 1.0], "<f4").tobytes()  # quatern_b, c, d: longer than 1
    path.write_bytes(raw)
    assert _codes(check_header(path)) == [("two-headers", "warning")]


def test_other_formats_have_one_header(tmp_path: Path) -> None:
    assert check_header(tmp_path) == [] == check_header(tmp_path / "x.mha")


def test_every_code_in_use_is_documented(tmp_path: Path) -> None:
    array = np.full((6, 7, 1), np.nan)
    shear = _volume().affine.copy()
    shear[0, 1] = 1.0
    used = [*(unreadable(InputError("a; b", code)) for code in ("unreadable", "too-large", "affine")),
            *check_volume(Volume(_volume().array, shear), "x"), *check_header(_two_headers(tmp_path / "x.nii", 9.0)),
            *check_volume(_volume(1e38 * np.arange(6 * 7 * 8.0).reshape(SHAPE)), "x"), *check_volume(_volume(), "x", kind="CT"),
            *check_volume(_volume(np.arange(336, dtype=np.int16).reshape(SHAPE) - 600), "x", kind="MR"),
            *check_roles("moving.nii", "fixed.nii", ("", ""), ("", "")),
            *check_volume(_volume(array, spacing=99.0), "x"), *check_volume(_volume(np.zeros(SHAPE)), "x"),
            *check_pair(_volume(), _volume(array), same_grid=True), *check_pair(_volume(), _volume(origin=1.0), same_grid=True),
            *check_pair(_volume(), _volume(origin=9.0), same_grid=False),
            *check_pair(_volume(), _volume(origin=99.0), same_grid=False),
            *check_pair(_volume(), _volume(origin=99.0), same_grid=False, initial="auto"),
            *check_mask(_volume(np.zeros(SHAPE), origin=1.0), _volume(), "m")]
    assert {problem.code for problem in used} == set(CODES)
    for problem in used:
        assert CODES[problem.code].startswith("warning:") == (problem.severity == "warning")
