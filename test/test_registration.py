"""The whole pipeline on small volumes of known motion: headers, grids, masks, errors, state, threads, every kind of features."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from fake_encoder import PatchMeans, affine
from scipy import ndimage

from dinoreg.config import PRESETS, Config, DiscreteConfig, EncoderConfig, PcaConfig, RefineConfig, get_preset
from dinoreg.errors import ConfigError, InputError
from dinoreg.metrics import folds_percent, jacobian_determinant
from dinoreg.registration import Registrar
from dinoreg.result import Registration
from dinoreg.volume import Volume
from dinoreg.weights import random_encoder

SHAPE, SPACING = (28, 33, 25), (2.0, 1.6, 2.4)
SHIFT = (3.0, -2.5, 1.7)  # voxels of the fixed grid, one an axis
DISCRETE = DiscreteConfig(levels=((20, 2, 4),))  # cells of 2.6 mm: up to 10.6 mm of motion
REFINE = RefineConfig(levels=((2, 12), (1, 12)), regularity=0.1)
CENTRE = np.array([-12.0, 30.0, 55.0])  # of all that is scanned, mm
CONFIG = Config(features="mind", discrete=DISCRETE, refine=REFINE)
HEADERS = {"RAS": affine(SPACING, "RAS"), "LAS": affine(SPACING, "LAS"), "LPS": affine(SPACING, "LPS"),
           "SPL": affine(SPACING, "SPL"), "oblique": affine(SPACING, "RAS", 25.0)}


@cache
def world() -> np.ndarray:
    """A texture of 1 mm voxels, 160 mm wide, around the origin; values of 100 to 900."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((160, 160, 160)).astype(np.float32), 3.0)
    return 500 + 120 * noise / noise.std()


def picture(header: np.ndarray, shape: Sequence[int] = SHAPE, moved_mm: np.ndarray | float = 0.0) -> Volume:
    """What a scanner with this grid sees of the world after it moved: value(p) = world(p - moved)."""
    at = np.einsum("ab,bijk->aijk", header[:3, :3], np.indices(shape)) + header[:3, 3, None, None, None]
    at -= (CENTRE + moved_mm)[:, None, None, None]
    return Volume(ndimage.map_coordinates(world(), at + 79.5, order=1, mode="mirror").astype(np.float32), header)


