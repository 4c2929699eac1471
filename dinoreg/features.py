"""Features of a pair on any lattice: DINOv2, MIND-SSC or both, each family on one scale.

One scalar a family makes two unrelated places differ by a squared distance of 1 on average, so that costs, coupling and
regularity mean the same for any family. With both, each counts half (``mind.weight`` 1). Voxels are never normalised one by one:
the length of a feature vector carries how much there is to see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinoreg.config import MindConfig
from dinoreg.convex import FeatureVolume
from dinoreg.dino import ProjectedPair
from dinoreg.grid import Shape, resize, total
from dinoreg.mind import mind_ssc


@dataclass(frozen=True, eq=False)
class PairFeatures:
    """What both images of a pair look like to the solver.

    Attributes:
        fixed, moving: intensities (i, j, k) in [0, 1], on the fixed grid.
        fixed_valid, moving_valid: (i, j, k) bool, where they hold data.
        dino: projected DINOv2 tokens, or None.
        mind: settings of MIND-SSC, or None for no MIND features.
        views: tokens of further views; all views together count as much as one alone.
    """

    fixed: Tensor
    moving: Tensor
    fixed_valid: Tensor
    moving_valid: Tensor
    dino: ProjectedPair | None
    mind: MindConfig | None
    views: tuple[ProjectedPair, ...] = ()

    def images(self, lattice: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both images and both weights on a lattice."""
        fixed, moving = resize(self.fixed, lattice), resize(self.moving, lattice)
        return fixed, moving, resize(self.fixed_valid.float(), lattice), resize(self.moving_valid.float(), lattice)

    def on(self, lattice: Shape) -> tuple[FeatureVolume, FeatureVolume]:
        """Scaled features and weights of both images on a lattice."""
        fixed, moving, wf, wm = self.images(lattice)
        families, shares = [], []
        if self.mind is not None:
            families.append(tuple(mind_ssc(image, self.mind.radius, self.mind.dilation) for image in (fixed, moving)))
            shares.append(self.mind.weight)
        for view in () if self.dino is None else (self.dino, *self.views):
            # Where there is no body, features fade to zero: a contour is information; no data at all is the weights' business.
            families.append(tuple(found.values * found.weight for found in view.sample(lattice)))
            shares.append(1.0 / (1 + len(self.views)))
        for share, (a, b) in zip(shares, families, strict=True):
            scale = (share / sum(shares)) ** 0.5 * unrelated_distance(a, b, wf, wm).rsqrt()
            a.mul_(scale)
            b.mul_(scale)
        sides = [list(side) for side in zip(*families, strict=True)]
        families.clear()  # no more than three copies of the features of a side at a time
        volumes = []
        for side, weight in zip(sides, (wf, wm), strict=True):
            volumes.append(FeatureVolume(torch.cat(side) if len(side) > 1 else side[0], weight))
            side.clear()
        return volumes[0], volumes[1]


def unrelated_distance(fixed: Tensor, moving: Tensor, fixed_weight: Tensor, moving_weight: Tensor) -> Tensor:
    """Mean squared distance between two features of one image picked at random, the mean over both images (scalar).

    That is twice the sum over channels of the variance; features (c, i, j, k), weights (i, j, k). At least 1e-4 of the mean
    squared length, so that rounding does not pass for contrast where there is none.
    """
    distance, length = fixed.new_zeros(2, dtype=torch.float64)
    for features, weight in ((fixed, fixed_weight), (moving, moving_weight)):
        w = weight.double()
        count = total(w)
        for channel in features:  # in double precision, a channel at a time
            x = channel.double()
            mean = total(w * x) / count
            distance += total(w * (x - mean).square()) / count
            length += total(w * x.square()) / count
    return torch.maximum(distance, 1e-4 * length).clamp_min(1e-12).float()
