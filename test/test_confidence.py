"""Confidence is low where another place would match as well, and costs the field nothing; colours show what the encoder saw."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoder import PatchMeans
from scipy import ndimage
from test_registration import CONFIG, HEADERS, SHAPE, SHIFT, centred, motion_mm, picture, register

from dinoreg import registration
from dinoreg.config import DiscreteConfig, PcaConfig
from dinoreg.convex import CLEAR_CELLS, CLEAR_COST, FeatureVolume, candidates, confidence, discrete
from dinoreg.errors import InputError
from dinoreg.io import write_volume
from dinoreg.registration import Registrar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import confidence as benchmark


def plain(cost: np.ndarray, steps: np.ndarray, disp: np.ndarray) -> np.ndarray:
    """The definition, cell by cell in double precision."""
    found = np.zeros(cost.shape[1:])
    for cell in np.ndindex(*found.shape):
        elsewhere = np.linalg.norm(steps - disp[(slice(None), *cell)], axis=1) > CLEAR_CELLS
        costs = cost[(slice(None), *cell)]
        if elsewhere.any() and not elsewhere.all():
            margin = costs[elsewhere].min() - costs[~elsewhere].min()
            found[cell] = 1 - np.exp(-max(margin, 0) / CLEAR_COST)
    return found


def test_it_is_the_margin_between_here_and_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = candidates(3) * 0.5
    cost = torch.rand(len(steps), 4, 3, 5, generator=generator)
    disp = torch.randn(3, 4, 3, 5, generator=generator)
    # near elsewhere's border the squared distance rounds: no candidate is that close to it here
    expected = plain(cost.double().numpy(), steps.double().numpy(), disp.double().numpy())
    assert 0 < (expected > 0).mean() < 1  # both kinds of cells
    np.testing.assert_allclose(confidence(cost, steps, disp).numpy(), expected, rtol=0, atol=1e-5)  # float32


def test_it_is_zero_where_all_places_cost_the_same_or_all_are_near() -> None:
    steps = candidates(2)
    flat = torch.full((len(steps), 3, 4, 2), 0.7)
    assert not confidence(flat, steps, torch.zeros(3, 3, 4, 2)).any()
    assert not confidence(torch.rand(len(steps), 3, 4, 2), 0.1 * steps, torch.zeros(3, 3, 4, 2)).any()
    assert not confidence(torch.rand(len(steps), 3, 4, 2), steps, torch.full((3, 3, 4, 2), 9.0)).any()  # none is near


def test_texture_is_clear_and_its_absence_and_repetition_are_not() -> None:
    shape, coarse = (48, 24, 24), (24, 12, 12)
    noise = np.random.default_rng(0).standard_normal((12, *shape))
    features = np.stack([ndimage.gaussian_filter(channel, 0.7, mode="wrap") for channel in noise])
    features *= (2 * features.var(axis=(1, 2, 3)).sum()) ** -0.5  # unrelated places differ by 1
    features[:, 16:32] = 0  # nothing to see
    features[:, 32:] = np.tile(features[:, :4, :4, :4], (1, 4, 6, 6))  # the same every 4 cells
    volume = FeatureVolume(torch.from_numpy(features).float(), torch.ones(shape))
    found = discrete(volume, volume, 5, coarse, 15)[2].numpy()
    assert found.shape == coarse and found.min() >= 0 and found.max() < 1
    # away from the seams, which are 2 cells of boxes and 2.5 of search wide; a margin of 0.2 of unrelated tissue is 0.86
    texture, nothing, repeated = (np.median(found[part, 3:-3, 3:-3]) for part in (slice(1, 5), slice(11, 13), slice(19, 23)))
    assert texture > 0.86 and nothing < 0.05 and repeated < 0.05


def test_it_lies_on_the_fixed_grid_and_knows_where_the_image_is_empty() -> None:
    header = centred(HEADERS["LPS"])
    fixed = picture(header)
    fixed.array[:14] = 500.0  # half of it without texture
    found = register(fixed, picture(header, moved_mm=motion_mm(header))).confidence
    assert found is not None and found.shape == SHAPE and found.dtype == np.float32
    assert found.min() >= 0 and found.max() < 1
    assert np.median(found[22:-4, 6:-6, 6:-6]) > 2 * np.median(found[2:8, 6:-6, 6:-6])


def test_levels_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter((0.5, 0.4))
    monkeypatch.setattr(registration, "discrete", lambda fixed, moving, reach, coarse, iterations: (
        torch.zeros(3, *coarse), 0.0, torch.full(coarse, next(values))))
    header = centred(HEADERS["RAS"])
    config = replace(CONFIG, discrete=DiscreteConfig(levels=((12, 2, 4), (20, 2, 4))))
    found = register(picture(header), picture(header), config).confidence
    np.testing.assert_allclose(found, 0.2, rtol=1e-5)  # float32


def test_colours_come_when_asked_and_follow_the_anatomy() -> None:
    header = centred(HEADERS["SPL"])
    fixed, moving = picture(header), picture(header, moved_mm=motion_mm(header))
    config = replace(CONFIG, features="dinov2+mind", pca=PcaConfig(components=2))
    registrar = Registrar(config, device="cpu", encoder=PatchMeans())
    assert registrar.register(fixed, moving).colours is None
    result = registrar.register(fixed, moving, colours=True)
    assert result.colours is not None and result.colours.shape == (2, *SHAPE, 3) and result.colours.dtype == np.uint8
    inner = (slice(None), *(slice(6, -6) for _ in range(3)))
    seen = result.colours[inner].astype(float)
    assert not seen[..., 0].any()  # two components: no red
    aligned = np.abs(seen[0] - seen[1])[..., 1:].mean()
    assert seen[..., 1].std() > 20  # there is something to see
    shifted = np.abs(seen[0] - np.roll(seen[0], [round(s) for s in SHIFT], (0, 1, 2)))[..., 1:].mean()
    assert aligned < 0.5 * shifted


def test_colours_need_an_encoder() -> None:
    header = centred(HEADERS["RAS"])
    image = picture(header)
    assert Registrar(CONFIG, device="cpu").register(image, image, colours=True).colours is None


# ---- benchmarks/confidence.py


def test_quarters_go_by_confidence_and_a_perfect_order_is_minus_one() -> None:
    error = np.array([8.0, 1, 6, 3, 4, 5, 2, 7])
    row = benchmark.by_confidence(error, -error)
    assert row.quarters == (7.5, 5.5, 3.5, 1.5) and row.tre == 4.5
    assert row.correlation == pytest.approx(-1)
    assert benchmark.by_confidence(error, error).correlation == pytest.approx(1)
    with pytest.raises(InputError, match="8 landmarks"):
        benchmark.by_confidence(error[:7], error[:7])


def test_the_benchmark_gives_a_line_for_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    header = centred(HEADERS["RAS"])
    images = {"0001_0001": picture(header), "0001_0000": picture(header, moved_mm=motion_mm(header))}
    points = np.random.default_rng(0).integers(5, np.array(SHAPE) - 5, (20, 3)).astype(float)
    for folder in ("imagesTr", "keypointsTr"):
        (tmp_path / "Small" / folder).mkdir(parents=True)
    for (name, volume), shift in zip(images.items(), (0, np.array(SHIFT)), strict=True):
        write_volume(tmp_path / "Small" / "imagesTr" / f"Small_{name}.nii.gz", volume)
        np.savetxt(tmp_path / "Small" / "keypointsTr" / f"Small_{name}.csv", points + shift, delimiter=",")
    pair = {"fixed": "./imagesTr/Small_0001_0001.nii.gz", "moving": "./imagesTr/Small_0001_0000.nii.gz"}
    (tmp_path / "Small" / "Small_dataset.json").write_text(json.dumps(
        {"name": "Small", "modality": {"0": "MR", "1": "MR"}, "registration_val": [pair]}))
    monkeypatch.setattr(benchmark, "get_preset", lambda name: CONFIG)
    assert benchmark.main([str(tmp_path), "--sets", "Small"]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:2] == ["Small", "1"] and len(cells) == len(benchmark.HEAD)
    assert 0 < float(cells[2]) < 0.5  # mm: the shift is found
    assert benchmark.main([str(tmp_path), "--sets", "Missing"]) == InputError.exit_code
