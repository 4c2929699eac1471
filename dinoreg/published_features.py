"""Features as the released DINO-Reg code makes them, for the preset ``published``.

Against the default: every slice has features and a mask of its own before the principal components are found, those between
encoded slices by linear interpolation; and the result is at the voxels. ``QuirksConfig`` switches what else is done differently.

The released code holds the tokens of all slices in double precision (17 GB a volume of 192 x 160 x 192 with 112 x 96 tokens).
Here the encoded slices are kept in float16 (1.5 GB), those between exist one at a time while moments are summed, and the
projection comes before the interpolation, which is the same. At the voxels 24 channels are 0.57 GB a volume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from dinoreg.config import Config, EncoderConfig, QuirksConfig
from dinoreg.dino import ProjectedGrid, ProjectedPair
from dinoreg.features import PairFeatures, unrelated_distance
from dinoreg.grid import Shape, apply_axes, linear_weights, shape3
from dinoreg.mind import mind_ssc
from dinoreg.pca import Basis, Moments, fit_basis, one_thread, project, token_moments
from dinoreg.preprocess import BoolArray, FloatArray
from dinoreg.slices import FOREGROUND, PatchEncoder, TokenGrid, volume_tokens
from dinoreg.volume import Volume

WHOLE_PATCH = 0.99  # share of a patch inside the mask from which its token counts, as released
THRESHOLDS = {"CT": 0.005, "CBCT": 0.005}  # of the unit range, for masks slice by slice
OTHER_THRESHOLD = 0.05
SEED = 0  # of the randomised PCA, which the released code leaves to chance
CHUNK = 8  # channels brought to the voxels at a time


@dataclass(frozen=True, eq=False)
class SliceStack:
    """Tokens of a volume on every slice.

    Attributes:
        encoded: the tokens of the encoded slices.
        between: (slices, encoded), weights that interpolate every slice of the volume.
        foreground: (slices, h, w) bool.
    """

    encoded: TokenGrid
    between: Tensor
    foreground: Tensor

    def slices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens (h, w, c) float32 and foreground (h, w) of one slice after another."""
        for weights, foreground in zip(self.between, self.foreground, strict=True):
            yield sum((weights[n] * self.encoded.tokens[n].float() for n in weights.nonzero()[:, 0]), torch.zeros(())), foreground

    def moments(self, device: torch.device | str) -> Moments:
        """Of the foreground tokens of all slices."""
        channels = self.encoded.tokens.shape[-1]
        total = Moments(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, channels, dtype=torch.float64))
        for tokens, foreground in self.slices():
            if bool(foreground.any()):
                total = total + token_moments(tokens[None], foreground[None], device)
        return total

    def project(self, basis: Basis, center: bool, device: torch.device | str) -> ProjectedGrid:
        """All slices in a basis; zero in the background."""
        tokens, geometry = self.encoded.tokens, self.encoded.geometry
        features = project(tokens, torch.ones(tokens.shape[:3], dtype=torch.bool), basis, center, device)
        features = apply_axes(features.permute(3, 0, 1, 2), [self.between, None, None]).permute(1, 2, 3, 0)  # (slices, h, w, k)
        foreground = self.foreground.to(device)
        axis, positions = geometry.axes[0], list(geometry.positions)
        positions[axis] = np.arange(geometry.shape[axis], dtype=np.float64)
        geometry = replace(geometry, positions=(positions[0], positions[1], positions[2]))
        return ProjectedGrid(features * foreground[..., None], foreground, geometry)


def slice_masks(unit: FloatArray, modality: str) -> BoolArray:
    """The body in every plane of the third array axis by itself.

    Threshold (0.005 for CT, 0.05 else), largest connected part, holes filled, opening with a 5 x 5 square, largest part of that.

    Args:
        unit: (i, j, k) in [0, 1].
        modality: "CT", "CBCT", "MR" or "".
    """
    masks = unit > THRESHOLDS.get(modality, OTHER_THRESHOLD)
    for k in range(masks.shape[2]):
        filled = ndimage.binary_fill_holes(_largest(masks[:, :, k]))
        masks[:, :, k] = _largest(ndimage.binary_opening(filled, np.ones((5, 5))))
    return np.asarray(masks, dtype=bool)


