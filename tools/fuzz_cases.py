"""What is fuzzed: for every kind of file that users or platforms hand in, a sound example and what reads it.

A reader either refuses (a ``DinoRegError``) or gives a result that is checked here: finite, of the declared shape, and without
zeros where the file holds none. No value of the examples' voxels has a zero byte, so zeros in a result that are not in the file
were made up.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import safetensors.torch
import SimpleITK as sitk
import torch

from dinoreg import weights
from dinoreg.cohort import read_pairs
from dinoreg.commands.info import differences
from dinoreg.config import get_preset, modality
from dinoreg.grandchallenge import parse_sockets
from dinoreg.io import read_volume
from dinoreg.jobs import find_job, load_case
from dinoreg.points import read_points, write_points
from dinoreg.report import environment
from dinoreg.transforms import from_disp, from_matrix, read_transform, write_composite, write_field_mm
from dinoreg.validate import check_volume, raise_errors
from dinoreg.vit import ARCHITECTURES, VitSpec, build_vit
from dinoreg.volume import Volume

SHAPE = (9, 8, 7)
AFFINE = np.array([[-2.0, 0, 0, 10], [0, -2.0, 0, 20], [0, 0, 3.0, -30], [0, 0, 0, 1]])
TINY = "tiny14"  # an architecture of a few kilobytes, which exists here alone


class DefectError(Exception):
    """A reader took a damaged file and gave something that is not in it."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the kind.
        file: the file that is mutated, relative to the case's folder.
        make: writes a sound case into an empty folder.
        read: reads the case's folder as the product does; number of zeros in the result. Raises DefectError.
        text: "json", "lines" or "" (binary).
        header: bytes at the beginning of a binary file that deserve most of the mutations.
        every: one file in so many is tried: for readers that take their time.
        layer: how the voxels are packed: "", "gzip" (the whole file), "mha" or "nrrd" (after the header).
    """

    name: str
    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], int]
    text: str = ""
    header: int = 400
    layer: str = ""
    every: int = 1


def unpack(kind: Kind, content: bytes) -> tuple[bytes, bytes]:
    """Header and voxels of a packed file."""
    if kind.layer == "gzip":
        return b"", gzip.decompress(content)
    end = content.index(b"LOCAL\n") + 6 if kind.layer == "mha" else content.index(b"\n\n") + 2
    return content[:end], (zlib if kind.layer == "mha" else gzip).decompress(content[end:])


def pack(kind: Kind, header: bytes, body: bytes) -> bytes:
    """A file out of both, with checksums that are right."""
    if kind.layer == "mha":
        packed = zlib.compress(body)
        return re.sub(rb"CompressedDataSize = \d+", b"CompressedDataSize = %d" % len(packed), header) + packed
    return header + gzip.compress(body, mtime=0)


def volume(dtype: type = np.int16, shape: tuple[int, int, int] = SHAPE) -> Volume:
    """An image in whose values no byte is zero."""
    parts = np.random.default_rng(0).integers(1, 0x40, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    return Volume(parts.view(dtype)[..., 0], AFFINE)


# --- images -------------------------------------------------------------------------------------------------------------------


def _nifti(name: str, dtype: type = np.int16, scaled: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        source = volume(dtype)
        image = nib.Nifti1Image(source.array, source.affine, dtype=source.array.dtype)
        image.set_qform(source.affine, code=1)
        if scaled:
            image.header.set_slope_inter(0.5, 3.0)
        image.to_filename(folder / name)

    return make


def _itk(name: str, compress: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        image = sitk.GetImageFromArray(np.ascontiguousarray(volume().array.T))
        image.SetSpacing((2.0, 2.0, 3.0))
        sitk.WriteImage(image, str(folder / name), compress)

    return make


def _dicom(folder: Path) -> None:
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for n in range(3):
        image = sitk.GetImageFromArray(np.ascontiguousarray(volume().array[:, :, n].T)[None])
        image.SetSpacing((2.0, 2.0, 3.0))
        for key, value in {"0008|0060": "CT", "0008|0018": f"1.2.3.{n}", "0020|000d": "1.2", "0020|000e": "1.2.3",
                           "0020|0013": str(n), "0020|0032": f"0\\0\\{3 * n}", "0020|0037": "1\\0\\0\\0\\1\\0"}.items():
            image.SetMetaData(key, value)
        image.SetOrigin((0.0, 0.0, 3.0 * n))
        writer.SetFileName(str(folder / f"{n}.dcm"))
        writer.Execute(image)


def _read_image(name: str) -> Callable[[Path], int]:
    def read(folder: Path) -> int:
        found = read_volume(folder / name)
        raise_errors(check_volume(found, name))
        if not np.isfinite(found.affine).all() or min(found.spacing) <= 0 or found.array.dtype.kind not in "biuf":
            raise DefectError(f"accepted with affine {found.affine.tolist()} and values of type {found.array.dtype}")
        return int(np.count_nonzero(found.array == 0))

    return read


# --- jobs ---------------------------------------------------------------------------------------------------------------------


def _dataset(folder: Path) -> None:
    (folder / "imagesTr").mkdir()
    for subject in (1, 2):
        for kind in (0, 1):
            image = nib.Nifti1Image(volume().array, AFFINE, dtype=np.int16)
            image.to_filename(folder / f"imagesTr/Fuzz_{subject:04d}_{kind:04d}.nii.gz")
    pairs = [{"fixed": f"./imagesTr/Fuzz_{n:04d}_0001.nii.gz", "moving": f"./imagesTr/Fuzz_{n:04d}_0000.nii.gz"} for n in (1, 2)]
    (folder / "Fuzz_dataset.json").write_text(json.dumps(
        {"name": "Fuzz", "modality": {"0": "CT", "1": "CBCT"}, "tensorImageShape": {"0": list(SHAPE)}, "numTraining": 2,
         "registration_direction": {"fixed": 1, "moving": 0}, "registration_val": pairs, "registration_test": [pairs[0]],
         "training_paired_images": [{"0": pair["fixed"], "1": pair["moving"]} for pair in pairs]}, indent=1))


def _inputs(folder: Path) -> None:
    entries = []
    for slug in ("fixed", "moving"):
        (folder / "images" / slug).mkdir(parents=True)
        _itk(f"images/{slug}/x.mha", compress=False)(folder)
        entries.append({"file": None, "image": {"name": "x.mha"}, "value": None,
                        "interface": {"slug": slug, "relative_path": f"images/{slug}", "kind": "Image", "super_kind": "Image"}})
    (folder / "inputs.json").write_text(json.dumps(entries, indent=1))


def _read_job(folder: Path) -> int:
    job = find_job(folder, "auto", "auto", parse_sockets(""))
    if not job.cases:
        raise DefectError("accepted a job without pairs")
    for case in job.cases:
        for name in (*case.fields, case.warped, case.picture):
            if name and (".." in Path(name).parts or Path(name).is_absolute()):
                raise DefectError(f"the output {name!r} would leave its folder")
        for text in case.modalities:
            modality(text)
        images = load_case(case)
        for path in (case.fixed, case.moving):
            if not path.resolve().is_relative_to(folder.resolve()):
                raise DefectError(f"{path} lies outside of the input")
        if images.fixed.shape != SHAPE:
            raise DefectError(f"accepted an image of shape {images.fixed.shape}")
    return 0


def _pairs(folder: Path) -> None:
    (folder / "pairs.csv").write_text("fixed,moving,fixed_mask,name\n" + "".join(
        f"a{n}.nii.gz,sub/b{n}.mha,\"m,{n}.nii.gz\",case {n}\n" for n in range(4)))


def _read_pairs(folder: Path) -> int:
    for row in read_pairs(folder / "pairs.csv"):
        target = (folder / "out" / row["name"]).resolve()
        if target.parent != (folder / "out").resolve() or not row["fixed"] or not row["moving"]:
            raise DefectError(f"accepted the row {row}")
    return 0


def _report(folder: Path) -> None:
    content = {"environment": environment(), "config": get_preset("generic").to_dict(), "contract": "single",
               "pairs": [{"name": "a", "info": {"device": "cpu", "threads": 2, "encoder_sha256": "0" * 64}}]}
    (folder / "report.json").write_text(json.dumps(content, indent=1))


def _read_report(folder: Path) -> int:
    for row in differences(folder / "report.json", folder):
        "\t".join(row).encode("utf-8", "backslashreplace")
    return 0


# --- points and transforms ----------------------------------------------------------------------------------------------------


def _points(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        points = np.random.default_rng(1).normal(size=(5, 3)) * 50
        if name.endswith(".json"):
            controls = [{"id": str(n), "label": f"F-{n}", "position": point.tolist()} for n, point in enumerate(points)]
            text = json.dumps({"@schema": "markups-schema-v1.0.3", "markups": [
                {"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": controls}]}, indent=1)
        elif name.endswith(".fcsv"):
            text = "# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n# columns = id,x,y,z,ow,ox,oy,oz,vis\n"
            text += "".join(f"p_{n},{x:.3f},{y:.3f},{z:.3f},0,0,0,1,1\n" for n, (x, y, z) in enumerate(points))
        else:
            text = "x,y,z,label\n" + "".join(f"{x:.3f},{y:.3f},{z:.3f},p{n}\n" for n, (x, y, z) in enumerate(points))
        (folder / name).write_text(text)

    return make


def _read_points(name: str) -> Callable[[Path], int]:
    def read(folder: Path) -> int:
        file = read_points(folder / name, "ras")
        ras = file.ras(None)
        if ras.shape[0] == 0 or ras.shape[1:] != (3,) or not np.isfinite(ras).all():
            raise DefectError(f"accepted the points {ras.tolist()}")
        copy = folder / f"copy-{name}"
        write_points(copy, file.moved(ras, None))
        again = read_points(copy, "ras").ras(None)
        if not np.allclose(again, ras, rtol=1e-9, atol=1e-6):  # six decimals are written
            raise DefectError("other points after writing and reading again")
        return 0

    return read


def _transform(name: str) -> Callable[[Path], None]:
    turn = np.array([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, -3], [0, 0, 1, 2], [0, 0, 0, 1]])
    disp = (np.random.default_rng(2).uniform(0.3, 2.0, (3, *SHAPE))).astype(np.float32)

    def make(folder: Path) -> None:
        if name == "matrix.txt":
            np.savetxt(folder / name, turn, fmt="%.6f")
        elif name == "field.h5":
            write_composite(folder / name, disp, AFFINE, turn)
        elif name.endswith((".nii.gz", ".mha")):
            write_field_mm(folder / name, disp, AFFINE)
        elif name == "field.tfm":
            sitk.WriteTransform(from_disp(disp[:, :3, :3, :3], AFFINE).itk, str(folder / name))
        else:
            sitk.WriteTransform(from_matrix(turn).itk, str(folder / name))

    return make


def _read_transform(name: str) -> Callable[[Path], int]:
    def read(folder: Path) -> int:
        transform = read_transform(folder / name)
        points = np.array([[0.0, 0, 0], [10, -5, 20], [-3, 12, 7]])
        if not np.isfinite(transform.points(points)).all():
            raise DefectError("accepted a transform that gives no finite points")
        if transform.itk.IsLinear():
            transform.matrix()
        transform.field_on(Volume(np.zeros((3, 3, 3), np.uint8), AFFINE))
        return 0

    return read


# --- weights ------------------------------------------------------------------------------------------------------------------


def _weights(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        ARCHITECTURES[TINY] = VitSpec(16, 1, 2, registers=2)
        generator = torch.Generator().manual_seed(0)
        shapes = {key: value.shape for key, value in build_vit(TINY, "meta").state_dict().items()}
        state = {key: torch.rand(shape, generator=generator) + 0.5 for key, shape in shapes.items()}
        if name.endswith(".pth"):
            torch.save(state, folder / name)
        else:
            safetensors.torch.save_file(_hub_names(state), folder / name)

    return make


def _hub_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and layout of the hub for the tensors of the tiny architecture."""
    hub = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                hub[f"encoder.layer.0.attention.attention.{part}.{key.rsplit('.', 1)[1]}"] = piece.contiguous()
            continue
        name = key.replace("blocks.", "encoder.layer.").replace(".attn.proj.", ".attention.output.dense.")
        name = re.sub(r"\.ls([12])\.gamma", r".layer_scale\1.lambda1", name)
        name = re.sub(r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1", name)
        name = name.replace("pos_embed", "embeddings.position_embeddings")
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        hub[re.sub(r"^norm\.", "layernorm.", name)] = value
    return hub


def _read_weights(name: str) -> Callable[[Path], int]:
    def read(folder: Path) -> int:
        ARCHITECTURES[TINY] = VitSpec(16, 1, 2, registers=2)
        content = (folder / name).read_bytes()  # the manifest is made to fit: what lies behind the hash is tried, too
        entry = {"file": "tiny.pth", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
                 "hub": {"name": "tiny", "sha256": None}}
        others = json.loads(weights.MANIFEST.read_text())["models"]
        manifest = folder / "manifest.json"
        manifest.write_text(json.dumps({"models": {**others, TINY: entry}}))
        weights.found_checkpoints(folder, manifest=manifest)
        arch = weights.AUTO if name == weights.HUB_FILE else TINY
        encoder = weights.load_encoder(arch, folder, manifest=manifest)
        values = torch.cat([value.flatten() for value in encoder.model.state_dict().values()])
        if not torch.isfinite(values).all():
            raise DefectError("accepted weights that are not finite")
        return int((values == 0).sum())

    return read


KINDS: tuple[Kind, ...] = (
    *(Kind(name, name, make, _read_image(name), header=header, layer=layer) for name, make, header, layer in (
        ("image.nii", _nifti("image.nii"), 352, ""),
        ("scaled.nii", _nifti("scaled.nii", np.uint8, scaled=True), 352, ""),
        ("float.nii", _nifti("float.nii", np.float32), 352, ""),
        ("image.nii.gz", _nifti("image.nii.gz"), 352, "gzip"),
        ("image.mha", _itk("image.mha", False), 260, ""),
        ("packed.mha", _itk("packed.mha", True), 260, "mha"),
        ("image.nrrd", _itk("image.nrrd", False), 260, ""),
        ("packed.nrrd", _itk("packed.nrrd", True), 260, "nrrd"))),
    Kind("image.mhd", "image.mhd", _itk("image.mhd", False), _read_image("image.mhd"), text="lines"),
    Kind("image.mhd's voxels", "image.raw", _itk("image.mhd", False), _read_image("image.mhd"), header=0),
    Kind("DICOM slice", "1.dcm", _dicom, _read_image("."), header=600),
    Kind("dataset.json", "Fuzz_dataset.json", _dataset, _read_job, text="json"),
    Kind("inputs.json", "inputs.json", _inputs, _read_job, text="json"),
    Kind("report.json", "report.json", _report, _read_report, text="json"),
    Kind("pairs.csv", "pairs.csv", _pairs, _read_pairs, text="lines"),
    Kind("points.csv", "p.csv", _points("p.csv"), _read_points("p.csv"), text="lines"),
    Kind("points.fcsv", "p.fcsv", _points("p.fcsv"), _read_points("p.fcsv"), text="lines"),
    Kind("points.mrk.json", "p.mrk.json", _points("p.mrk.json"), _read_points("p.mrk.json"), text="json"),
    *(Kind(name, name, _transform(name), _read_transform(name), text="lines") for name in
      ("matrix.txt", "affine.txt", "affine.tfm", "field.tfm")),
    *(Kind(name, name, _transform(name), _read_transform(name), header=header, layer=layer) for name, header, layer in
      (("affine.mat", 60, ""), ("field.nii.gz", 400, "gzip"), ("field.mha", 300, ""))),
    Kind("field.h5", "field.h5", _transform("field.h5"), _read_transform("field.h5"), header=3000, every=8),
    Kind("weights.pth", "tiny.pth", _weights("tiny.pth"), _read_weights("tiny.pth"), header=2000),
    Kind("weights.safetensors", "tiny.safetensors", _weights("tiny.safetensors"), _read_weights("tiny.safetensors"), header=3000),
    Kind("model.safetensors", "model.safetensors", _weights("model.safetensors"), _read_weights("model.safetensors"),
         header=3000),
)


def files_of(kind: Kind) -> dict[str, bytes]:
    """Every file of a kind's sound case, by its path."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kind.make(root)
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
