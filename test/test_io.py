"""Files in and out: the convention on every orientation, the formats byte for byte, refusals, atomicity."""

from __future__ import annotations

import gzip
import hashlib
import resource
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from dinoreg import io
from dinoreg.errors import InputError, OutputError, RegistrationError
from dinoreg.volume import Volume

SHAPE = (9, 11, 13)
SHIFT = (1.0, -2.0, 3.0)  # voxels along the array axes: different on each, so that no swap or flip goes unnoticed


def _rotation(degrees: float, axis: int) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    a, b = (n for n in range(3) if n != axis)
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def _affine(directions: np.ndarray, spacing: tuple[float, float, float] = (1.5, 2.0, 2.5)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing)
    affine[:3, 3] = (-31.0, 17.0, 5.5)
    return affine


AFFINES = {
    "RAS": _affine(np.eye(3)),
    "LAS": _affine(np.diag([-1.0, 1.0, 1.0])),
    "LPS": _affine(np.diag([-1.0, -1.0, 1.0])),
    "LIA": _affine(np.array([[-1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])),
    "oblique": _affine(_rotation(25, 2) @ _rotation(-15, 0) @ _rotation(8, 1)),
}


@pytest.fixture(params=AFFINES, name="affine")
def _affine_fixture(request: pytest.FixtureRequest) -> np.ndarray:
    return AFFINES[request.param]


def _shift_field(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.broadcast_to(np.array(SHIFT, dtype=np.float32)[:, None, None, None], (3, *shape)).copy()


def _image(seed: int = 0) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1.0).astype(np.float32)


# --- the convention of the displacement field ---------------------------------------------------------------------------------


def test_written_field_warps_as_map_coordinates_says(tmp_path: Path, affine: np.ndarray) -> None:
    moving = _image()
    io.write_disp_nifti(tmp_path / "disp.nii.gz", _shift_field(), affine)
    disp = np.asarray(nib.load(tmp_path / "disp.nii.gz").dataobj)
    assert disp.shape == (*SHAPE, 3) and disp.dtype == np.float32
    identity = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    warped = ndimage.map_coordinates(moving, identity + disp.transpose(3, 0, 1, 2), order=1)
    # whole-voxel shifts: the values are copied, not interpolated, so they agree to rounding
    np.testing.assert_allclose(warped[0:8, 2:11, 0:10], moving[1:9, 0:9, 3:13], atol=1e-6)


@pytest.mark.parametrize("kind", ["nifti", "scalar mha", "vector mha"])
def test_written_field_agrees_with_itk_resampling_in_mm(tmp_path: Path, affine: np.ndarray, kind: str) -> None:
    moving = Volume(_image(), affine)
    io.write_volume(tmp_path / "moving.mha", moving)
    itk_moving = sitk.ReadImage(str(tmp_path / "moving.mha"))
    if kind == "nifti":
        io.write_disp_nifti(tmp_path / "disp.nii.gz", _shift_field(), affine)
        disp_vox = np.asarray(nib.load(tmp_path / "disp.nii.gz").dataobj)  # (i, j, k, 3)
    else:
        io.write_disp_mha(tmp_path / "disp.mha", _shift_field(), affine, vector=kind == "vector mha")
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "disp.mha")))
        disp_vox = array.transpose(2, 1, 0, 3) if kind == "vector mha" else array.transpose(3, 2, 1, 0)
    # ITK's millimetres from voxels: Direction @ diag(spacing) @ d
    to_mm = np.array(itk_moving.GetDirection()).reshape(3, 3) * np.array(itk_moving.GetSpacing())
    disp_mm = (disp_vox.astype(np.float64) @ to_mm.T).transpose(2, 1, 0, 3)
    vectors = sitk.GetImageFromArray(np.ascontiguousarray(disp_mm), isVector=True)
    vectors.CopyInformation(itk_moving)
    transform = sitk.DisplacementFieldTransform(vectors)
    warped = sitk.GetArrayFromImage(sitk.Resample(itk_moving, itk_moving, transform, sitk.sitkLinear)).transpose(2, 1, 0)
    expected = moving.array[1:9, 0:9, 3:13]
    # values are of order 0.1; the coordinates go through float64 matrices: 1e-5 leaves room for float32 interpolation only
    np.testing.assert_allclose(warped[0:8, 2:11, 0:10], expected, atol=1e-5)


