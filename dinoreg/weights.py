"""Checkpoints of the encoder: where they are looked for, how they are verified, how they become a model.

An official ``.pth`` is a pickle: it is opened (``weights_only=True``) only after its sha256 was found to be that of
``weights/manifest.json``. The Hugging Face files of the same models are safetensors, which hold no code; their publisher gives
no list of hashes, so the sha256 is checked where the manifest has one and recorded in any case.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from dinoreg.errors import WeightsError
from dinoreg.vit import ARCHITECTURES, VisionTransformer, build_vit, get_spec

HOME = Path(__file__).resolve().parents[1] / "weights"
MANIFEST = HOME / "manifest.json"
PLACES = (Path("/opt/ml/model"), Path("/oncoreg/model"), HOME)  # where platforms put a model, then our own folder
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
HUB_FILE = "model.safetensors"  # the name of every checkpoint on the Hugging Face hub
AUTO = "auto"
RECOMMENDED, QUICK = "vitl14_reg4", "vits14_reg4"  # what to fetch: for results, and for a first try

log = logging.getLogger(__name__)


class PatchModel(Protocol):
    """A transformer of 2D images: :class:`dinoreg.vit.VisionTransformer`, or another."""

    patch: int
    cls_token: Parameter

    def patch_tokens(self, images: Tensor, last_layers: int) -> Tensor:
        """See :class:`dinoreg.slices.PatchEncoder`."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen transformer with its provenance; a ``PatchEncoder`` of ``dinoreg.slices``.

    Attributes:
        model: the transformer, float32, in evaluation mode.
        arch: its name, for DINOv2 in ``dinoreg.vit.ARCHITECTURES``.
        sha256: of the checkpoint file; None for random weights.
        source: where the weights come from and how far that was verified, in words, for reports.
    """

    model: PatchModel
    arch: str
    sha256: str | None
    source: str

    @property
    def patch(self) -> int:
        """Side in px of the square that becomes one token."""
        return self.model.patch

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and the images have to be."""
        return self.model.cls_token.device

    def patch_tokens(self, images: Tensor, last_layers: int) -> Tensor:
        """Images (b, 3, patch * h, patch * w) float32 -> patch tokens (b, h, w, last_layers * dim).

        On a GPU matrix products run in float16 under autocast, residual stream and LayerNorms in float32: DINOv2 was trained
        that way, a T4 has no bfloat16, and tokens differ by 0.07 % of their spread from float32 ones (ViT-S; bfloat16 0.6 %).
        On a CPU everything is float32 (half types are several times slower there).

        Raises:
            RegistrationError: when a token is not finite.
        """
        half = torch.autocast(images.device.type, dtype=torch.float16, enabled=images.is_cuda)
        with torch.inference_mode(), half:
            return self.model.patch_tokens(images, last_layers)


def load_encoder(arch: str, folder: Path | None = None, *, device: torch.device | str = "cpu",
                 manifest: Path = MANIFEST) -> Encoder:
    """Find, verify and load the checkpoint of an architecture.

    Args:
        arch: a key of ``dinoreg.vit.ARCHITECTURES``, or "auto": the largest of which a checkpoint is there, at equal size the one
            with registers.
        folder: the only folder to look in. Without it that is ``$DINOREG_WEIGHTS``, and if that is unset, /opt/ml/model,
            /oncoreg/model and the ``weights`` folder beside the package, in this order.
        device: where the parameters go.
        manifest: file names, sizes and hashes.

    Raises:
        ConfigError: unknown architecture.
        WeightsError: no file, or one that is cut short, altered, of another architecture or not finite.
    """
    if arch != AUTO:
        get_spec(arch)
    models = _read_manifest(manifest)
    explicit = folder or (Path(os.environ["DINOREG_WEIGHTS"]) if os.environ.get("DINOREG_WEIGHTS") else None)
    folders = (explicit,) if explicit else PLACES
    if arch == AUTO:
        arch, path = _largest(folders, models, explicit)
    else:
        path = _named(arch, folders, models, explicit)
    entry = models[arch]
    hub_id = entry["hub"]["name"]
    command = _command(arch, path.parent)
    try:
        with path.open("rb") as stream:
            if path.suffix == ".pth":
                state, sha256 = _read_pth(stream, path, entry, command)
                source = f"{path.name}, sha256 as in the manifest"
            else:
                state, sha256, known = _read_safetensors(stream, path, entry, command)
                source = f"{path.name} of facebook/{hub_id}, sha256 " + (
                    "as in the manifest" if known else "recorded, none is published to compare with")
    except OSError as error:
        raise _wrong(path, "a readable file", str(error.strerror or error), command) from error
    return Encoder(_fill(arch, state, path, command).to(device), arch, sha256, source)


