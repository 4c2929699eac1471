"""ANTs, given the files that are written, warps images and carries points as we do, also on oblique and anisotropic grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from test_transforms import SHAPE, header, image, smooth_disp, turned

from dinoreg.io import write_volume
from dinoreg.result import Registration
from dinoreg.volume import Volume

pytestmark = pytest.mark.slow  # 5 s, mostly to load ANTs

KINDS = ["RAS", "LPS", "LAS", "SPL", "oblique"]
OUTSIDE = -9.0


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Registration, Volume]:
    """A folder as ``dinoreg register`` leaves it after an affine start, with the images; spacings of 1.2 to 3 mm."""
    affine, initial = header(request.param), turned(4, 2)
    in_voxels = np.linalg.solve(affine, initial @ affine)
    voxels = np.indices(SHAPE, dtype=np.float64)
    disp = np.einsum("ab,bijk->aijk", in_voxels[:3, :3], voxels + smooth_disp()) + in_voxels[:3, 3, None, None, None] - voxels
    result = Registration(disp.astype(np.float32), affine, initial=initial)
    moving = image(turned(6, 1) @ affine @ np.diag([0.8, 0.8, 0.8, 1.0]))
    write_volume(tmp_path / "fixed.nii.gz", Volume(image(affine, SHAPE).array, affine))
    write_volume(tmp_path / "moving.nii.gz", moving)
    result.save(tmp_path, moving)
    return tmp_path, result, moving


def load_ants() -> Any:
    """Here, not at the top: it takes seconds, also where these tests are not selected."""
    return pytest.importorskip("ants", reason="ANTs is not installed (requirements-test.txt: antspyx)")


def by_ants(folder: Path, reference: str, moving: str, transform: str) -> npt.NDArray[np.float32]:
    ants = load_ants()
    images = [ants.image_read(str(folder / name)) for name in (reference, moving)]
    warped = ants.apply_transforms(*images, [str(folder / transform)], interpolator="linear", defaultvalue=OUTSIDE)
    return np.asarray(warped.numpy())


@pytest.mark.parametrize("name", ["displacement.nii.gz", "transform.h5"])
def test_ants_warps_as_we_do(saved: tuple[Path, Registration, Volume], name: str) -> None:
    folder, result, moving = saved
    found, ours = by_ants(folder, "fixed.nii.gz", "moving.nii.gz", name), result.warp(moving).array
    inside = found != OUTSIDE
    assert inside.mean() > 0.4
    # headers and fields are float32 in NIfTI: 1e-5 mm where coordinates are about 50 mm; the image changes .1 a mm
    np.testing.assert_allclose(ours[inside], found[inside], rtol=0, atol=2e-5)


def test_ants_goes_the_way_back_as_we_do(saved: tuple[Path, Registration, Volume]) -> None:
    folder, result, moving = saved
    fixed = image(result.fixed_affine, SHAPE)
    found, ours = by_ants(folder, "moving.nii.gz", "fixed.nii.gz", "inverse.nii.gz"), result.inverse(moving).warp(fixed).array
    inside = found != OUTSIDE
    assert inside.mean() > 0.2
    np.testing.assert_allclose(ours[inside], found[inside], rtol=0, atol=2e-5)  # as above


def test_ants_carries_points_where_we_do(saved: tuple[Path, Registration, Volume]) -> None:
    ants, (folder, result, _) = load_ants(), saved
    import pandas  # which ANTs brings

    voxels = np.random.default_rng(4).uniform(2, np.array(SHAPE) - 3, (20, 3))
    ras = voxels @ result.fixed_affine[:3, :3].T + result.fixed_affine[:3, 3]
    flip = np.array([-1.0, -1, 1])
    lps = pandas.DataFrame(ras * flip, columns=["x", "y", "z"])
    moved = ants.apply_transforms_to_points(3, lps, [str(folder / "displacement.nii.gz")])
    found = moved[["x", "y", "z"]].to_numpy() * flip
    assert np.linalg.norm(found - ras, axis=1).mean() > 0.5
    np.testing.assert_allclose(result.map_points(ras), found, rtol=0, atol=1e-3)  # ANTs hands points on as text or float32
