"""All three views: each plane of the body is shown, and the field is found from them together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from fake_encoder import PatchMeans
from small_pair import QUICK, SHIFT_MM, small_pair

from dinoreg.cache import TokenCache
from dinoreg.config import PRESETS, EncoderConfig, PcaConfig
from dinoreg.errors import ConfigError
from dinoreg.registration import Registrar
from dinoreg.stages import watched

FIXED, MOVING = small_pair()


def found(axis: str) -> tuple[np.ndarray, PatchMeans, list[tuple[int, int]]]:
    """Mean displacement in the middle (RAS mm), what the encoder was shown, and how far encoding was."""
    encoder, steps = PatchMeans(), list[tuple[int, int]]()
    config = dataclasses.replace(QUICK, features="dinov2", pca=PcaConfig(components=1),  # grey patches have no more
                                 encoder=EncoderConfig(long_side_tokens=24, gap_mm=2.0, axis=axis))
    with watched(lambda stage, done, total: steps.append((done, total)) if stage == "encode" else None):
        result = Registrar(config, device="cpu", encoder=encoder).register(FIXED, MOVING)
    return FIXED.affine[:3, :3] @ result.disp[:, 6:-6, 6:-6, 6:-6].reshape(3, -1).mean(1), encoder, steps


def test_three_views_find_the_motion() -> None:
    mm, encoder, _ = found("all")
    assert np.abs(mm - SHIFT_MM).max() < 1.0  # half a voxel
    alone = [found(axis)[1] for axis in ("axial", "coronal", "sagittal")]
    assert len(encoder.images) == sum(len(one.images) for one in alone)
    for image, expected in zip(encoder.images, (image for one in alone for image in one.images), strict=True):
        assert np.array_equal(image.numpy(), expected.numpy())


def test_progress_goes_through_all_views_once() -> None:
    _, _, steps = found("all")
    shares = [done / total for done, total in steps]
    assert shares == sorted(shares) and shares[-1] == 1.0 and len({round(share, 6) for share in shares}) > 12


def test_where_one_view_is_meant_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one view"):
        dataclasses.replace(PRESETS["published"], encoder=EncoderConfig(axis="all"))
    config = dataclasses.replace(QUICK, features="dinov2", encoder=EncoderConfig(axis="all"))
    with pytest.raises(ConfigError, match="one view"):
        Registrar(config, device="cpu", encoder=PatchMeans(), cache=TokenCache(tmp_path / "cache", 10**9))
    with pytest.raises(ConfigError, match="all"):
        EncoderConfig(axis="oblique")