def centred(header: np.ndarray, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """The header with the middle of its grid at the middle of the world."""
    header = header.copy()
    header[:3, 3] = CENTRE - header[:3, :3] @ ((np.array(shape) - 1) / 2)
    return header


def motion_mm(header: np.ndarray, voxels: Sequence[float] = SHIFT) -> np.ndarray:
    return header[:3, :3] @ np.array(voxels)


def register(fixed: Volume, moving: Volume, config: Config = CONFIG, **options: object) -> Registration:
    return Registrar(config, device="cpu").register(fixed, moving, **options)  # type: ignore[arg-type]


def errors(disp: np.ndarray, truth: Sequence[float] = SHIFT, margin: int = 4) -> np.ndarray:
    """Length in voxels of what is wrong, away from the border, where the moving image shows what the fixed one does."""
    inner = tuple(slice(margin, -margin) for _ in range(3))
    return np.linalg.norm((disp - np.array(truth)[:, None, None, None])[(slice(None), *inner)], axis=0)


# ---- known motion


@pytest.mark.parametrize("name", HEADERS)
def test_three_different_shifts_come_back_on_the_right_axes(name: str) -> None:
    header = centred(HEADERS[name])
    fixed, moving = picture(header), picture(header, moved_mm=motion_mm(header))
    found = register(fixed, moving)
    assert found.disp.shape == (3, *SHAPE) and found.disp.dtype == np.float32
    assert np.array_equal(found.fixed_affine, header)
    # components of 3 and less, each to a twentieth of a voxel
    np.testing.assert_allclose(np.median(found.disp[:, 4:-4, 4:-4, 4:-4], axis=(1, 2, 3)), SHIFT, rtol=0, atol=0.05)
    assert np.median(errors(found.disp)) < 0.1 and errors(found.disp).max() < 1
    assert found.warnings == [] and folds_percent(jacobian_determinant(found.disp)) == 0


@pytest.mark.parametrize(("spacing", "codes", "tilt", "shape"), [((2.0, 1.6, 2.4), "LPS", 0.0, SHAPE),
                                                                ((1.5, 2.5, 2.0), "PIR", 15.0, (40, 30, 36))])
def test_the_moving_image_may_have_a_grid_of_its_own(spacing: tuple[float, float, float], codes: str, tilt: float,
                                                     shape: tuple[int, int, int]) -> None:
    header = centred(HEADERS["RAS"])
    moving = picture(centred(affine(spacing, codes, tilt), shape), shape, motion_mm(header))
    fixed = picture(header)
    found = register(fixed, moving)
    np.testing.assert_allclose(np.median(found.disp[:, 4:-4, 4:-4, 4:-4], axis=(1, 2, 3)), SHIFT, rtol=0, atol=0.08)
    warped = found.warp(moving)
    assert warped.same_grid(fixed)
    inner = tuple(slice(5, -5) for _ in range(3))
    before = np.corrcoef(fixed.array[inner].ravel(), picture(header, moved_mm=motion_mm(header)).array[inner].ravel())[0, 1]
    assert np.corrcoef(fixed.array[inner].ravel(), warped.array[inner].ravel())[0, 1] > 0.99 > 0.8 > before


def test_inverted_contrast_is_registered_alike() -> None:
    header = centred(HEADERS["RAS"])
    moving = picture(header, moved_mm=motion_mm(header))
    found = register(picture(header), Volume(2000 - 1.7 * moving.array, header))
    assert np.median(errors(found.disp)) < 0.1


def test_local_correlation_of_intensities_is_an_alternative() -> None:
    header = centred(HEADERS["LAS"])
    config = dataclasses.replace(CONFIG, refine=dataclasses.replace(REFINE, lncc=1.0, features=0.0))
    found = register(picture(header), picture(header, moved_mm=motion_mm(header)), config)
    assert np.median(errors(found.disp)) < 0.1


def test_a_smooth_warp_is_recovered_to_half_a_voxel_without_folds() -> None:
    header = centred(HEADERS["RAS"])
    fixed_grid = np.indices(SHAPE).astype(np.float64)
    bump = np.exp(-sum(((x - (n - 1) / 2) / (n / 2.5)) ** 2 for x, n in zip(fixed_grid, SHAPE, strict=True)))
    truth = np.array(SHIFT)[:, None, None, None] * bump
    moving = picture(header)
    fixed = Volume(ndimage.map_coordinates(moving.array, fixed_grid + truth, order=1, mode="nearest"), header)
    found = register(fixed, moving)
    inside = bump > 0.3
    assert np.median(np.linalg.norm(truth, axis=0)[inside]) > 1.9
    assert np.median(np.linalg.norm(found.disp - truth, axis=0)[inside]) < 0.5
    assert folds_percent(jacobian_determinant(found.disp)) == 0


def test_equal_images_stay_where_they_are() -> None:
    """To 0.02 voxel. In its first tens of steps Adam turns rounding errors into motion of some hundredths, and takes it back."""
    fixed = picture(centred(HEADERS["oblique"]))
    config = dataclasses.replace(CONFIG, refine=dataclasses.replace(REFINE, levels=((2, 60), (1, 40))))
    assert np.abs(register(fixed, fixed, config).disp).max() < 0.02


def test_swapping_the_images_gives_about_the_inverse() -> None:
    header = centred(HEADERS["RAS"])
    found = register(picture(header, moved_mm=motion_mm(header)), picture(header))
    assert np.median(errors(found.disp, [-s for s in SHIFT])) < 0.1


def test_the_same_scan_stored_in_another_order_gives_the_same_motion() -> None:
    """Flipped and permuted voxels with the header to match: the field is flipped and permuted, but for rounding."""
    header = centred(HEADERS["RAS"])
    fixed, moving = picture(header), picture(header, moved_mm=motion_mm(header))

    def stored(volume: Volume) -> Volume:  # axes (k, i, j), i running backwards
        turned = volume.affine.copy()
        turned[:, 3] += turned[:, 0] * (SHAPE[0] - 1)
        turned[:, 0] *= -1
        return Volume(np.ascontiguousarray(volume.array[::-1].transpose(2, 0, 1)), turned[:, [2, 0, 1, 3]])

    expected = register(fixed, moving).disp
    found = register(stored(fixed), stored(moving)).disp[[1, 2, 0]].transpose(0, 2, 3, 1)[:, ::-1]
    found = found * np.array([-1, 1, 1])[:, None, None, None]
    # sums in another order differ by 1e-6, and Adam divides by the size of slopes that may be as small
    assert np.abs(found - expected).mean() < 1e-3


def test_thin_volumes_are_registered() -> None:
    shape, spacing, shift = (33, 30, 7), (1.6, 1.6, 6.0), (-3.0, 2.0, 0.0)
    header = centred(affine(spacing), shape)
    found = register(picture(header, shape), picture(header, shape, motion_mm(header, shift)))
    assert np.median(np.linalg.norm(found.disp - np.array(shift)[:, None, None, None], axis=0)[5:-5, 5:-5]) < 0.2


# ---- masks


def test_what_a_mask_leaves_out_does_not_pull() -> None:
    header = centred(HEADERS["RAS"])
    fixed, moving = picture(header), picture(header, moved_mm=motion_mm(header))
    broken = moving.array.copy()
    broken[18:] = picture(header, moved_mm=50.0).array[18:]  # another part of the world
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[:15] = 1  # a mask is grown by 3 voxels
    config = dataclasses.replace(CONFIG, refine=dataclasses.replace(REFINE, regularity=1.0, anchored=False))
    free, kept = (register(fixed, Volume(broken, header), config, moving_mask=m).disp for m in (None, Volume(mask, header)))
    truth = np.array(SHIFT)[:, None, None, None]
    without, with_mask = (np.linalg.norm(disp - truth, axis=0)[:, 4:-4, 4:-4] for disp in (free, kept))
    # beyond the mask the field goes on much as it is inside
    assert with_mask[18:].mean() < 1.5 and without[18:].mean() > 2
    assert with_mask[3:10].mean() < 0.15


def test_a_mask_of_everything_changes_nothing_and_may_have_a_grid_of_its_own() -> None:
    header = centred(HEADERS["RAS"])
    fixed, moving = picture(header), picture(header, moved_mm=motion_mm(header))
    whole = Volume(np.ones((60, 60, 60), dtype=np.uint8), centred(affine((3.0, 3.0, 3.0), "LPS"), (60, 60, 60)))
    masked = register(fixed, moving, fixed_mask=whole, moving_mask=whole)
    assert np.array_equal(masked.disp, register(fixed, moving).disp)


@pytest.mark.parametrize("name", ["fixed", "moving"])
def test_an_empty_mask_is_refused(name: str) -> None:
    fixed = picture(centred(HEADERS["RAS"]))
    with pytest.raises(InputError, match=f"the {name} mask leaves nothing"):
        register(fixed, fixed, **{f"{name}_mask": Volume(np.zeros(SHAPE, dtype=np.uint8), fixed.affine)})


# ---- errors


@pytest.mark.parametrize("name", ["fixed", "moving"])
@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"),
                                                (None, "one value everywhere")])