def _largest(mask: BoolArray) -> BoolArray:
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray((labels == sizes.argmax()) & mask, dtype=bool)


def encode_pair(images: tuple[Tensor, Tensor], bodies: tuple[Tensor, Tensor], affine: npt.NDArray[np.float64],
                encoder: PatchEncoder, config: Config, device: torch.device | str) -> ProjectedPair:
    """Both volumes in one basis.

    Args:
        images: fixed and moving (i, j, k), in [0, 1].
        bodies: their masks (i, j, k) bool.
        affine: voxel -> RAS mm of both.

    Raises:
        RegistrationError: no foreground, too few tokens or tokens that are not finite.
    """
    quirks, count = config.quirks, config.pca.components
    stacks = [slice_stack(image, body, affine, encoder, config.encoder, quirks)
              for image, body in zip(images, bodies, strict=True)]
    moments = stacks[0].moments(device) + stacks[1].moments(device)
    basis = fit_basis(moments, count)  # with its checks, whichever is used
    if quirks.randomised_pca:
        basis = randomised_basis(moments, count, SEED)
    fixed, moving = (stack.project(basis, config.pca.center, device) for stack in stacks)
    return ProjectedPair(basis, fixed, moving)


def slice_stack(image: Tensor, body: Tensor, affine: npt.NDArray[np.float64], encoder: PatchEncoder, config: EncoderConfig,
                quirks: QuirksConfig) -> SliceStack:
    """Tokens of one volume (i, j, k) on every slice, with the mask ``body`` (i, j, k) bool."""
    shape = shape3(image)
    if quirks.token_grid is not None:
        # A patient who lies along the array, a millimetre a token: slices follow k, rows i and columns j.
        rows, columns = quirks.token_grid
        spacing = float(np.linalg.norm(affine[:3, 2]))
        affine = np.array([[0, -columns / shape[1], 0, 0], [-rows / shape[0], 0, 0, 0], [0, 0, spacing, 0], [0, 0, 0, 1]])
        config = replace(config, axis="axial", long_side_tokens=max(rows, columns))
    if quirks.gap_slices:
        config = replace(config, gap_mm=quirks.gap_slices * _slice_spacing(affine, config))
    encoded = volume_tokens(image, torch.ones_like(image, dtype=torch.bool), affine, encoder, config)
    geometry = encoded.geometry
    axis = geometry.axes[0]
    positions, number = geometry.positions[axis].copy(), np.arange(len(encoded.tokens), dtype=np.float64)
    if quirks.shifted_last_gap and len(positions) > 1:
        positions[-1] += np.sign(positions[-1] - positions[0])
    order = np.argsort(positions)
    at = np.interp(np.arange(shape[axis]), positions[order], number[order])
    between = linear_weights(torch.from_numpy(at), len(number))
    cover = [_cover(geometry.positions[a], geometry.extent[a], shape[a]) for a in geometry.axes[1:]]
    shares = apply_axes(body.permute(geometry.axes).float(), [None, *cover])  # (slices, h, w)
    return SliceStack(encoded, between, shares.cpu() > (WHOLE_PATCH if quirks.slice_masks else FOREGROUND))


