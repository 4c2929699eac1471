"""An encoder whose tokens can be predicted: the mean of each patch, and what it was shown."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class PatchMeans:
    """Token = mean colour of its patch (3 channels); keeps every image."""

    arch: str = "patch means"
    sha256: str | None = None
    source: str = "no weights"
    patch: int = 14
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    images: list[Tensor] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def patch_tokens(self, images: Tensor, last_layers: int) -> Tensor:
        self.images.extend(images)
        self.batches.append(len(images))
        with torch.inference_mode():
            return torch.nn.functional.avg_pool2d(images, self.patch).permute(0, 2, 3, 1)


def affine(spacing: tuple[float, float, float], codes: str = "RAS", tilt_degrees: float = 0.0) -> np.ndarray:
    """Voxel -> RAS mm of a grid whose axes point (nearly) along the given patient directions."""
    columns = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    angle = np.deg2rad(tilt_degrees)
    c, s = np.cos(angle), np.sin(angle)
    tilt = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    result = np.eye(4)
    result[:3, :3] = tilt @ np.array([columns[code] for code in codes]).T @ np.diag(spacing)
    result[:3, 3] = (-40, 25, 7)
    return result