def test_unusable_images_are_refused_by_name(name: str, value: float | None, message: str) -> None:
    images = {n: picture(centred(HEADERS["RAS"])) for n in ("fixed", "moving")}
    array = images[name].array.copy() if value is not None else np.full(SHAPE, -1000, dtype=np.int16)
    if value is not None:
        array[3, 4, 5] = value
    images[name] = Volume(array, images[name].affine)
    with pytest.raises(InputError, match=f"{name} image.*{message}"):
        register(images["fixed"], images["moving"], modalities=("CT", "CT"))


def test_images_apart_are_refused() -> None:
    header = centred(HEADERS["RAS"])
    far = header.copy()
    far[0, 3] += 500
    with pytest.raises(InputError, match="no voxel in common"):
        register(picture(header), Volume(picture(header).array, far))


def test_settings_that_cannot_be_are_refused() -> None:
    fixed = picture(centred(HEADERS["RAS"]))
    with pytest.raises(ConfigError, match="threads must be at least 1; got 0"):
        Registrar(CONFIG, threads=0)
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda; got 'tpu'"):
        Registrar(CONFIG, device="tpu")
    with pytest.raises(ConfigError, match="'ct'"):
        register(fixed, fixed, modalities=("ct", "CT"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA GPU is visible"):
        Registrar(CONFIG, device="cuda")


def test_motion_beyond_the_search_is_warned_of() -> None:
    header = centred(HEADERS["RAS"])
    found = register(picture(header), picture(header, moved_mm=motion_mm(header, (5.2, 0.0, 0.0))))  # the search ends at 5.3
    assert len(found.warnings) == 1 and "edge of the search range" in found.warnings[0]
    assert found.info["saturated"] > 0.02


# ---- state, threads, report


def test_nothing_is_left_behind_between_pairs() -> None:
    header = centred(HEADERS["RAS"])
    one, two = picture(header), picture(header, moved_mm=motion_mm(header))
    arrays = [one.array.copy(), two.array.copy()]
    registrar = Registrar(CONFIG, device="cpu")
    first = registrar.register(one, two)
    registrar.register(two, Volume(one.array[::-1].copy(), header))
    again = registrar.register(one, two)
    assert first.disp.tobytes() == again.disp.tobytes() == register(one, two).disp.tobytes()
    assert np.array_equal(one.array, arrays[0]) and np.array_equal(two.array, arrays[1])  # images are not written to


@pytest.mark.parametrize("lncc", [0.0, 1.0])
def test_result_is_the_same_to_the_bit_on_one_and_two_threads(lncc: float) -> None:
    header = centred(HEADERS["oblique"])
    fixed, moving = picture(header), picture(header, moved_mm=motion_mm(header))
    config = dataclasses.replace(CONFIG, refine=dataclasses.replace(REFINE, levels=((2, 4), (1, 2)), lncc=lncc))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            results.append(Registrar(config, device="cpu", threads=threads).register(fixed, moving))
            assert results[-1].info["threads"] == threads
    finally:
        torch.set_num_threads(before)
    assert results[0].disp.tobytes() == results[1].disp.tobytes()
    assert results[0].info["levels"] == results[1].info["levels"]  # losses, too


def test_stages_and_losses_are_reported() -> None:
    header = centred(HEADERS["RAS"])
    found = register(picture(header), picture(header, moved_mm=motion_mm(header)))
    assert list(found.stages) == ["prepare", "discrete", "refine", "finish"]
    assert all(s["seconds"] >= 0 and s["peak_rss_mb"] > 0 for s in found.stages.values())
    assert found.info["features"] == "mind" and found.info["device"] == "cpu" and found.info["repaired_voxels"] == 0
    levels = found.info["levels"]
    assert [level["iterations"] for level in levels] == [12, 12]
    assert levels[0]["lattice"] == [18, 16, 19]  # cells of about 3.2 mm
    assert levels[1]["lattice"] == list(SHAPE)  # 1.6 mm, but never finer than the voxels
    assert levels[0]["cell_mm"] == pytest.approx([2 * 28 / 18, 1.6 * 33 / 16, 2.4 * 25 / 19], abs=1e-3)
    assert levels[0]["loss_last"] < levels[0]["loss_first"]


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.solver == "composed"])
def test_every_preset_runs_on_a_small_pair(name: str) -> None:
    shape = (16, 18, 14)
    header = centred(affine((2.0, 2.0, 2.0)), shape)
    found = register(picture(header, shape), picture(header, shape, motion_mm(header, (1.0, -1.0, 0.5))),
                     dataclasses.replace(get_preset(name), features="mind"))
    assert found.disp.shape == (3, *shape) and np.isfinite(found.disp).all()
    np.testing.assert_allclose(np.median(found.disp[:, 4:-4, 4:-4, 4:-4], axis=(1, 2, 3)), (1.0, -1.0, 0.5), rtol=0, atol=0.25)


