"""Memory: what is planned, what there is, and what happens where they do not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_encoder import affine
from small_pair import QUICK, scan, small_pair

import process
from dinoreg import slabs
from dinoreg.config import PRESETS, get_preset
from dinoreg.errors import ConfigError, RegistrationError
from dinoreg.io import write_volume
from dinoreg.memory import cgroup_limit, give_back, parse_bytes, peak_bytes, resident_bytes
from dinoreg.plan import GIB, LATER, SMALLER, Pair, fitting, plan
from dinoreg.registration import Registrar
from dinoreg.stages import watched
from dinoreg.volume import Volume

ROOT = Path(__file__).resolve().parents[1]


def pair(shape: tuple[int, int, int], dtype: type = np.int16) -> Pair:
    image = Volume(np.broadcast_to(dtype(0), shape), affine((0.7, 0.7, 0.8)))
    return Pair.of(image, image)


LARGE = pair((512, 512, 400))


# ---- plans


def test_a_large_thorax_fits_8_gib_on_a_cpu_and_with_the_large_encoder_a_gpu_of_16_gb() -> None:
    preset = get_preset("thorax-cbct")
    mind = plan(dataclasses.replace(preset, features="mind"), LARGE, output="all")
    assert mind.peak < 7.5 * GIB and mind.gpu == {} and mind.gpu_peak == 0
    large = plan(preset, LARGE, arch="vitl14_reg4", gpu=True, output="field")
    assert large.gpu_peak < 0.9 * 16e9 and large.peak < 8 * GIB
    assert large.gpu["encode"] > 1.2e9  # weights in float32


@pytest.mark.parametrize("name", PRESETS)
def test_larger_images_take_more_memory_in_every_stage(name: str) -> None:
    small, large = (plan(get_preset(name), pair(shape), output="all") for shape in ((64, 60, 50), (128, 120, 100)))
    assert list(small.host) == list(large.host)
    assert set(small.host) >= {"prepare", "encode", "discrete", "refine", "finish", "write", "page"}
    assert all(large.host[stage] > small.host[stage] > 0 for stage in small.host)
    assert large.peak == large.host[large.dearest] == max(large.host.values())


def test_the_finest_lattice_bounds_the_refinement() -> None:
    config = get_preset("generic")
    fewer = dataclasses.replace(config, refine=dataclasses.replace(config.refine, max_cells=2_000_000))
    full, bounded = (plan(c, LARGE).host["refine"] for c in (config, fewer))
    images = LARGE.held + 10 * 512 * 512 * 400 + LATER
    assert (full - images) / (bounded - images) == pytest.approx(8, rel=0.05)


def test_three_views_take_more_than_one() -> None:
    config = get_preset("generic")
    three = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, axis="all"))
    one, all_three = (plan(c, LARGE, arch="vitl14_reg4", output="field").host for c in (config, three))
    assert all(all_three[stage] > one[stage] for stage in ("encode", "discrete", "refine"))


def test_a_stage_without_an_encoder_is_not_planned() -> None:
    assert "encode" not in plan(dataclasses.replace(get_preset("generic"), features="mind"), LARGE).host


# ---- limits


def test_slabs_get_smaller_before_anything_is_refused() -> None:
    config = dataclasses.replace(QUICK, refine=dataclasses.replace(QUICK.refine, max_cells=1000))
    size = pair((200, 200, 200))
    whole, least = plan(config, size), plan(config, size, slab_voxels=slabs.VOXELS // SMALLER)
    assert least.peak < whole.peak
    assert fitting(config, size, whole.peak) == whole
    assert fitting(config, size, whole.peak - 1) == fitting(config, size, least.peak) == least
    with pytest.raises(RegistrationError):
        fitting(config, size, least.peak - 1)


@pytest.mark.parametrize("share", [0.7, 0.4, 0.25])
def test_a_refusal_says_what_would_fit(share: float) -> None:
    config = dataclasses.replace(get_preset("thorax-cbct"), features="mind")
    limit = int(share * plan(config, LARGE).peak)
    with pytest.raises(RegistrationError, match=r"512x512x400 voxels needs about \d.*what would fit: images resampled") as caught:
        fitting(config, LARGE, limit)
    factor = float(re.findall(r"voxels ([\d.]+) times as long", str(caught.value))[0])
    coarser = (round(512 / factor), round(512 / factor), round(400 / factor))
    assert plan(config, pair(coarser), slab_voxels=slabs.VOXELS // SMALLER).peak <= 1.01 * limit
    assert caught.value.exit_code == 6


def test_a_refusal_names_features_that_would_fit() -> None:
    config = get_preset("generic")
    limit = fitting(dataclasses.replace(config, features="mind"), LARGE, 2**50).peak
    with pytest.raises(RegistrationError, match="what would fit: --features mind, or"):
        fitting(config, LARGE, limit)


def test_a_pair_beyond_the_limit_is_refused_before_any_work() -> None:
    seen: list[str] = []
    with watched(lambda stage, *_: seen.append(stage)), pytest.raises(RegistrationError, match="the memory limit leaves"):
        Registrar(QUICK, device="cpu", max_memory=2**20).register(*small_pair())
    assert seen == []


def test_a_limit_that_needs_smaller_slabs_changes_nothing_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, moving = scan(affine((2.0, 2.0, 2.0)), (40, 36, 30)), scan(affine((2.0, 2.0, 2.0)), (40, 36, 30), moved_mm=3.0)
    free = Registrar(QUICK, device="cpu").register(fixed, moving)
    monkeypatch.setattr("dinoreg.registration.fitting", lambda *_, **__: plan(QUICK, Pair.of(fixed, moving), slab_voxels=1500))
    limited = Registrar(QUICK, device="cpu").register(fixed, moving)
    assert limited.info["plan"]["slab_voxels"] == 1500 and free.info["plan"]["slab_voxels"] == slabs.VOXELS
    assert limited.disp.tobytes() == free.disp.tobytes()


def test_the_plan_is_part_of_the_result() -> None:
    found = Registrar(QUICK, device="cpu", max_memory=64 * GIB).register(*small_pair()).info["plan"]
    assert set(found["stages"]) == {"read", "prepare", "discrete", "refine", "finish"} and found["gpu"] == {}
    assert found["limit"] <= 64 * GIB and found["base"] > 0


def _options(folder: Path) -> list[str]:
    for name, volume in zip(("fixed", "moving"), small_pair(), strict=True):
        write_volume(folder / f"in/images/{name}/x.mha", volume)
    return ["--input", str(folder / "in"), "--output", str(folder / "out"), "--features", "mind", "--device", "cpu"]


def test_max_memory_of_the_container(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _options(tmp_path)
    assert process.main([*options, "--max-memory", "1M"]) == 6
    assert "the memory limit leaves 0.00 GiB" in capsys.readouterr().err.splitlines()[-1]
    assert process.main([*options, "--max-memory", "lots"]) == 2
    assert "expected a size such as 8G" in capsys.readouterr().err.splitlines()[-1]


def test_the_report_has_the_plan_and_the_measured_peak(tmp_path: Path) -> None:
    assert process.main([*_options(tmp_path), "--time-limit", "0.001"]) == 0
    record = json.loads((tmp_path / "out/report.json").read_text())["pairs"][0]
    assert set(record["plan"]["stages"]) == {"read", "prepare", "discrete", "refine", "finish", "write", "metrics"}
    assert record["plan"]["measured_peak"] > 2**20 and "plan" not in record["info"]


# ---- what there is


@pytest.mark.parametrize(("text", "size"), [("8G", 8 * GIB), ("1.5GiB", 3 * GIB // 2), (" 900 mb ", 900 * 2**20), ("4096", 4096),
                                            ("2k", 2048)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "8X", "-1G", "0", "8 G B", "1e9", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 8G"):
        parse_bytes(text)


def groups(root: Path, **limits: str) -> Path:
    """A file system of control groups; names with __ for /."""
    for name, text in limits.items():
        path = root / name.replace("__", "/").replace("_max", ".max").replace("limit", "memory.limit_in_bytes")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_smallest_limit_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("0::/a/b\n")
    root = groups(tmp_path / "v2", a__b__memory_max="8000\n", a__memory_max="5000\n", other__memory_max="10\n")
    assert cgroup_limit(proc, root) == 5000
    assert cgroup_limit(proc, groups(tmp_path / "free", a__b__memory_max="max\n")) is None
    assert cgroup_limit(proc, groups(tmp_path / "inside", memory_max="7000\n")) == 7000  # a container: its own group is the root


def test_limits_of_version_1_are_found(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("11:cpu,cpuacct:/x\n5:memory:/docker/abc\n0::/\n")
    unlimited = f"{2**63 - 4096}\n"
    assert cgroup_limit(proc, groups(tmp_path / "host", memory__docker__abc__limit="6000\n", memory__limit=unlimited)) == 6000
    assert cgroup_limit(proc, groups(tmp_path / "inside", memory__limit="4000\n")) == 4000
    assert cgroup_limit(proc, groups(tmp_path / "none", memory__limit=unlimited)) is None


def test_no_groups_are_no_limit(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path / "missing", tmp_path) is None


def test_what_is_held_and_was_held() -> None:
    before = resident_bytes()
    held = np.ones(2**23)  # 64 MiB
    assert resident_bytes() > before + 0.8 * held.nbytes
    del held
    give_back()
    assert resident_bytes() < before + 2**25 and peak_bytes() > before + 2**25


@pytest.mark.slow
def test_a_plan_is_within_a_quarter_of_the_measured_peak() -> None:
    done = subprocess.run([sys.executable, "benchmarks/memory.py", "160x160x160:thorax-cbct:mind@0.02"], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
