"""MIND-SSC features: the self-similarity context of Heinrich et al. (MICCAI 2013).

Each voxel is described by how much twelve pairs of its six neighbours differ, relative to the mean difference at that voxel:
a descriptor that depends on structure, not on what grey value a tissue has, and that needs no weights.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinoreg.grid import apply_axes, box_matrix, shape3, total

NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))
PAIRS = tuple((p, q) for p, q in itertools.combinations(NEIGHBOURS, 2)
              if sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) == 2)  # the 12 pairs at distance sqrt(2)


def mind_ssc(image: Tensor, radius: int = 1, dilation: int = 2) -> Tensor:
    """MIND-SSC descriptor of an image.

    Args:
        image: (i, j, k), any intensity scale (the descriptor does not change with it).
        radius: half width of the patches that are compared, voxels.
        dilation: distance of the compared patches from the voxel, voxels.

    Returns:
        (12, i, j, k) in (0, 1]; 1 in a channel means that its two patches differ least.

    Heinrich et al. 2013, eq. 2-4: D(x, y) is the mean squared patch difference, the noise V(x) its mean over the channels
    (bounded to [0.001, 1000] of its mean over the image), and the feature exp(-(D - min D) / V).
    """
    size = shape3(image)
    boxes = [box_matrix(n, 2 * radius + 1) for n in size]
    padded = pad(image[None, None], (dilation,) * 6, mode="replicate")[0, 0]

    def shifted(offset: tuple[int, int, int]) -> Tensor:
        i, j, k = (dilation * (1 + o) for o in offset)
        return padded[i : i + size[0], j : j + size[1], k : k + size[2]]

    distance = torch.stack([apply_axes((shifted(p) - shifted(q)).square_(), boxes) for p, q in PAIRS])  # (12, i, j, k)
    distance -= distance.amin(0)
    noise = distance.mean(0)
    mean = (total(noise) / noise.numel()).float()
    tiny = torch.finfo(torch.float32).tiny  # for an image without any contrast
    noise.clamp_(min=1e-3 * mean + tiny, max=1e3 * mean + tiny)
    return distance.div_(noise).neg_().exp_()
