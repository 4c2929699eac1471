"""Transforms: what is written is what ITK applies, and what is read is what was written."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk
from scipy import ndimage

from dinoreg.errors import InputError, OutputError
from dinoreg.io import to_itk
from dinoreg.result import Registration
from dinoreg.transforms import from_disp, from_matrix, invert, read_transform, write_composite, write_field_mm
from dinoreg.volume import Volume

SHAPE = (20, 17, 14)
RNG = np.random.default_rng(5)


def turned(degrees: float, axis: int) -> npt.NDArray[np.float64]:
    matrix, (a, b) = np.eye(4), [other for other in range(3) if other != axis]
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def header(kind: str) -> npt.NDArray[np.float64]:
    scale = np.diag([1.5, 2.0, 3.0, 1.0])
    scale[:3, 3] = 12.0, -31.0, 7.0
    flips = {"RAS": np.eye(4), "LPS": np.diag([-1.0, -1, 1, 1]), "LAS": np.diag([-1.0, 1, 1, 1])}
    if kind == "oblique":
        return turned(17, 0) @ turned(-9, 2) @ scale
    if kind == "SPL":
        return np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]) @ scale
    return flips[kind] @ scale


def smooth_disp(size: float = 1.5, shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[np.float32]:
    noise = np.stack([ndimage.gaussian_filter(part, 4.0) for part in np.random.default_rng(1).normal(size=(3, *shape))])
    return (noise * (size / np.abs(noise).max())).astype(np.float32)


def image(affine: npt.NDArray[np.float64], shape: tuple[int, int, int] = (24, 22, 19)) -> Volume:
    return Volume(ndimage.gaussian_filter(np.random.default_rng(2).normal(size=shape), 2.0).astype(np.float32), affine)


@pytest.mark.parametrize("kind", ["RAS", "LPS", "LAS", "SPL", "oblique"])
@pytest.mark.parametrize("name", ["field.nii.gz", "field.mha", "field.nrrd", "transform.h5"])
def test_itk_with_the_written_transform_resamples_as_we_warp(tmp_path: Path, kind: str, name: str) -> None:
    fixed_affine = header(kind)
    moving = image(fixed_affine @ np.diag([0.9, 0.8, 0.8, 1.0]))
    disp, path = smooth_disp(), tmp_path / name
    initial = turned(4, 2)
    if name.endswith(".h5"):
        write_composite(path, disp, fixed_affine, initial)
    else:
        write_field_mm(path, disp, fixed_affine)
    reference = to_itk(Volume(np.zeros(SHAPE, dtype=np.float32), fixed_affine))
    by_itk = sitk.GetArrayFromImage(sitk.Resample(to_itk(moving), reference, read_transform(path).itk, sitk.sitkLinear, -9.0)).T
    ours = Registration(disp, fixed_affine).warp(moving).array
    inside = by_itk != -9
    assert inside.mean() > 0.5
    # float32 displacements of a few mm are known to 1e-6 mm, headers in NIfTI to 1e-6 of their size; the image changes .1 a mm
    np.testing.assert_allclose(ours[inside], by_itk[inside], rtol=0, atol=2e-5)


def test_formats_agree(tmp_path: Path) -> None:
    affine, disp = header("oblique"), smooth_disp()
    grid = Volume(np.zeros(SHAPE, dtype=np.uint8), affine)
    for name in ("a.nii.gz", "a.nii", "a.mha", "a.nrrd"):
        write_field_mm(tmp_path / name, disp, affine)
        found = read_transform(tmp_path / name).field_on(grid)
        wrong_mm = np.linalg.norm(np.einsum("ab,bijk->aijk", affine[:3, :3], found - disp), axis=0)
        # a border voxel may fall outside by the rounding of a NIfTI header, where ITK's field ends
        assert wrong_mm[1:-1, 1:-1, 1:-1].max() < 1e-5


def test_the_challenges_field_is_read_in_voxels(tmp_path: Path) -> None:
    from dinoreg.io import write_disp_nifti

    affine, disp = header("SPL"), smooth_disp()
    write_disp_nifti(tmp_path / "disp.nii.gz", disp, affine)
    found = read_transform(tmp_path / "disp.nii.gz").field_on(Volume(np.zeros(SHAPE, dtype=np.uint8), affine))
    np.testing.assert_allclose(found[:, 1:-1, 1:-1, 1:-1], disp[:, 1:-1, 1:-1, 1:-1], rtol=0, atol=1e-5)  # float32 header


def test_points_go_from_fixed_to_moving(tmp_path: Path) -> None:
    matrix = turned(30, 2)
    matrix[:3, 3] = 5.0, -6, 7
    points = RNG.normal(size=(5, 3)) * 20
    expected = points @ matrix[:3, :3].T + matrix[:3, 3]
    np.testing.assert_allclose(from_matrix(matrix).points(points), expected, rtol=0, atol=1e-9)  # double precision
    np.savetxt(tmp_path / "m.txt", matrix)
    np.testing.assert_allclose(read_transform(tmp_path / "m.txt").points(points), expected, rtol=0, atol=1e-9)
    sitk.WriteTransform(from_matrix(matrix).itk, str(tmp_path / "m.tfm"))
    np.testing.assert_allclose(read_transform(tmp_path / "m.tfm").points(points), expected, rtol=0, atol=1e-9)
    assert from_matrix(matrix).points(np.zeros((0, 3))).shape == (0, 3)


def test_points_of_a_field_are_those_of_its_voxels() -> None:
    affine, disp = header("oblique"), smooth_disp()
    at = np.array([[3, 4, 5], [10, 9, 8]])
    world = at @ affine[:3, :3].T + affine[:3, 3]
    expected = (at + disp[:, at[:, 0], at[:, 1], at[:, 2]].T) @ affine[:3, :3].T + affine[:3, 3]
    np.testing.assert_allclose(from_disp(disp, affine).points(world), expected, rtol=0, atol=1e-6)  # disp is float32


def test_the_composite_holds_the_initial_transform_by_itself(tmp_path: Path) -> None:
    affine, initial = header("LPS"), turned(8, 0)
    in_voxels = np.linalg.solve(affine, initial @ affine)
    voxels = np.indices(SHAPE, dtype=np.float64)
    disp = np.einsum("ab,bijk->aijk", in_voxels[:3, :3], voxels) + in_voxels[:3, 3, None, None, None] - voxels
    write_composite(tmp_path / "t.h5", disp.astype(np.float32), affine, initial)
    parts = sitk.CompositeTransform(sitk.ReadTransform(str(tmp_path / "t.h5")))
    assert parts.GetNumberOfTransforms() == 2
    point = (30.0, -20.0, 10.0)
    expected = from_matrix(initial).itk.TransformPoint(point)
    np.testing.assert_allclose(parts.GetNthTransform(0).TransformPoint(point), expected, rtol=0, atol=1e-9)  # double precision
    assert np.abs(np.array(parts.TransformPoint(point)) - expected).max() < 1e-4  # what float32 leaves of the rest


@pytest.mark.parametrize("turn", [0.0, 40.0])
def test_there_and_back_is_the_identity(turn: float) -> None:
    """Also where the transform turns by more than a plain fixed point could undo."""
    affine = header("oblique")
    in_voxels = np.linalg.solve(affine, turned(turn, 1) @ affine)
    voxels = np.indices(SHAPE, dtype=np.float64)
    disp = (np.einsum("ab,bijk->aijk", in_voxels[:3, :3], voxels + smooth_disp()) + in_voxels[:3, 3, None, None, None]
            - voxels).astype(np.float32)
    moving = Volume(np.zeros((13, 21, 12), dtype=np.uint8), turned(turn, 1) @ affine @ np.diag([1.4, 0.8, 1.1, 1]))
    inverse, residual = invert(disp, affine, moving)
    assert inverse.shape == (3, *moving.shape) and residual.shape == moving.shape
    back = np.indices(moving.shape) + inverse
    to_fixed = np.linalg.solve(affine, moving.affine)
    fixed = np.einsum("ab,bijk->aijk", to_fixed[:3, :3], back) + to_fixed[:3, 3, None, None, None]
    again = fixed + np.stack([ndimage.map_coordinates(part, fixed, order=1, mode="nearest") for part in disp])
    there = np.einsum("ab,bijk->aijk", to_fixed[:3, :3], np.indices(moving.shape)) + to_fixed[:3, 3, None, None, None]
    inside = np.all([(at > 0) & (at < n - 1) for at, n in zip(fixed, SHAPE, strict=True)], axis=0)
    assert inside.mean() > 0.1
    assert np.abs(again - there)[:, inside].max() < 0.011  # the tolerance, and float32
    assert residual[inside].max() < 0.011 * 3 * 3**0.5  # of voxels of at most 3 mm along each of three axes


def test_the_residual_tells_of_folds() -> None:
    disp = np.random.default_rng(3).normal(size=(3, *SHAPE)).astype(np.float32) * 4  # no two neighbours go the same way
    _, residual = invert(disp, np.eye(4), Volume(np.zeros(SHAPE, dtype=np.uint8), np.eye(4)))
    assert residual.max() > 0.5


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.tfm", b"nonsense", "cannot be read"), ("a.h5", b"", "cannot be read"), ("a.txt", b"1 2 3\n4 5 6\n", "4x4"),
    ("a.txt", b"1 0 0 0\n0 0 0 0\n0 0 1 0\n0 0 0 1\n", "inverted"), ("a.nii.gz", b"1234", "cannot be read"),
    ("a.txt", b"1 2 3\n4 5\n", "4x4"), ("a.png", b"", "expected one of"), (None, b"", "no such file"),
])
def test_what_is_no_transform_is_named(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "missing.h5")
    if name:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_transform(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["field.nii.gz", "field.nii", "field.mha", "field.nrrd"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_field_is_refused(tmp_path: Path, name: str, share: float) -> None:
    """ITK would give the rest of a NIfTI as zeros: no displacement."""
    write_field_mm(tmp_path / name, smooth_disp(), header("LPS"))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=f"{name}: .*write it again|{name}: .*truncated"):
        read_transform(tmp_path / name)


def test_a_field_whose_checksum_is_wrong_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "field.nii.gz"
    write_field_mm(path, smooth_disp(), header("LPS"))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="write it again"):
        read_transform(path)


def affine_file(path: Path) -> bytes:
    sitk.WriteTransform(from_matrix(turned(10, 1)).itk, str(path))
    return path.read_bytes()


@pytest.mark.parametrize("size", [0.3, 0.79, 0.95])
def test_a_truncated_mat_is_refused(tmp_path: Path, size: float) -> None:
    """The second matrix in it is the centre of rotation, without which ITK would go on."""
    path = tmp_path / "a.mat"
    content = affine_file(path)
    assert read_transform(path).matrix() == pytest.approx(turned(10, 1))
    path.write_bytes(content[: int(size * len(content))])
    with pytest.raises(InputError, match="cannot be read"):
        read_transform(path)


@pytest.mark.parametrize("name", ["a.tfm", "a.txt"])
@pytest.mark.parametrize(("old", "new"), [
    (b"Parameters: ", b"Parameters: nan "), (b"Parameters: ", b"Parameters: 1e999 "), (b"Parameters: ", b"Parameters: 1e308 "),
    (b"AffineTransform", b"Affine\xff\xfe"),
    (b"AffineTransform", b"DisplacementFieldTransform")])
def test_damaged_text_transforms_are_refused(tmp_path: Path, name: str, old: bytes, new: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(affine_file(path).replace(old, new, 1))
    with pytest.raises(InputError, match=f"{name}: expected"):
        read_transform(path)


@pytest.mark.parametrize("part", ["affine", "field"])
def test_a_composite_that_is_not_finite_is_refused(tmp_path: Path, part: str) -> None:
    disp, affine = smooth_disp().astype(np.float64), turned(3, 0)
    if part == "field":
        disp[1, 2, 3, 4] = np.inf
    else:
        affine[0, 3] = np.nan
    whole = sitk.CompositeTransform([from_matrix(affine).itk, from_disp(disp, header("RAS")).itk])
    sitk.WriteTransform(whole, str(tmp_path / "t.h5"))
    with pytest.raises(InputError, match="finite parameters"):
        read_transform(tmp_path / "t.h5")


@pytest.mark.parametrize(("reader", "message"), [("kill -SEGV $$", "crashes"), ("sleep 60", "does not come to an end"),
                                                 ("echo some words >&2; exit 1", "some words")])
def test_hdf5_that_makes_the_library_crash_or_hang_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str,
                                                              message: str) -> None:
    path, stub = tmp_path / "t.h5", tmp_path / "python"
    write_composite(path, smooth_disp(), header("RAS"), np.eye(4))
    stub.write_text(f"#!/bin/bash\n{reader}\n")
    stub.chmod(0o755)
    monkeypatch.setattr("dinoreg.transforms.sys.executable", str(stub))
    monkeypatch.setattr("dinoreg.transforms.HDF5_SECONDS", 0.5)
    with pytest.raises(InputError, match=message):
        read_transform(path)


def test_an_image_is_no_field(tmp_path: Path) -> None:
    sitk.WriteImage(to_itk(image(np.eye(4))), str(tmp_path / "image.mha"))
    with pytest.raises(InputError, match="3-vectors"):
        read_transform(tmp_path / "image.mha")
    disp = smooth_disp()
    disp[0, 3, 3, 3] = np.nan
    write_field_mm(tmp_path / "nan.mha", disp, np.eye(4))
    with pytest.raises(InputError, match="finite"):
        read_transform(tmp_path / "nan.mha")


def test_the_same_composite_gives_the_same_bytes_at_another_time(tmp_path: Path) -> None:
    disp = np.random.default_rng(0).normal(size=(3, 5, 6, 7)).astype(np.float32)
    for name in ("a.h5", "b.h5"):
        write_composite(tmp_path / name, disp, np.eye(4), np.eye(4))
        time.sleep(1.05)  # HDF5 counts whole seconds
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize("name", ["x.h5", "x.nii", "x.nii.gz", "x.mha", "x.nrrd"])
def test_a_disk_that_is_full_after_any_byte_leaves_no_half_file_and_no_crash(tmp_path: Path, name: str) -> None:
    disp = np.random.default_rng(0).normal(size=(3, 10, 10, 10)).astype(np.float32)

    def write() -> None:
        if name == "x.h5":
            write_composite(tmp_path / name, disp, np.eye(4), np.eye(4))
        else:
            write_field_mm(tmp_path / name, disp, np.eye(4))

    write()
    whole = (tmp_path / name).stat().st_size
    (tmp_path / name).unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (0, 50, 500, whole // 2, whole - 5000, whole - 100, whole - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(OutputError, match=name):
                write()
            assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_other_names_are_refused_for_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.nii\.gz"):
        write_field_mm(tmp_path / "field.png", smooth_disp(), np.eye(4))
    with pytest.raises(OutputError, match=r"\.h5"):
        write_composite(tmp_path / "t.tfm", smooth_disp(), np.eye(4), np.eye(4))
    assert not list(tmp_path.iterdir())
