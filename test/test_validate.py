"""Checks of a case: each finds what it is for, nothing else, and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from dinoreg.errors import InputError
from dinoreg.validate import CODES, Problem, check_mask, check_pair, check_volume, raise_errors
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
    with pytest.raises(InputError) as raised:
        raise_errors([warning, first, second], ["b.nii: truncated"])
    assert str(raised.value) == "b.nii: truncated | a.nii: flat; export [constant] | far apart; align [no-overlap]"


def test_every_code_in_use_is_documented() -> None:
    array = np.full((6, 7, 1), np.nan)
    used = [*check_volume(_volume(array, spacing=99.0), "x"), *check_volume(_volume(np.zeros(SHAPE)), "x"),
            *check_pair(_volume(), _volume(array), same_grid=True), *check_pair(_volume(), _volume(origin=1.0), same_grid=True),
            *check_pair(_volume(), _volume(origin=9.0), same_grid=False),
            *check_pair(_volume(), _volume(origin=99.0), same_grid=False),
            *check_mask(_volume(np.zeros(SHAPE), origin=1.0), _volume(), "m")]
    assert {problem.code for problem in used} == set(CODES)
    for problem in used:
        assert CODES[problem.code].startswith("warning:") == (problem.severity == "warning")