def test_fields_physical_grid_is_the_fixed_images_in_itk(tmp_path: Path, affine: np.ndarray) -> None:
    io.write_volume(tmp_path / "image.nii.gz", Volume(_image(), affine))
    io.write_disp_mha(tmp_path / "vector.mha", _shift_field(), affine, vector=True)
    io.write_disp_mha(tmp_path / "scalar.mha", _shift_field(), affine, vector=False)
    image, vector, scalar = (sitk.ReadImage(str(tmp_path / name)) for name in ("image.nii.gz", "vector.mha", "scalar.mha"))
    assert vector.GetSize() == SHAPE and vector.GetNumberOfComponentsPerPixel() == 3
    assert scalar.GetSize() == (*SHAPE, 3) and scalar.GetNumberOfComponentsPerPixel() == 1
    assert scalar.GetPixelID() == sitk.sitkFloat32
    for index in ((0, 0, 0), (8, 10, 12)):  # NIfTI headers are float32: 1e-4 mm
        point = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(vector.TransformIndexToPhysicalPoint(index), point, atol=1e-4)
        np.testing.assert_allclose(scalar.TransformIndexToPhysicalPoint((*index, 0))[:3], point, atol=1e-4)


def test_field_on_disk_is_plain_4d_without_intent(tmp_path: Path) -> None:
    io.write_disp_nifti(tmp_path / "disp.nii.gz", _shift_field(), AFFINES["oblique"])
    header = nib.load(tmp_path / "disp.nii.gz").header
    assert list(header["dim"][:5]) == [4, *SHAPE, 3]
    assert int(header["intent_code"]) == 0 and header.get_data_dtype() == np.float32
    assert int(header["sform_code"]) == 1 and int(header["qform_code"]) == 1
    np.testing.assert_allclose(header.get_best_affine(), AFFINES["oblique"], atol=1e-5)  # float32 header


def test_field_with_a_value_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    disp = _shift_field()
    disp[1, 2, 3, 4] = np.nan
    for write in (lambda p: io.write_disp_nifti(p.with_suffix(".nii.gz"), disp, np.eye(4)),
                  lambda p: io.write_disp_mha(p.with_suffix(".mha"), disp, np.eye(4), vector=False)):
        with pytest.raises(RegistrationError, match="finite"):
            write(tmp_path / "disp")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("disp", [np.zeros((*SHAPE, 3), np.float32), np.zeros((3, *SHAPE), np.float64)],
                         ids=["channel last", "float64"])
def test_field_of_another_layout_or_type_is_refused(tmp_path: Path, disp: np.ndarray) -> None:
    with pytest.raises(ValueError, match="float32 of shape"):
        io.write_disp_nifti(tmp_path / "disp.nii.gz", disp, np.eye(4))


# --- volumes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_volume_comes_back_with_type_values_and_grid(tmp_path: Path, affine: np.ndarray, suffix: str, dtype: str) -> None:
    array = (np.random.default_rng(1).random(SHAPE) * 100).astype(dtype)
    io.write_volume(tmp_path / f"x{suffix}", Volume(array, affine))
    back = io.read_volume(tmp_path / f"x{suffix}")
    assert back.array.dtype == array.dtype and back.array.flags.c_contiguous
    np.testing.assert_array_equal(back.array, array)
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)  # NIfTI headers are float32, MetaImage's have 6 to 17 digits


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nii", ".nii.gz"])
def test_file_written_by_itk_is_read_on_the_same_physical_grid(tmp_path: Path, suffix: str) -> None:
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing((1.5, 2.0, 2.5))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection((_rotation(30, 1) @ _rotation(10, 0)).ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / f"x{suffix}"))
    volume = io.read_volume(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(volume.array, array)
    for index in ((0, 0, 0), (8, 10, 12)):
        x, y, z = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(volume.affine @ (*index, 1.0), (-x, -y, z, 1.0), atol=1e-4)  # LPS to RAS; float32 headers


def test_scaled_nifti_is_read_as_float32(tmp_path: Path) -> None:
    codes = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nib.Nifti1Image(codes, np.eye(4))
    image.header.set_slope_inter(0.5, -1024.0)
    image.to_filename(tmp_path / "x.nii.gz")
    scaled = io.read_volume(tmp_path / "x.nii.gz").array
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, codes * 0.5 - 1024.0)  # exact in float32


