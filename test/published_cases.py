"""A pair of volumes and an encoder for the tests of the preset ``published``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from fake_encoder import affine
from scipy import ndimage
from torch import Tensor

from dinoreg.config import get_preset
from dinoreg.volume import Volume

PRESET = get_preset("published")
TOKENS = (12, 10)
SMALL = replace(PRESET, quirks=replace(PRESET.quirks, token_grid=TOKENS), pca=replace(PRESET.pca, components=12),
                published=replace(PRESET.published, iterations=10))


@dataclass
class PatchCodes:
    """Token = 48 bounded numbers that depend on all pixels of its patch: enough for a PCA to choose from."""

    patch: int = 14
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def patch_tokens(self, images: Tensor, last_layers: int) -> Tensor:
        b, _, height, width = images.shape
        h, w = height // 14, width // 14
        patches = images[:, 0].reshape(b, h, 14, w, 14).permute(0, 1, 3, 2, 4).reshape(b, h, w, 196)
        weights = torch.randn(196, 48, generator=torch.Generator().manual_seed(5)) / 14
        return torch.tanh(patches @ weights + torch.linspace(-1, 1, 48))


def smooth_noise(shape: tuple[int, ...], seed: int, cells: float = 6.0, channels: int = 1) -> np.ndarray:
    """(channels, *shape) with a standard deviation of 1 and structures of about ``cells`` voxels."""
    noise = np.random.default_rng(seed).normal(size=(channels, *shape))
    noise = np.stack([ndimage.gaussian_filter(n, cells / 2) for n in noise])
    return noise / noise.std(axis=(1, 2, 3), keepdims=True)


def phantom_pair(shape: tuple[int, int, int] = (40, 34, 32)) -> tuple[Volume, Volume]:
    """An MR and a CT of one body, moved by (4, -3, 2) voxels; no size is a multiple of 6."""
    at = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij"))
    radius = sum((x / (0.42 * n)) ** 2 for x, n in zip(at, shape, strict=True))
    tissue = np.where(radius < 1, 0.5 + 0.12 * smooth_noise(shape, 1)[0], 0.0).clip(0, 1)
    moved = ndimage.shift(tissue, (4, -3, 2), order=1)
    noise = np.random.default_rng(2).normal(size=shape) * 0.005
    matrix = affine((2.0, 2.0, 2.0))
    return (Volume((900 * tissue + 4).astype(np.float32), matrix),
            Volume(np.where(moved > 0.01, 400 * (moved + noise) - 150, -1000).astype(np.float32), matrix))


def principal_sines(a: Tensor, b: Tensor) -> np.ndarray:
    """Sines of the angles between the spans of two matrices of orthonormal columns, ascending."""
    return np.sort(torch.linalg.svdvals(a.double() - b.double() @ (b.double().T @ a.double())).numpy())
