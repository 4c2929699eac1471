"""The cache of encoded volumes: what comes out is what went in, whatever happens to files and processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoder import PatchMeans, affine
from test_encoding import CONFIG, ball, same
from test_registration import DISCRETE, REFINE

from dinoreg.cache import ABANDONED, SUFFIX, TokenCache
from dinoreg.config import Config
from dinoreg.encoding import EncodedVolume
from dinoreg.errors import ConfigError
from dinoreg.pca import Moments
from dinoreg.registration import Registrar
from dinoreg.slices import TokenGeometry, TokenGrid
from dinoreg.volume import Volume

MIB = 2**20


def entry(seed: int, channels: int = 6, slices: int = 3) -> EncodedVolume:
    generator = torch.Generator().manual_seed(seed)
    positions = tuple(np.sort(np.random.default_rng(seed).random(n)) for n in (5, 4, slices))
    geometry = TokenGeometry((12, 10, 9), (2, 0, 1), positions, ((-0.5, 3.25), (0.0, 9.5), (-1.0, 8.0)))  # type: ignore[arg-type]
    grid = TokenGrid(torch.rand(slices, 5, 4, channels, generator=generator).half(),
                     torch.rand(slices, 5, 4, generator=generator) > 0.5, geometry)
    scatter = torch.rand(channels, channels, generator=generator, dtype=torch.float64)
    return EncodedVolume(grid, Moments(17, torch.rand(channels, generator=generator, dtype=torch.float64), scatter))


def test_an_entry_comes_back_to_the_bit(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, MIB)
    assert cache.get("a") is None
    cache.put("a", entry(1))
    found = cache.get("a")
    assert found is not None and same(found, entry(1)) and not same(found, entry(2))
    assert found.moments is not None and found.moments.count == 17
    geometry, expected = found.grid.geometry, entry(1).grid.geometry
    assert (geometry.shape, geometry.axes, geometry.extent) == (expected.shape, expected.axes, expected.extent)
    assert all(np.array_equal(*lines) for lines in zip(geometry.positions, expected.positions, strict=True))


def test_projected_entries_have_no_moments(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, MIB)
    cache.put("a", dataclasses.replace(entry(1), moments=None))
    found = cache.get("a")
    assert found is not None and found.moments is None


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "other"])
def test_a_damaged_entry_is_noticed_and_removed(tmp_path: Path, spoil: str) -> None:
    cache = TokenCache(tmp_path, MIB)
    cache.put("a", entry(1))
    path = tmp_path / f"a{SUFFIX}"
    content = bytearray(path.read_bytes())
    if spoil == "flip":
        content[-100] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[: len(content) // 2]), "empty": b"",
                      "other": b"not an entry\nat all"}[spoil])
    assert cache.get("a") is None and not path.exists()


def test_the_entries_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, 10 * MIB)
    cache.put("a", entry(1))
    size = (tmp_path / f"a{SUFFIX}").stat().st_size
    cache.limit_bytes = int(3.5 * size)
    for age, key in enumerate("bc"):
        cache.put(key, entry(1))
        os.utime(tmp_path / f"{key}{SUFFIX}", (1000 + age, 1000 + age))
    os.utime(tmp_path / f"a{SUFFIX}", (10, 10))
    assert cache.get("a") is not None  # used now
    cache.put("d", entry(1))
    assert "b" not in cache and all(key in cache for key in "acd")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= cache.limit_bytes


def test_an_entry_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, 100)
    cache.put("a", entry(1))
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, MIB)
    old, young = tmp_path / f".1-a{SUFFIX}", tmp_path / f".2-a{SUFFIX}"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - ABANDONED - 1,) * 2)
    cache.put("b", entry(1))
    assert not old.exists() and young.exists()


def test_a_size_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size above 0"):
        TokenCache(tmp_path, 0)


def _write_for_ever(folder: str, seed: int) -> None:
    cache = TokenCache(Path(folder), 3 * MIB)
    while True:
        for key in range(20):
            cache.put(str(key), entry(key, channels=100))


@pytest.mark.slow
def test_writers_that_are_killed_at_any_moment_leave_whole_entries(tmp_path: Path) -> None:
    """Four processes write the same keys, with room for about half of them, and die; reading goes on meanwhile."""
    context = multiprocessing.get_context("spawn")
    cache = TokenCache(tmp_path, 3 * MIB)
    good = 0
    for _ in range(2):
        writers = [context.Process(target=_write_for_ever, args=(str(tmp_path), seed)) for seed in range(4)]
        for writer in writers:
            writer.start()
        while good < 20:
            good += any(path.name.startswith(".") is False for path in tmp_path.iterdir())
            time.sleep(0.05)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            for key in range(20):
                found = cache.get(str(key))
                assert found is None or same(found, entry(key, channels=100))
                good += found is not None
        for writer in writers:
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    assert good > 40
    for key in range(20):
        found = cache.get(str(key))
        assert found is None or same(found, entry(key, channels=100))


def registrar(encoder: PatchMeans, cache: TokenCache | None) -> Registrar:
    config = Config(features="dinov2", discrete=DISCRETE, refine=dataclasses.replace(REFINE, levels=((2, 2),)),
                    encoder=CONFIG.encoder, pca=CONFIG.pca)
    return Registrar(config, device="cpu", encoder=encoder, cache=cache)


def test_an_atlas_of_n_scans_costs_n_plus_1_encodings_and_the_same_fields(tmp_path: Path) -> None:
    atlas = ball(affine((2.0, 2.0, 2.0)))
    scans = [ball(affine((2.0, 2.0, 2.1), "LPS"), centre=(shift, 1, 0)) for shift in (1, 2, 3)]
    caches = [TokenCache(tmp_path / name, 10 * MIB) for name in ("0", "1", "2", "one")]
    each = [registrar(PatchMeans(), cache).register(atlas, scan) for cache, scan in zip(caches, scans, strict=False)]
    one = [registrar(PatchMeans(), caches[-1]).register(atlas, scan) for scan in scans]
    assert [result.info["volumes_encoded"] for result in each] == [2, 2, 2]
    assert [result.info["volumes_encoded"] for result in one] == [2, 1, 1]
    assert len(list((tmp_path / "one").iterdir())) == len(scans) + 1
    assert all(np.array_equal(a.disp, b.disp) for a, b in zip(each, one, strict=True))


def test_a_report_tells_how_volumes_were_encoded(tmp_path: Path) -> None:
    """Tokens of a volume by itself are others than those of a pair in one window: --resume must not mix them."""
    plain, cached = registrar(PatchMeans(), None), registrar(PatchMeans(), TokenCache(tmp_path, MIB))
    assert (plain.engine["encoded"], cached.engine["encoded"]) == ("in pairs", "by itself")


def test_a_cache_that_cannot_be_written_does_not_stop_a_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                     caplog: pytest.LogCaptureFixture) -> None:
    cache = TokenCache(tmp_path / "cache", MIB)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file")
    volume = ball(affine((2.0, 2.0, 2.0)))
    assert registrar(PatchMeans(), cache).encode(Volume(volume.array, volume.affine), None, "")[1]
    assert "not kept for other pairs" in caplog.text


@pytest.mark.parametrize(("features", "preset"), [("mind", "generic"), ("dinov2", "published")])
def test_a_cache_without_tokens_of_single_volumes_is_refused(tmp_path: Path, features: str, preset: str) -> None:
    from dinoreg.config import get_preset

    with pytest.raises(ConfigError, match="expected features with dinov2"):
        Registrar(dataclasses.replace(get_preset(preset), features=features), encoder=PatchMeans(),
                  cache=TokenCache(tmp_path, MIB))