# ---- DINOv2's place


@pytest.mark.parametrize("features", ["dinov2", "dinov2+mind"])
def test_features_of_an_encoder_register_alike(features: str) -> None:
    """An encoder whose tokens are the mean grey values of their patches, one voxel each."""
    header = centred(HEADERS["LPS"])
    encoder = PatchMeans()
    config = dataclasses.replace(CONFIG, features=features, pca=PcaConfig(components=1),
                                 encoder=EncoderConfig(long_side_tokens=33, gap_mm=1.0))
    registrar = Registrar(config, device="cpu", encoder=encoder)
    found = registrar.register(picture(header), picture(header, moved_mm=motion_mm(header)))
    assert np.median(errors(found.disp)) < 0.3
    assert list(found.stages) == ["prepare", "encode", "discrete", "refine", "finish"]
    assert found.info["encoder"] == "patch means, no weights" and found.info["encoder_sha256"] is None
    assert len(encoder.images) == 2 * SHAPE[2]  # every axial slice of both, once


def test_the_encoder_is_not_asked_without_need() -> None:
    encoder = PatchMeans()
    header = centred(HEADERS["RAS"])
    Registrar(CONFIG, device="cpu", encoder=encoder).register(picture(header), picture(header))
    assert encoder.images == []


@pytest.mark.slow
def test_a_transformer_with_random_weights_goes_all_the_way() -> None:
    header = centred(HEADERS["RAS"])
    config = dataclasses.replace(CONFIG, features="dinov2+mind", encoder=EncoderConfig(long_side_tokens=12, gap_mm=12.0),
                                 pca=PcaConfig(components=8))
    registrar = Registrar(config, device="cpu", encoder=random_encoder("vits14_reg4", 0))
    found = registrar.register(picture(header), picture(header, moved_mm=motion_mm(header)))
    assert np.median(errors(found.disp)) < 0.5
    assert found.info["encoder"] == "vits14_reg4, random weights, seed 0"