def test_big_endian_nifti_is_read_in_native_order(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1]), header).to_filename(tmp_path / "x.nii.gz")
    volume = io.read_volume(tmp_path / "x.nii.gz")
    assert volume.array.dtype.isnative and volume.spacing == (2.0, 2.0, 2.0)
    np.testing.assert_array_equal(volume.array, array)


def test_nifti2_is_read(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nib.Nifti2Image(array, np.diag([2.0, 2, 3, 1])).to_filename(tmp_path / "x.nii.gz")
    volume = io.read_volume(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(volume.array, array)
    assert volume.spacing == (2.0, 2.0, 3.0)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_trailing_dimensions_of_one_are_dropped(tmp_path: Path, suffix: str) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    if suffix == ".mha":
        sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(array.T[None]), isVector=False), str(tmp_path / "x.mha"))
    else:
        nib.Nifti1Image(array[..., None, None], np.eye(4)).to_filename(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(io.read_volume(tmp_path / f"x{suffix}").array, array)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha"])
def test_same_content_gives_same_bytes_under_any_name(tmp_path: Path, name: str) -> None:
    volume = Volume(_image(), AFFINES["oblique"])
    paths = [tmp_path / name, tmp_path / f"other_{name}"]
    for path in paths:
        io.write_volume(path, volume)
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}) == 1
    if name.endswith(".gz"):
        assert paths[0].read_bytes()[3:8] == b"\0" * 5  # no flags (hence no name), time 0