def found_checkpoints(folder: Path | None = None, *, manifest: Path = MANIFEST) -> list[tuple[Path, str | None, str, str]]:
    """Every checkpoint in the folders in which :func:`load_encoder` looks.

    Args:
        folder, manifest: as there.

    Returns:
        (path, architecture if it is known, sha256, what the manifest says of it) of each file.

    Raises:
        WeightsError: if a file or the manifest cannot be read.
    """
    models = _read_manifest(manifest)
    explicit = folder or (Path(os.environ["DINOREG_WEIGHTS"]) if os.environ.get("DINOREG_WEIGHTS") else None)
    arch_of = {name: arch for arch, entry in models.items() for name in _own_names(entry)}
    found = []
    for place in (explicit,) if explicit else PLACES:
        for path in sorted(path for name in (*arch_of, HUB_FILE) if (path := place / name).is_file()):
            arch = arch_of.get(path.name) or _arch_of(path)
            try:
                with path.open("rb") as stream:
                    sha256 = _sha256(stream)
            except OSError as error:
                raise WeightsError(f"{path}: expected a readable file; got: {error.strerror or error}; let the user that runs "
                                   "this read it (chmod a+r)") from error
            entry = models.get(arch or "")
            expected = entry and (entry["sha256"] if path.suffix == ".pth" else entry["hub"]["sha256"])
            state = "sha256 is not in the manifest" if not expected else \
                "sha256 as in the manifest" if sha256 == expected else "sha256 is NOT that of the manifest"
            found.append((path, arch, sha256, state))
    return found


def random_encoder(arch: str, seed: int, *, device: torch.device | str = "cpu") -> Encoder:
    """The exact architecture with seeded random weights, for tests, timings and ablations; never to be called DINOv2.

    The same seed gives the same weights whatever the number of threads. See ``random_state`` for the distribution.

    Raises:
        ConfigError: unknown architecture.
    """
    model = build_vit(arch, "meta")
    model.load_state_dict(random_state(model, seed), strict=True, assign=True)
    model.requires_grad_(False)
    return Encoder(model.to(device), arch, None, f"random weights, seed {seed}")


