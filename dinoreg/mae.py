"""One more frozen encoder, to show what it takes: the vision transformer of a masked auto-encoder.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377). Only the encoder, which sees the whole image:
nothing is masked. The names of its parameters are those of the official checkpoints (``mae_pretrain_vit_*.pth``), trained on
224 px images with ImageNet normalisation (``encoder.imagenet_norm``), a grid of 14 x 14 or 16 x 16 tokens.

    registrar = Registrar(config, encoder=load_mae("mae_vitb16", path, sha256))
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.errors import ConfigError, WeightsError
from dinoreg.vit import NORM_EPS, Attention, Mlp, PatchEmbed
from dinoreg.weights import Encoder, mismatches, random_state

TRAINED_PX = 224  # side of the images that the checkpoints were trained on


@dataclass(frozen=True)
class MaeSpec:
    """Shape of one encoder: channels of a token, blocks, attention heads, side of a patch in px."""

    dim: int
    depth: int
    heads: int
    patch: int


ARCHITECTURES: dict[str, MaeSpec] = {
    "mae_vitb16": MaeSpec(768, 12, 12, 16),
    "mae_vitl16": MaeSpec(1024, 24, 16, 16),
    "mae_vith14": MaeSpec(1280, 32, 16, 14),
}


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, spec: MaeSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.dim, eps=NORM_EPS)
        self.attn = Attention(spec.dim, spec.heads)
        self.norm2 = nn.LayerNorm(spec.dim, eps=NORM_EPS)
        self.mlp = Mlp(spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class MaskedAutoencoderVit(nn.Module):
    """The encoder of a masked auto-encoder, with the parameter names of the official checkpoints."""

    def __init__(self, spec: MaeSpec) -> None:
        super().__init__()
        self.spec, self.patch = spec, spec.patch
        self.side = TRAINED_PX // spec.patch  # of the table of positions, in tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, spec.dim))  # class token first
        self.patch_embed = PatchEmbed(spec.dim, spec.patch)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.dim, eps=NORM_EPS)

    def patch_tokens(self, images: Tensor, last_layers: int = 1) -> Tensor:
        """Patch tokens on their grid.

        Args:
            images: (b, 3, patch * h, patch * w).
            last_layers: number of blocks, from the end, whose outputs are concatenated along the channels, each after the final
                LayerNorm; the earliest of them first.

        Returns:
            (b, h, w, last_layers * dim).
        """
        b, _, height, width = images.shape
        rows, cols = height // self.patch, width // self.patch
        position = self.position_embedding(rows, cols)
        x = torch.cat([(self.cls_token + position[:, :1]).expand(b, -1, -1), self.patch_embed(images) + position[:, 1:]], dim=1)
        outputs: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number >= self.spec.depth - last_layers:
                outputs.append(self.norm(x)[:, 1:])
        return torch.cat(outputs, dim=-1).reshape(b, rows, cols, -1)

    def position_embedding(self, rows: int, cols: int) -> Tensor:
        """Position embeddings of the class token and of rows x cols patches, (1, 1 + rows * cols, dim).

        The table is used as it is at its own size, else resized by bicubic interpolation, as in the official fine-tuning.
        """
        if rows == cols == self.side:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, cols), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)


def load_mae(arch: str, path: Path, sha256: str, *, device: torch.device | str = "cpu") -> Encoder:
    """An official checkpoint as an encoder.

    Args:
        arch: a key of ``ARCHITECTURES``.
        path: ``mae_pretrain_vit_*.pth``: {"model": tensors}.
        sha256: what the file has to have; it is a pickle and is not opened otherwise.
        device: where the parameters go.

    Raises:
        ConfigError: unknown architecture.
        WeightsError: no file, another hash, or anything but the tensors of this encoder.
    """
    spec = _spec(arch)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: expected the weights of {arch}; got: {error.strerror or error}; check the path") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise WeightsError(f"{path}: expected sha256 {sha256}; got {found}, so it was not opened; fetch the official file")
    try:
        state = dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)["model"])
    except Exception as error:  # whatever torch.load makes of a file that is no plain checkpoint
        raise WeightsError(f"{path}: expected a checkpoint of plain tensors under 'model'; got {type(error).__name__}; fetch the "
                           "official file") from error
    with torch.device("meta"):
        model = MaskedAutoencoderVit(spec).eval()
    if wrong := mismatches(model, arch, state):
        raise WeightsError(f"{path}: expected the tensors of encoder {arch}; got a file that does not match ({wrong}); fetch the "
                           "official file")
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=True, assign=True)
    return Encoder(model.requires_grad_(False).to(device), arch, sha256, f"{path.name}, sha256 as given")


def random_mae(arch: str, seed: int, *, device: torch.device | str = "cpu") -> Encoder:
    """The exact architecture with seeded random weights, for tests; never to be called MAE. Raises ConfigError."""
    with torch.device("meta"):
        model = MaskedAutoencoderVit(_spec(arch)).eval()
    model.load_state_dict(random_state(model, seed), strict=True, assign=True)
    return Encoder(model.requires_grad_(False).to(device), arch, None, f"random weights, seed {seed}")


def _spec(arch: str) -> MaeSpec:
    if arch not in ARCHITECTURES:
        raise ConfigError(f"unknown encoder architecture {arch!r}; choose one of: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]