def test_sheared_affine_is_kept_and_not_replaced_by_a_quaternion(tmp_path: Path) -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[0, 1] = 0.7
    io.write_volume(tmp_path / "x.nii.gz", Volume(_image(), affine))
    header = nib.load(tmp_path / "x.nii.gz").header
    assert int(header["qform_code"]) == 0
    np.testing.assert_allclose(io.read_volume(tmp_path / "x.nii.gz").affine, affine, atol=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------------------------


def _write(path: Path, array: np.ndarray | None = None) -> Path:
    io.write_volume(path, Volume(_image() if array is None else array, AFFINES["oblique"]))
    return path


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.mha"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    path = _write(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=rf"{name}: .*(truncated|damaged|3D|no such)"):
        io.read_volume(path)


def test_changed_byte_in_a_gzip_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.nii.gz")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the checksum: the deflated data itself is intact, and nibabel alone would not look
    path.write_bytes(content)
    with pytest.raises(InputError, match="CRC"):
        io.read_volume(path)


@pytest.mark.parametrize("array", [np.zeros((5, 6), np.int16), np.zeros((5, 6, 7, 2), np.int16)], ids=["2D", "4D"])
def test_2d_and_4d_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    nib.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "x.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(tmp_path / "x.mha"))
    for name in ("x.nii.gz", "x.mha"):
        with pytest.raises(InputError, match="expected a 3D image"):
            io.read_volume(tmp_path / name)


def test_colour_and_vector_images_are_refused(tmp_path: Path) -> None:
    rgb = np.zeros((5, 6, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.Nifti1Image(rgb, np.eye(4)).to_filename(tmp_path / "x.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6, 7, 3), np.float32), isVector=True), str(tmp_path / "x.mha"))
    for name in ("x.nii.gz", "x.mha"):
        with pytest.raises(InputError, match="one value a voxel"):
            io.read_volume(tmp_path / name)


def test_zero_spacing_is_refused(tmp_path: Path) -> None:
    raw = bytearray(_write(tmp_path / "x.nii").read_bytes())
    raw[80:84] = struct.pack("<f", 0.0)  # pixdim[1], while the sform still holds a spacing
    (tmp_path / "x.nii").write_bytes(raw)
    text = _write(tmp_path / "x.mha").read_bytes()
    start = text.index(b"ElementSpacing")
    end = text.index(b"\n", start)
    (tmp_path / "x.mha").write_bytes(text[:start] + b"ElementSpacing = 0 2 2.5" + text[end:])
    for name in ("x.nii", "x.mha"):
        with pytest.raises(InputError, match=f"{name}: .*(?i:spacing)"):
            io.read_volume(tmp_path / name)


def test_a_scale_that_would_round_the_values_to_zero_is_refused(tmp_path: Path) -> None:
    raw = bytearray(_write(tmp_path / "x.nii").read_bytes())
    raw[112:116] = struct.pack("<f", 1e-43)  # scl_slope
    (tmp_path / "x.nii").write_bytes(raw)
    with pytest.raises(InputError, match="scl_slope"):
        io.read_volume(tmp_path / "x.nii")


def test_singular_affine_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(_image(), np.eye(4))
    raw = np.eye(4)
    raw[:3, 1] = raw[:3, 0]
    image.header.set_sform(raw, code=1)
    data = bytearray(image.header.binaryblock + b"\0" * 4 + _image().tobytes(order="F"))
    data[108:112], data[344:348] = struct.pack("<f", 352.0), b"n+1\0"
    (tmp_path / "x.nii").write_bytes(data)
    with pytest.raises(InputError, match="independent directions"):
        io.read_volume(tmp_path / "x.nii")


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_declared_size_is_checked_before_reading(tmp_path: Path, suffix: str) -> None:
    """A megabyte of gzip that unpacks to 256 MiB of zeros: refused without unpacking it. In single precision, in which images
    are registered, it is twice as much."""
    path = tmp_path / f"bomb{suffix}"
    if suffix == ".mha":
        path.write_bytes(b"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nCompressedDataSize = 9\n"
                         b"DimSize = 512 512 512\n"
                         b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n")
    else:
        header = nib.Nifti1Header()
        header.set_data_shape((512, 512, 512))
        header.set_data_dtype(np.int16)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        with gzip.open(path, "wb", compresslevel=1) as stream:
            stream.write(header.binaryblock + b"\0" * 4)
            for _ in range(256):
                stream.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="declares 512 MiB; expected at most 128 MiB"):
        io.read_volume(path, max_bytes=2**27)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB: far less than what it declares


def test_declared_size_of_a_header_extension_is_not_believed(tmp_path: Path) -> None:
    """256 MiB of extension before the voxels count as declared size, and are skipped without being kept."""
    raw = bytearray(_write(tmp_path / "x.nii").read_bytes())
    raw[108:112] = struct.pack("<f", 2.0**28)  # vox_offset
    (tmp_path / "x.nii").write_bytes(raw)
    with pytest.raises(InputError, match="declares 256 MiB"):
        io.read_volume(tmp_path / "x.nii", max_bytes=2**27)


@pytest.mark.parametrize("name", ["missing.nii.gz", "folder.nii.gz", "image.png", "text.nii.gz", "text.nii", "text.mha",
                                  "text.nrrd"])
def test_what_is_not_an_image_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.nii.gz").mkdir()
    if name.startswith(("text", "image")):
        (tmp_path / name).write_text("not an image" * 100)
    with pytest.raises(InputError, match=name) as raised:
        io.read_volume(tmp_path / name)
    assert "\n" not in str(raised.value) and "0x" not in str(raised.value)


# --- paths --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "out/x", "file_out", "nul\0"])
def test_path_that_leaves_the_input_is_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "input"
    (root / "a").mkdir(parents=True)
    (tmp_path / "x").write_text("secret")
    (root / "out").symlink_to(tmp_path)
    (root / "file_out").symlink_to(tmp_path / "x")
    with pytest.raises(InputError):
        io.path_inside(root, path)


def test_input_folder_may_itself_be_a_symbolic_link_and_hold_inner_ones(tmp_path: Path) -> None:
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "real" / "a" / "x").write_text("here")
    (tmp_path / "real" / "link").symlink_to("a/x")
    (tmp_path / "input").symlink_to(tmp_path / "real")
    assert io.path_inside(tmp_path / "input", "./link").read_text() == "here"


def test_loop_of_symbolic_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError):
        assert io.path_inside(tmp_path, "a").is_file()


@pytest.mark.parametrize("target", ["{outside}", "../voxels.raw", "link.raw", "LIST", "slice%d.raw 1 9 1"])
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr.nrrd"])
def test_header_that_takes_its_voxels_from_elsewhere_is_refused(tmp_path: Path, suffix: str, target: str) -> None:
    (tmp_path / "voxels.raw").write_bytes(bytes(8 * 2))
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "link.raw").symlink_to(tmp_path / "voxels.raw")
    target = target.format(outside=tmp_path / "voxels.raw")
    (folder / f"x{suffix}").write_text(
        f"NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\nendian: little\ndata file: {target}\n"
        if suffix.endswith("nrrd") else
        f"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = {target}\n")
    with pytest.raises(InputError, match=r"relative and without|symbolic link|one file beside it"):
        io.read_volume(folder / f"x{suffix}")


# --- whole or not at all ------------------------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), io.atomic_write(target) as temporary:
        temporary.write_text("half")
        assert target.read_text() == "old"
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"] and target.read_text() == "old"


def test_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of a file stands in for a full disk: the operating system refuses the bytes beyond it."""
    script = f"""
import resource
import numpy as np
from pathlib import Path
from dinoreg import io
from dinoreg.errors import OutputError
from dinoreg.volume import Volume
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
folder = Path({str(tmp_path)!r})
noise = np.random.default_rng(0).random((3, 40, 40, 40)).astype(np.float32)
for write in (lambda: io.write_disp_nifti(folder / "a.nii.gz", noise, np.eye(4)),
              lambda: io.write_disp_mha(folder / "a.mha", noise, np.eye(4), vector=False),
              lambda: io.write_volume(folder / "b.mha", Volume(noise[0], np.eye(4))),
              lambda: io.write_text(folder / "a.txt", "x" * 30000)):
    try:
        write()
    except OutputError as error:
        assert "cannot be written" in str(error), error
    else:
        raise SystemExit("not refused")
assert list(folder.iterdir()) == [], list(folder.iterdir())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        io.write_text(tmp_path / "file" / "x.txt", "")
    with pytest.raises(OutputError, match="file"):
        io.check_writable(tmp_path / "file")
    io.check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_json_is_standard_and_atomic(tmp_path: Path) -> None:
    io.write_json(tmp_path / "a.json", {"é": [1, None]})
    assert io.read_json(tmp_path / "a.json") == {"é": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        io.write_json(tmp_path / "b.json", {"x": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[" * 100_000], ids=["cut", "not UTF-8", "nested"])
def test_broken_json_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json"):
        io.read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"y\.json"):
        io.read_json(tmp_path / "y.json")


def test_image_of_a_type_or_name_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="NIfTI cannot hold"):
        io.write_volume(tmp_path / "x.nii.gz", Volume(_image().astype(np.float16), np.eye(4)))
    with pytest.raises(OutputError, match=r"\.nii\.gz, \.nii or \.mha"):
        io.write_volume(tmp_path / "x.png", Volume(_image(), np.eye(4)))
    assert list(tmp_path.iterdir()) == []


def test_copied_file_has_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    io.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"abc"
