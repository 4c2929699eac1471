"""The vision transformer of DINOv2, inference only, with the parameter names of the official checkpoints.

Architecture: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (arXiv 2304.07193); register
tokens: Darcet et al., "Vision Transformers Need Registers" (arXiv 2309.16588). The rule that fits the table of position
embeddings to another image size is part of the published weights: tokens computed with another rule differ by 0.2-0.5 %.

Cost of one image of n patches, width d, depth L: 24 n d^2 L + 4 n^2 d L floating point operations; the largest activation
is the hidden layer of the MLP, 4 n d values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.errors import ConfigError

PATCH = 14  # px, side of the square that becomes one token
NATIVE_GRID = 37  # tokens along each side of the 518 px images of the last training phase
NORM_EPS = 1e-6
LEGACY_OFFSET = 0.1  # tokens, added to the target size by the rule of the models without registers


@dataclass(frozen=True)
class VitSpec:
    """Shape of one DINOv2 transformer.

    Attributes:
        dim: channels of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        registers: register tokens between the class token and the patch tokens.
        swiglu: whether the feed-forward part is the gated one of the giant model.
    """

    dim: int
    depth: int
    heads: int
    registers: int = 0
    swiglu: bool = False


ARCHITECTURES: dict[str, VitSpec] = {
    "vits14": VitSpec(384, 12, 6),
    "vitb14": VitSpec(768, 12, 12),
    "vitl14": VitSpec(1024, 24, 16),
    "vitg14": VitSpec(1536, 40, 24, swiglu=True),
    "vits14_reg4": VitSpec(384, 12, 6, registers=4),
    "vitb14_reg4": VitSpec(768, 12, 12, registers=4),
    "vitl14_reg4": VitSpec(1024, 24, 16, registers=4),
    "vitg14_reg4": VitSpec(1536, 40, 24, registers=4, swiglu=True),
}


class PatchEmbed(nn.Module):
    """Image -> one vector a patch."""

    def __init__(self, dim: int, patch: int = PATCH) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, height, width) -> (b, patches, dim), patches row by row."""
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values come from one matrix, in this order."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        b, n, dim = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)  # each (b, heads, n, d)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, dim)
        out: Tensor = self.proj(mixed)
        return out


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    """The gated feed-forward part of the giant model; ``w12`` holds the gate first, then the values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 8 * math.ceil(int(4 * dim * 2 / 3) / 8)  # two thirds of the MLP's width, in multiples of 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned factor a channel on the output of a residual branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.dim, eps=NORM_EPS)
        self.attn = Attention(spec.dim, spec.heads)
        self.ls1 = LayerScale(spec.dim)
        self.norm2 = nn.LayerNorm(spec.dim, eps=NORM_EPS)
        self.mlp = SwiGlu(spec.dim) if spec.swiglu else Mlp(spec.dim)
        self.ls2 = LayerScale(spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """DINOv2; the names of its parameters are those of the official checkpoints with ``block_chunks=0``."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.spec, self.patch = spec, PATCH
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + NATIVE_GRID * NATIVE_GRID, spec.dim))  # class token first
        if spec.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, spec.registers, spec.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, spec.dim))  # in every checkpoint, used in training only
        self.patch_embed = PatchEmbed(spec.dim)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.dim, eps=NORM_EPS)

    def forward(self, images: Tensor, last_layers: int = 1) -> Tensor:
        """All tokens of the last blocks.

        Args:
            images: (b, 3, height, width), both sides multiples of 14 px.
            last_layers: number of blocks, from the end, whose outputs are concatenated along the channels, each after the
                final LayerNorm; the earliest of them first.

        Returns:
            (b, 1 + registers + patches, last_layers * dim): the class token, the registers, the patches row by row.
        """
        b, _, height, width = images.shape
        x = torch.cat([self.cls_token.expand(b, -1, -1), self.patch_embed(images)], dim=1)
        x = x + self.position_embedding(height // PATCH, width // PATCH)
        if self.spec.registers:  # registers have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(b, -1, -1), x[:, 1:]], dim=1)
        outputs: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number >= self.spec.depth - last_layers:
                outputs.append(self.norm(x))
        return torch.cat(outputs, dim=-1)

    def patch_tokens(self, images: Tensor, last_layers: int = 1) -> Tensor:
        """The patch tokens alone, on their grid: (b, 3, 14 h, 14 w) -> (b, h, w, last_layers * dim)."""
        b, _, height, width = images.shape
        tokens: Tensor = self(images, last_layers)[:, 1 + self.spec.registers :]
        return tokens.reshape(b, height // PATCH, width // PATCH, -1)

    def position_embedding(self, rows: int, cols: int) -> Tensor:
        """Position embeddings of the class token and of rows x cols patches, shape (1, 1 + rows * cols, dim).

        The table is used as it is at its own size (37 x 37). Otherwise the models with registers resize it with antialiased
        bicubic interpolation to the size; those without registers use plain bicubic interpolation with the scale factor
        (size + 0.1) / 37, which moves every sample a little.
        """
        if rows == cols == NATIVE_GRID:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, NATIVE_GRID, NATIVE_GRID, -1).permute(0, 3, 1, 2)
        if self.spec.registers:
            table = F.interpolate(table, size=(rows, cols), mode="bicubic", antialias=True)
        else:
            scale = ((rows + LEGACY_OFFSET) / NATIVE_GRID, (cols + LEGACY_OFFSET) / NATIVE_GRID)
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)


def get_spec(arch: str) -> VitSpec:
    """The architecture of that name; raises ConfigError with the list of names when there is none."""
    if arch not in ARCHITECTURES:
        raise ConfigError(f"unknown encoder architecture {arch!r}; choose one of: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]


def build_vit(arch: str, device: torch.device | str = "cpu") -> VisionTransformer:
    """A DINOv2 transformer in evaluation mode whose parameters hold no trained values yet.

    Args:
        arch: a key of ``ARCHITECTURES``, such as ``"vitl14_reg4"``.
        device: where its parameters are made; ``"meta"`` allocates nothing.

    Raises:
        ConfigError: for an unknown name.
    """
    with torch.device(device):
        return VisionTransformer(get_spec(arch)).eval().requires_grad_(False)