# ---- warping with a result


def still(header: np.ndarray, shape: Sequence[int] = SHAPE) -> Registration:
    return Registration(np.zeros((3, *shape), dtype=np.float32), header)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("order", [0, 1])
def test_warping_keeps_the_type(dtype: type, order: int) -> None:
    header = centred(HEADERS["RAS"])
    volume = Volume((picture(header).array / 4).astype(dtype), header)
    disp = np.full((3, *SHAPE), 0.25, dtype=np.float32)
    found = Registration(disp, header).warp(volume, order)
    assert found.array.dtype == dtype
    assert np.array_equal(found.affine, header)
    if order == 0:  # a quarter of a voxel farther the nearest voxel is still the same one, at the border as well
        assert np.array_equal(found.array, volume.array)


def test_whole_numbers_are_rounded_not_cut_off() -> None:
    volume = Volume(np.array([0, 1, 2, 3, 4], dtype=np.int16)[:, None, None].repeat(5, 1).repeat(5, 2), np.eye(4))
    disp = np.zeros((3, 5, 5, 5), dtype=np.float32)
    disp[0, :4] = 0.75
    assert Registration(disp, np.eye(4)).warp(volume).array[:, 2, 2].tolist() == [1, 2, 3, 4, 4]


def test_labels_come_out_of_the_set_that_went_in() -> None:
    header = centred(HEADERS["RAS"])
    labels = np.random.default_rng(2).choice([0, 3, 200, 40000], SHAPE).astype(np.uint16)
    disp = np.random.default_rng(3).uniform(-3, 3, (3, *SHAPE)).astype(np.float32)
    found = Registration(disp, header).warp(Volume(labels, header), order=0).array
    at = np.rint(np.indices(SHAPE) + disp.astype(np.float64)).astype(int)
    outside = np.array([(x < 0) | (x >= n) for x, n in zip(at, SHAPE, strict=True)]).any(0)
    expected = labels[tuple(np.clip(x, 0, n - 1) for x, n in zip(at, SHAPE, strict=True))]
    wrong = found != np.where(outside, 0, expected)
    assert wrong.mean() < 1e-3  # points half-way between two voxels, to 1e-4
    assert set(np.unique(found)) == {0, 3, 200, 40000}


def test_a_mask_of_true_and_false_can_be_warped() -> None:
    header = centred(HEADERS["RAS"])
    mask = picture(header).array > 500
    found = still(header).warp(Volume(mask, header), order=0)
    assert found.array.dtype == bool and np.array_equal(found.array, mask)


@pytest.mark.parametrize("tilt", [0.0, 17.0])
@pytest.mark.parametrize("order", [0, 1])
def test_no_motion_brings_every_voxel_of_a_scan_stored_backwards(tilt: float, order: int) -> None:
    """Border voxels may come out a rounding error outside."""
    header = centred(affine((0.7, 1.3, 2.1), "RAS", tilt))
    values = picture(header).array
    turned = header.copy()
    turned[:, 3] += turned[:, :3] @ (np.array(SHAPE) - 1)
    turned[:, :3] *= -1
    found = still(header).warp(Volume(values[::-1, ::-1, ::-1].copy(), turned), order)
    np.testing.assert_allclose(found.array, values, rtol=1e-5)


def test_outside_is_zero_or_air() -> None:
    header = centred(HEADERS["RAS"])
    far = Registration(np.full((3, *SHAPE), 100, dtype=np.float32), header)
    assert not far.warp(Volume(picture(header).array, header)).array.any()
    hu = Volume((picture(header).array - 1200).astype(np.int16), header)
    assert (far.warp(hu).array == hu.array.min()).all() and not far.warp(hu, order=0).array.any()