@one_thread()
def randomised_basis(moments: Moments, components: int, seed: int) -> Basis:
    """The subspace of ``torch.pca_lowrank`` (Halko, Martinsson and Tropp 2011, algorithm 5.1, two power iterations, no
    oversampling), out of the moments alone.

    With the centred tokens X, S = X^T X and a random matrix R, its range is that of X S^2 R, and its components are the right
    singular vectors of the projection of X onto that: all of it can be had from S, in double precision.

    Args:
        moments: of the tokens.
        components: as many as wanted.
        seed: of R, which is the one that torch would draw after ``torch.manual_seed(seed)`` on a CPU.
    """
    scatter = moments.scatter
    basis = torch.randn(len(scatter), components, generator=torch.Generator().manual_seed(seed)).double()
    for _ in range(2):
        basis = torch.linalg.qr(scatter @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ scatter @ basis)
    whitened = vectors / values.clamp_min(1e-15 * float(values[-1])).sqrt()  # X basis whitened has orthonormal columns
    _, singular, rows = torch.linalg.svd((whitened.T @ basis.T) @ scatter, full_matrices=False)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    variance, total = singular.square() / moments.count, float(scatter.trace()) / moments.count
    return Basis((rows * largest.sign()).T, moments.mean, variance, total)


def voxel_features(pair: PairFeatures, quirks: QuirksConfig) -> tuple[Tensor, Tensor]:
    """Features of both volumes at the voxels: two tensors (c, i, j, k)."""
    lattice = shape3(pair.fixed)
    families = []
    if pair.mind is not None:
        mind = pair.mind
        families.append([mind_ssc(image, mind.radius, mind.dilation) for image in (pair.fixed, pair.moving)])
    if pair.dino is not None:
        families.append([_at_voxels(grid, lattice) for grid in (pair.dino.fixed, pair.dino.moving)])
    if not quirks.raw_scale:
        for fixed, moving in families:
            distance = unrelated_distance(fixed, moving, pair.fixed_valid, pair.moving_valid) * len(families)
            fixed *= distance.rsqrt()
            moving *= distance.rsqrt()
    f, m = families[0] if len(families) == 1 else (torch.cat([family[side] for family in families]) for side in (0, 1))
    if not quirks.zero_fill:
        _continue_outwards(f, pair.fixed_valid)
        _continue_outwards(m, pair.moving_valid)
    return f, m


def _at_voxels(grid: ProjectedGrid, lattice: Shape) -> Tensor:
    """Linear interpolation of the features, which are zero in the background, some channels at a time."""
    out = grid.features.new_empty((grid.features.shape[-1], *lattice))
    for start in range(0, len(out), CHUNK):
        found = replace(grid, features=grid.features[..., start : start + CHUNK]).sample(lattice)
        torch.mul(found.values, found.weight, out=out[start : start + CHUNK])
    return out


def _continue_outwards(features: Tensor, valid: Tensor) -> None:
    """Where an image holds no data, put the features of the nearest voxel where it does (in place)."""
    outside = valid.cpu().numpy() < 0.5
    if not outside.any() or outside.all():
        return
    nearest = ndimage.distance_transform_edt(outside, return_distances=False, return_indices=True)[:, outside]
    source = torch.from_numpy(np.ravel_multi_index(tuple(nearest), outside.shape)).to(features.device)
    target = torch.from_numpy(np.flatnonzero(outside)).to(features.device)
    for channel in features.flatten(1):
        channel[target] = channel[source]


def _slice_spacing(affine: npt.NDArray[np.float64], config: EncoderConfig) -> float:
    """Distance (mm) of the array planes that are encoded."""
    grid = Volume(np.zeros((1, 1, 1)), affine)  # for its orientation and spacing
    across = {"sagittal": "LR", "coronal": "PA", "axial": "IS"}[config.axis]
    return next(spacing for spacing, code in zip(grid.spacing, grid.orientation, strict=True) if code in across)


def _cover(positions: npt.NDArray[np.float64], extent: tuple[float, float], voxels: int) -> Tensor:
    """(tokens, voxels): the share of each token's stretch of an axis that lies in each voxel."""
    half = (extent[1] - extent[0]) / len(positions) / 2
    x = np.arange(voxels)
    low, high = np.maximum.outer(positions - half, x - 0.5), np.minimum.outer(positions + half, x + 0.5)
    return torch.from_numpy(np.maximum(high - low, 0) / (2 * half)).float()