def random_state(model: Module, seed: int) -> dict[str, Tensor]:
    """Weights that make a random transformer a usable random projection of patches and their surroundings.

    All matrices and tokens are normal with deviation 0.02, biases 0, LayerScale and LayerNorms 1: what a patch holds outweighs
    where it lies, and each block mixes in some of the slice.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name.endswith((".gamma", "norm.weight", "norm1.weight", "norm2.weight")):
            state[name] = torch.ones(parameter.shape)
        elif name.endswith(".bias"):
            state[name] = torch.zeros(parameter.shape)
        else:
            state[name] = 0.02 * torch.randn(parameter.shape, generator=generator)
    return state


# patterns of names on the hub and what they are called in the official checkpoints
_HUB_NAMES = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)


def from_hub_names(hub: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """State dict of ``transformers``' Dinov2Model or Dinov2WithRegistersModel -> names and layout of the official checkpoints.

    Queries, keys and values, apart there, are stacked. Keys that belong to neither layout stay as they are, for the strict
    check that follows to name them.
    """
    state: dict[str, Tensor] = {}
    rest = dict(hub)
    for n in range(depth):
        for kind in ("weight", "bias"):
            parts = [f"encoder.layer.{n}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
            found = [rest[part] for part in parts if part in rest and rest[part].ndim]
            if len(found) == 3 and len({(value.shape, value.dtype) for value in found}) == 1:
                state[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat([rest.pop(part) for part in parts])
    for name, value in rest.items():
        for pattern, ours in _HUB_NAMES:
            name = re.sub(pattern, ours, name)
        state[name] = value
    return state


def _read_manifest(manifest: Path) -> dict[str, dict[str, Any]]:
    """Architecture -> file, size and hashes; the largest first, at equal size the one with registers."""
    try:
        models = json.loads(manifest.read_text(encoding="utf-8"))["models"]
        for entry in models.values():
            _ = entry["file"], entry["bytes"], entry["sha256"], entry["hub"]["name"], entry["hub"]["sha256"]
        sizes = {arch: (ARCHITECTURES[arch].dim, ARCHITECTURES[arch].depth, ARCHITECTURES[arch].registers) for arch in models}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{manifest}: expected the list of checkpoints; got something else ({type(error).__name__}: "
                           f"{error}); restore the file from the repository") from error
    return {arch: models[arch] for arch in sorted(sizes, key=lambda arch: sizes[arch], reverse=True)}


def _named(arch: str, folders: Sequence[Path], models: Mapping[str, Any], explicit: Path | None) -> Path:
    """The checkpoint of an architecture in the first folder that has one."""
    if arch not in models:
        raise WeightsError(f"the manifest of weights lists no encoder {arch}; restore it from the repository")
    names = _own_names(models[arch])
    path = next((place / name for place in folders for name in (*names, HUB_FILE) if (place / name).is_file()), None)
    if path is None:
        raise WeightsError(f"no weights for encoder {arch}: expected {names[0]} (or {names[1]}, or {HUB_FILE} of "
                           f"facebook/{models[arch]['hub']['name']}), found none in {_looked(folders)}; fetch them with: "
                           f"{_command(arch, explicit)}")
    return path


def _largest(folders: Sequence[Path], models: Mapping[str, Any], explicit: Path | None) -> tuple[str, Path]:
    """The largest architecture of which a checkpoint lies in any of the folders, and that file."""
    hub_files = {path: _arch_of(path) for place in folders if (path := place / HUB_FILE).is_file()}
    for arch, entry in models.items():
        for path in (place / name for place in folders for name in (*_own_names(entry), HUB_FILE)):
            if path.is_file() and hub_files.get(path, arch) == arch:
                log.info("encoder %s: the largest of which weights were found (%s)", arch, path)
                return arch, path
    names = _own_names(models[RECOMMENDED])
    unknown = "".join(f" ({path} is damaged, or no DINOv2 of a known architecture)" for path in hub_files)
    raise WeightsError(f"no weights for the encoder: expected {names[0]} (or {names[1]}, or {HUB_FILE}, or another file of "
                       f"weights/manifest.json), found none in {_looked(folders)}{unknown}; fetch them with: "
                       f"{_command(RECOMMENDED, explicit)} ({QUICK} for a quick try), or take the features mind, which need none")


def _own_names(entry: Mapping[str, Any]) -> tuple[str, str]:
    """File names that tell the architecture: the official one, and that of the Hugging Face model."""
    return entry["file"], f"{entry['hub']['name']}.safetensors"


def _looked(folders: Sequence[Path]) -> str:
    return ", ".join(f"{place}" if place.is_dir() else f"{place} (no such folder)" for place in folders)


def _arch_of(path: Path) -> str | None:
    """The architecture of a safetensors file by the shapes in its header; None if it is none of ours, or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {name.removeprefix("embeddings."): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError:
        return None
    except OSError as error:
        raise WeightsError(f"{path}: expected a readable file; got: {error.strerror or error}; "
                           "let the user that runs this read it (chmod a+r)") from error
    registers, dims = shapes.get("register_tokens", (1, 0, 0)), shapes.get("cls_token", ())
    if len(registers) != 3 or not dims:
        return None
    size = (dims[-1], _depth(shapes), registers[1])
    return next((arch for arch, spec in ARCHITECTURES.items() if (spec.dim, spec.depth, spec.registers) == size), None)


def _depth(names: Iterable[str]) -> int:
    """Number of blocks of a state dict by the names of its tensors on the hub."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(r"encoder\.layer\.(\d{1,3})\.", name))), default=-1)


def _command(arch: str, folder: Path | None) -> str:
    to = "" if folder is None or folder.resolve() == HOME else f" --to {folder}"
    return f"python3 weights/fetch.py {arch}{to}"


def _wrong(path: Path, expected: str, found: str, command: str) -> WeightsError:
    return WeightsError(f"{path}: expected {expected}, found {found}; fetch the official file with: {command}")


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 22):
        digest.update(block)
    stream.seek(0)
    return digest.hexdigest()


def _read_pth(stream: BinaryIO, path: Path, entry: Mapping[str, Any], command: str) -> tuple[dict[str, Any], str]:
    """Contents and hash of an official checkpoint; one open file for both, so that nothing can come between them."""
    size = os.fstat(stream.fileno()).st_size
    if size != entry["bytes"]:
        raise _wrong(path, f"{entry['bytes']} bytes", f"{size}, so it was not opened", command)
    sha256 = _sha256(stream)
    if sha256 != entry["sha256"]:
        raise _wrong(path, f"sha256 {entry['sha256']}", f"{sha256}, so it was not opened", command)
    try:
        state = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch.load makes of a file that is no plain checkpoint
        raise _wrong(path, "a checkpoint of plain tensors", type(error).__name__, command) from error
    if not isinstance(state, dict):
        raise _wrong(path, "a dictionary of tensors", type(state).__name__, command)
    return state, sha256


def _read_safetensors(stream: BinaryIO, path: Path, entry: Mapping[str, Any], command: str) -> tuple[dict[str, Any], str, bool]:
    """Contents in the official names, hash, and whether the manifest knows that hash."""
    sha256, expected = _sha256(stream), entry["hub"]["sha256"]
    if expected is not None and sha256 != expected:
        raise _wrong(path, f"sha256 {expected} (facebook/{entry['hub']['name']})", sha256, command)
    try:
        state = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise _wrong(path, "a complete safetensors file", f"another thing ({error})", command) from error
    return from_hub_names(state, _depth(state)), sha256, expected is not None


def mismatches(model: Module, arch: str, state: Mapping[str, Any]) -> str:
    """What keeps a state dict from being exactly that of a model (names, types, shapes, finite values): words, or ""."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown to {arch}" for name in state if name not in expected]
    for name in expected.keys() & state.keys():
        value, shape = state[name], tuple(expected[name].shape)
        if not isinstance(value, Tensor) or value.dtype not in FLOAT_TYPES:
            problems.append(f"{name} is {getattr(value, 'dtype', type(value).__name__)} instead of floating point")
        elif tuple(value.shape) != shape:
            problems.append(f"{name} has shape {tuple(value.shape)} instead of {shape}")
        elif not bool(torch.isfinite(value).all()):
            problems.append(f"{name} has NaN or infinity in it")
    return "; ".join(sorted(problems)[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")


def _fill(arch: str, state: dict[str, Any], path: Path, command: str) -> VisionTransformer:
    """The model with these weights, after a check of names, types, shapes and values."""
    model = build_vit(arch, "meta")
    if wrong := mismatches(model, arch, state):
        raise _wrong(path, f"the {len(model.state_dict())} tensors of encoder {arch}", f"a file that does not match ({wrong})",
                     command)
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=True, assign=True)
    return model.requires_grad_(False)
