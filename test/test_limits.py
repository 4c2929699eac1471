"""Limits of time, and what is not finite: the refinement ends, says so, and gives the best field that there was."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types

import numpy as np
import pytest
import torch
from fake_encoder import affine
from scipy import ndimage
from small_pair import QUICK, SHIFT_MM, scan, small_pair
from torch import Tensor

from dinoreg import published
from dinoreg import refine as refine_module
from dinoreg.config import PublishedConfig, QuirksConfig, get_preset
from dinoreg.errors import ConfigError, InputError, RegistrationError
from dinoreg.refine import refine
from dinoreg.registration import Registrar
from dinoreg.result import Registration
from dinoreg.volume import Volume

SHAPE = (9, 8, 7)
UNIT = (1.0, 1.0, 1.0)


class Pull:
    """A data term with its minimum at a displacement of 1; from evaluation ``broken`` on, something is not finite."""

    def __init__(self, broken: float = math.inf, loss: float | None = None, slope: float | None = None,
                 sign: float = 1.0) -> None:
        self.broken, self.loss, self.slope, self.sign = broken, loss, slope, sign
        self.fields: list[Tensor] = []

    def gradient(self, disp: Tensor) -> tuple[Tensor, Tensor]:
        self.fields.append(disp.clone())
        loss, slope = (disp - 1).square().mean(), self.sign * 2 * (disp - 1)
        if len(self.fields) >= self.broken:
            loss = loss if self.loss is None else torch.tensor(self.loss)
            slope = slope if self.slope is None else slope.index_put([torch.tensor(1)] * 4, torch.tensor(self.slope))
        return loss, slope


def ran(term: Pull, iterations: int = 10, until: float = math.inf) -> tuple[Tensor, list[float]]:
    """With steps that do not reach the minimum in these iterations."""
    return refine(term, torch.zeros(3, *SHAPE), UNIT, iterations, until=until, rate=0.05, regularity=0.5, step_sigma=1.0,
                  damping=0.01)


# ---- the loop


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_loop_with_the_best_field(value: float) -> None:
    term = Pull(broken=4, loss=value)
    disp, losses = ran(term)
    assert torch.equal(disp, term.fields[2]) and len(term.fields) == 4  # of the three that are known, the last is the best
    assert all(math.isfinite(loss) for loss in losses[:3]) and math.isnan(losses[3])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_slope_that_is_not_finite_in_one_cell_ends_the_loop_with_the_best_field(value: float) -> None:
    """Even where the loss hides it: sampling at a displacement that is not finite gives some finite value."""
    term = Pull(broken=4, slope=value, loss=0.5)
    disp, losses = ran(term)
    assert torch.isfinite(disp).all() and any(torch.equal(disp, field) for field in term.fields[1:4])
    assert math.isnan(losses[-1]) and len(losses) == 5


def test_nothing_finite_at_the_start_is_an_error() -> None:
    with pytest.raises(RegistrationError, match="not finite"):
        ran(Pull(broken=1, loss=math.nan))
    bad = torch.full((1, *SHAPE), math.nan)
    with pytest.raises(RegistrationError, match="not finite"):
        published.refine((bad, bad), torch.zeros(3, *SHAPE), PublishedConfig(iterations=2), QuirksConfig())


def test_steps_that_lead_astray_are_not_the_result() -> None:
    """A slope of the wrong sign: the objective rises from the first step on, and the start is the best field."""
    term = Pull(sign=-1.0)
    disp, losses = ran(term)
    assert losses[-1] > losses[0] and torch.equal(disp, term.fields[0])


def test_the_field_after_the_last_step_is_the_result_where_steps_lead_down() -> None:
    term = Pull()
    disp, losses = ran(term)
    assert losses == sorted(losses, reverse=True)
    assert float((disp - 1).square().mean()) < losses[-1]


def ticking(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> None:
    """A clock that goes on by a second whenever it is looked at, from 1 s."""
    clock = itertools.count(1.0)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))


def test_no_step_is_begun_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, refine_module)
    term = Pull()
    disp, losses = ran(term, until=6.0)  # the loop begins at 1; before step t it is t + 1, and a step takes a second or two
    assert 2 <= len(losses) <= 4 and len(term.fields) == len(losses)
    assert float((disp - 1).square().mean()) < losses[-1]


def test_no_time_at_all_leaves_the_start() -> None:
    disp, losses = ran(Pull(), until=0.0)
    assert not disp.any() and losses == []


def test_the_published_solver_looks_at_the_clock_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, published)
    f, m = torch.rand(2, 2, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind(0)
    _, losses = published.refine((f, m), torch.zeros(3, *SHAPE), PublishedConfig(iterations=9), QuirksConfig(), until=4.0)
    assert len(losses) == 4


# ---- the pipeline


def register(fixed: Volume, moving: Volume, time_limit: float | None = None) -> Registration:
    return Registrar(QUICK, device="cpu", time_limit=time_limit).register(fixed, moving)


def test_time_that_is_over_gives_the_discrete_field_and_says_so() -> None:
    pair = small_pair()
    found, whole = register(*pair, time_limit=1e-6), register(*pair)
    none = dataclasses.replace(QUICK, refine=dataclasses.replace(QUICK.refine, levels=((2, 0),)))
    discrete = Registrar(none, device="cpu").register(*pair).disp
    np.testing.assert_allclose(found.disp, discrete, rtol=0, atol=0.2)  # it came by another lattice to the voxels
    assert found.info["ended"] == "time limit" and whole.info["ended"] is None
    assert [level["iterations"] for level in found.info["levels"]] == [0, 0]
    assert len(found.warnings) == 1 and "0 of 40 iterations" in found.warnings[0] and "best so far" in found.warnings[0]


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    pair = small_pair()
    limited, free = register(*pair, time_limit=1e6), register(*pair)
    assert limited.disp.tobytes() == free.disp.tobytes() and limited.warnings == free.warnings == []


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_time_limit_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="time limit"):
        Registrar(QUICK, device="cpu", time_limit=seconds)


def test_a_refinement_that_met_something_not_finite_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(term: object, disp: Tensor, *_: object, **__: object) -> tuple[Tensor, list[float]]:
        return disp, [0.5, math.nan]

    monkeypatch.setattr("dinoreg.registration.refine", broken)
    found = register(*small_pair())
    assert np.isfinite(found.disp).all() and found.info["ended"] == "not finite"
    assert any("not finite" in warning for warning in found.warnings)


def test_a_field_of_zeros_for_images_that_differ_is_warned_of() -> None:
    """Masks at opposite ends, farther apart than the search reaches: there is nothing to compare."""
    fixed = scan(affine((2.0, 2.0, 2.0)), (30, 20, 20))
    moving = scan(affine((2.0, 2.0, 2.0)), (30, 20, 20), moved_mm=4.0)
    masks = np.zeros((2, 30, 20, 20), dtype=np.uint8)
    masks[0, :3], masks[1, -3:] = 1, 1
    found = Registrar(QUICK, device="cpu").register(fixed, moving, fixed_mask=Volume(masks[0], fixed.affine),
                                                    moving_mask=Volume(masks[1], fixed.affine))
    assert np.abs(found.disp).max() < 1e-3 and any("zero everywhere" in warning for warning in found.warnings)


def test_a_field_of_zeros_for_equal_images_is_right() -> None:
    fixed, _ = small_pair()
    found = register(fixed, fixed)
    assert np.abs(found.disp).max() < 0.02 and found.warnings == []


# ---- sizes and values at the ends of what there is


def test_a_lattice_that_would_be_too_large_gets_larger_cells_on_all_levels() -> None:
    config = dataclasses.replace(QUICK, refine=dataclasses.replace(QUICK.refine, max_cells=4000))
    pair = small_pair()  # 24 x 26 x 22 voxels of 2 mm
    found = Registrar(config, device="cpu").register(*pair)
    shapes = [level["lattice"] for level in found.info["levels"]]
    assert 3500 < math.prod(shapes[1]) <= 4000 and 8 * math.prod(shapes[0]) == pytest.approx(4000, rel=0.2)
    assert found.disp.shape == (3, *pair[0].shape)
    inner = found.disp[:, 6:-6, 6:-6, 6:-6]
    np.testing.assert_allclose(np.median(inner, axis=(1, 2, 3)), SHIFT_MM / 2, rtol=0, atol=0.15)  # a tenth of a cell


def scaled(volume: Volume, low: float, high: float, dtype: type) -> Volume:
    unit = (volume.array - volume.array.min()) / np.ptp(volume.array).astype(np.float64)
    values = low * (1 - unit) + high * unit
    return Volume((np.rint(values) if np.issubdtype(dtype, np.integer) else values).astype(dtype), volume.affine)


@pytest.mark.parametrize(("low", "high", "dtype"), [
    (-1e30, 1e30, np.float32), (-1e37, 1e37, np.float64), (0.0, 1e-38, np.float32), (0.0, 1e-40, np.float32),
    (1e6, 1e6 + 64, np.float32), (-32768, 32767, np.int16), (0, 65535, np.uint16), (-128, 127, np.int8)])
def test_the_scale_of_the_grey_values_does_not_matter(low: float, high: float, dtype: type) -> None:
    """Windows are percentiles of the values above the smallest one, wherever these lie; to their precision, the field is the
    same. 1e-40 is a denormal number of 17 bits, 64 above a million has 10 bits, int8 has 8."""
    pair = small_pair()
    found = register(*(scaled(volume, low, high, dtype) for volume in pair))
    assert found.warnings == []
    assert np.median(np.abs(found.disp - register(*pair).disp)) < 0.05


@pytest.mark.parametrize("value", [1e38, -3e300])
def test_values_beyond_what_can_be_computed_with_are_refused(value: float) -> None:
    fixed, moving = small_pair()
    array = fixed.array.astype(np.float64)
    array[3, 4, 5] = value
    with pytest.raises(InputError, match=r"the fixed image holds values of up to .*1e\+37"):
        register(Volume(array, fixed.affine), moving)


def moved_by_a_voxel(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> tuple[Volume, Volume]:
    """A texture of voxels, and the same seen a voxel farther along the first and the last axis."""
    world = ndimage.gaussian_filter(np.random.default_rng(5).standard_normal([n + 1 for n in shape]), 1.5)
    i, j, k = shape
    return (Volume((1000 * world[1:, :j, 1:]).astype(np.float32), affine(spacing)),
            Volume((1000 * world[:i, :j, :k]).astype(np.float32), affine(spacing)))  # moving(x + 1) = fixed(x)


def error_voxels(found: Registration) -> float:
    """Median distance from the truth of ``moved_by_a_voxel``, which is sqrt(2) long."""
    return float(np.median(np.linalg.norm(found.disp - np.array([1.0, 0.0, 1.0])[:, None, None, None], axis=0)))


@pytest.mark.parametrize("terms", [{}, {"lncc": 1.0, "features": 0.0}, {"information": 0.2}],
                         ids=["features", "lncc", "information"])
@pytest.mark.parametrize(("shape", "spacing"), [((16, 16, 16), (1.0, 1.0, 1.0)), ((40, 40, 5), (1.0, 1.0, 8.0)),
                                                ((5, 40, 40), (1.0, 1.0, 1.0)), ((20, 20, 20), (1000.0, 1000.0, 1000.0)),
                                                ((20, 20, 20), (1e-3, 1e-3, 1e-3)), ((24, 24, 8), (0.1, 1.0, 30.0))])
def test_tiny_thin_and_strangely_spaced_volumes_are_registered(shape: tuple[int, int, int], spacing: tuple[float, float, float],
                                                               terms: dict[str, float]) -> None:
    """The lattices follow the voxels, whatever a millimetre is."""
    config = dataclasses.replace(QUICK, refine=dataclasses.replace(QUICK.refine, levels=((2, 8), (1, 12)), **terms))
    found = Registrar(config, device="cpu").register(*moved_by_a_voxel(shape, spacing))
    assert np.isfinite(found.disp).all() and found.info["ended"] is None
    assert np.abs(found.disp).max() < max(shape) / 4 and error_voxels(found) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["generic", "thorax-cbct"])
def test_a_thin_stack_of_slices_is_registered_by_the_presets(preset: str) -> None:
    config = dataclasses.replace(get_preset(preset), features="mind", modalities=("MR", "MR"))
    found = Registrar(config, device="cpu").register(*moved_by_a_voxel((256, 256, 5), (1.0, 1.0, 8.0)))
    assert np.isfinite(found.disp).all() and found.info["ended"] is None and error_voxels(found) < 1.0
