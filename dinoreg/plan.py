"""How much memory a registration will take, stage by stage, before it is begun.

What is counted are arrays: bytes a voxel of the fixed grid (V), a cell of a lattice, a candidate of the search, a token. The
counts are those of the code; what the allocator and the libraries add is in ``benchmarks/memory.py``'s comparison with measured
peaks, and a few of the counts (marked) are measured ones. Arrays that are made slab by slab count with a slab's size alone.

Chunks are as small as they can be without loss of speed whatever the machine, so little can be gained by smaller ones: slabs, an
eighth of their size. What does not fit even so is refused before it begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dinoreg import slabs
from dinoreg.config import Config
from dinoreg.errors import RegistrationError
from dinoreg.grid import Shape, lattice_shape
from dinoreg.refine import lattices
from dinoreg.vit import ARCHITECTURES, PATCH
from dinoreg.volume import Volume

GIB = 2**30
SMALLER = 8  # how much smaller slabs get where memory is short
SLAB_BYTES = 24  # a voxel of a slab: three coordinates in double precision; some steps hold several of these
LATER = 100 * 2**20  # libraries that load on the way, and what allocators keep, as measured
PICTURE_VOXELS = 16_000_000  # see ``dinoreg.draw``

Output = str  # "field": Learn2Reg; "mha": a single pair; "all": everything that ``Registration.save`` writes; "": nothing


@dataclass(frozen=True)
class Pair:
    """What the memory of a registration depends on besides the configuration.

    Attributes:
        shape, spacing: of the fixed grid.
        moving: voxels of the moving image.
        held: bytes of all images and masks as they were read.
        moving_item: bytes a voxel of the moving image.
        same_grid: both images lie on one grid.
    """

    shape: Shape
    spacing: tuple[float, float, float]
    moving: int
    held: int
    moving_item: int
    same_grid: bool

    @staticmethod
    def of(fixed: Volume, moving: Volume, masks: Sequence[Volume | None] = ()) -> Pair:
        """That of two images, with their masks."""
        held = sum(volume.array.nbytes for volume in (fixed, moving, *masks) if volume is not None)
        return Pair(fixed.shape, fixed.spacing, moving.array.size, held, moving.array.dtype.itemsize, moving.same_grid(fixed))


@dataclass(frozen=True)
class Plan:
    """Memory of each stage in bytes, beyond what the process held before the images were read: program and weights.

    Attributes:
        host: of the process.
        gpu: on the GPU; empty without one.
        slab_voxels: size of the slabs that this holds for.
    """

    host: dict[str, int]
    gpu: dict[str, int]
    slab_voxels: int

    @property
    def peak(self) -> int:
        """Of the dearest stage, host."""
        return max(self.host.values())

    @property
    def dearest(self) -> str:
        """The stage with the peak."""
        return max(self.host, key=lambda name: self.host[name])

    @property
    def gpu_peak(self) -> int:
        """Of the dearest stage on the GPU; 0 without one."""
        return max(self.gpu.values(), default=0)


def plan(config: Config, pair: Pair, *, arch: str | None = None, gpu: bool = False, output: Output = "",
         slab_voxels: int | None = None) -> Plan:
    """The memory that registering a pair takes.

    Args:
        config: with which it is registered.
        pair: what is registered.
        arch: of the encoder, a name of ``dinoreg.vit.ARCHITECTURES``; None where there is none, or an unknown one.
        gpu: the solver and the encoder run on a GPU.
        output: what is written.
        slab_voxels: size of slabs; the default one if None.
    """
    voxels, slab_voxels = math.prod(pair.shape), slab_voxels or slabs.VOXELS
    slab = SLAB_BYTES * max(min(voxels, slab_voxels), pair.shape[1] * pair.shape[2])
    dino = "dinov2" in config.features
    images, shown = 10 * voxels, 10 * voxels if dino else 0  # grey values and regions; what the encoder sees and the bodies
    host, device = {"read": pair.held + voxels * 4}, {"prepare": images}
    placed = (0 if pair.moving_item == 4 and pair.same_grid else 4 * voxels) + (0 if pair.same_grid else 4 * pair.moving)
    second = max(7 * voxels, 9 * voxels + slab, 14 * voxels if dino else 0)  # labels; scaling; labels of the body
    host["prepare"] = pair.held + (images + shown) // 2 + placed + second
    weights = 0
    if dino:
        weights, batch, tokens, projected = _encoder(config, pair, arch, gpu)
        host["encode"] = pair.held + shown + voxels + tokens + (0 if gpu else images + batch)
        device["encode"] = images + weights + batch
        images += projected
    solver = {"discrete": max(4 * voxels, _discrete(config, pair, gpu)), "refine": max(4 * voxels, _refine(config, pair, gpu))}
    if config.solver == "published":
        channels = _channels(config)
        solver = {"discrete": (8 * channels + 120) * voxels, "refine": (8 * channels + 220) * voxels}
    for name, needed in solver.items():
        host[name] = pair.held + (0 if gpu else images + needed)
        device[name] = images + weights + needed
    field = 12 * voxels + (0 if config.solver == "published" else 4 * voxels)  # with the confidence
    coarse = 12 * min(voxels, config.refine.max_cells)
    host["finish"] = pair.held + field + (0 if gpu else coarse + voxels + 3 * slab)
    device["finish"] = weights + field + coarse + voxels + 3 * slab
    host |= _output(pair, pair.held + field, slab, output)
    return Plan({name: LATER + needed for name, needed in host.items()}, device if gpu else {}, slab_voxels)


def _channels(config: Config) -> int:
    views = 3 if config.encoder.axis == "all" else 1
    return (12 if "mind" in config.features else 0) + (views * config.pca.components if "dinov2" in config.features else 0)


def _encoder(config: Config, pair: Pair, arch: str | None, gpu: bool) -> tuple[int, int, int, int]:
    """Bytes of weights, of a batch on its way, of the tokens of both volumes and of their projections, for a view that is all
    body; an encoder of unknown architecture counts as the largest that weights are published for."""
    spec = ARCHITECTURES.get(arch or "", ARCHITECTURES["vitl14"])
    weights = 4 * (12 * spec.dim**2 * spec.depth + 1400 * spec.dim)
    long, together, tokens = config.encoder.long_side_tokens, 0, 0
    planes = {"axial": 2, "coronal": 1, "sagittal": 0}  # array axes of a volume that is stored as most are
    for axis in planes.values() if config.encoder.axis == "all" else [planes[config.encoder.axis]]:
        sides = sorted(n * s for a, (n, s) in enumerate(zip(pair.shape, pair.spacing, strict=True)) if a != axis)
        patches = math.prod(config.quirks.token_grid or (long, math.ceil(long * sides[0] / sides[1])))
        gap = config.quirks.gap_slices * pair.spacing[axis] or config.encoder.gap_mm
        slices = math.ceil(pair.shape[axis] * pair.spacing[axis] / gap) + 1
        together = max(together, patches * min(slices, max(1, (16384 if gpu else 4096) // patches)))
        tokens += 2 * slices * patches
    # residual stream and its normalised copy, queries, keys and values with a copy, hidden layer and its activation; the image
    a_token = spec.dim * (4 * 2 + (2 if gpu else 4) * (3 + 3 + 1 + 4 + 4)) + 3 * 4 * PATCH**2
    kept = 2 * spec.dim * config.encoder.last_layers
    return weights, together * a_token, tokens * kept, tokens * config.pca.components * 4


def _discrete(config: Config, pair: Pair, gpu: bool) -> int:
    """Beyond the images: features on the fine lattice, and the costs of all candidates."""
    longest = max(n * s for n, s in zip(pair.shape, pair.spacing, strict=True))
    most = 0
    for cells, pool, reach in config.discrete.levels:
        fine = lattice_shape(pair.shape, pair.spacing, longest / cells)
        coarse = lattice_shape(fine, (1.0, 1.0, 1.0), pool)
        cost, cells, padded = (2 * reach + 1) ** 3 * math.prod(coarse), math.prod(fine), math.prod(n + 2 * reach for n in fine)
        channels = _channels(config) + 2
        copies = 4 * cells + 2 * padded  # of all channels: of both images, warped, padded
        products = cells * (fine[2] + 2 * reach) + 2 * cost if gpu else 0  # on a CPU, costs are summed up where they belong
        most = max(most, 4 * (channels * copies + products + cost))
    return most


def _refine(config: Config, pair: Pair, gpu: bool) -> int:
    """Beyond the images, in volumes of a level's lattice: field, best field, Adam's moments, slopes (21); data terms; and the
    most that is made on the way in one step, or when the features are made."""
    channels, wide = _channels(config), -(-_channels(config) // 8) * 8  # on a CPU, channels of zeros fill vector registers
    kept, made, built = 21, 18 if gpu else 9, 0
    if config.refine.anchored:
        kept += 6  # the anchor, and what is added to it
    if config.refine.lncc:
        kept, made = kept + 6, max(made, 25 if gpu else 14)
    if config.refine.features:
        kept += 2 * (channels if gpu else wide) + 3
        made = max(made, 5 * channels + 12 if gpu else 3)
        families = 1 + (config.features == "dinov2+mind") + 2 * (config.encoder.axis == "all" and "dinov2" in config.features)
        built = 6 + max(36 if "mind" in config.features else 0, 3 * channels if families > 1 else 0,
                        2 * channels + (0 if gpu else 2 * wide))
    if config.refine.information:
        kept, made = kept + 5, max(made, 16)
    return max((4 * math.prod(lattice) * max(built, kept + made)
                for lattice in lattices(pair.shape, pair.spacing, config.refine)), default=0)


def _output(pair: Pair, held: int, slab: int, output: Output) -> dict[str, int]:
    """What writing, measuring and drawing take: images and copies of the field on their way to a file."""
    voxels = math.prod(pair.shape)
    drawn = min(voxels, PICTURE_VOXELS)
    if not output:
        return {}
    if output == "mha":
        return {"write": held + 24 * voxels, "metrics": held + 4 * voxels + 3 * slab}
    held += pair.moving_item * voxels  # the warped image
    shown = held + 4 * voxels + 44 * drawn
    found = {"write": held + 8 * voxels, "metrics": held + 4 * voxels + 3 * slab, "picture": shown}
    if output == "all":
        inverse = 16 * pair.moving + max(24 * pair.moving, 6 * slab)
        found |= {"write": held + max(24 * voxels, inverse) + slab, "page": shown}
    return found


def fitting(config: Config, pair: Pair, limit: int, *, arch: str | None = None, gpu: bool = False, output: Output = "") -> Plan:
    """The plan that keeps to a limit, with smaller slabs if need be: results do not depend on them.

    Args:
        limit: bytes beyond what the process holds without the images.

    Raises:
        RegistrationError: if there is none. It says what would fit.
    """
    found = plan(config, pair, arch=arch, gpu=gpu, output=output)
    if found.peak > limit:
        found = plan(config, pair, arch=arch, gpu=gpu, output=output, slab_voxels=slabs.VOXELS // SMALLER)
    if found.peak <= limit:
        return found

    def fits(config: Config, factor: float = 1.0) -> bool:
        i, j, k = (max(1, round(n / factor)) for n in pair.shape)
        shrunk = (i * j * k) / math.prod(pair.shape)
        a, b, c = (s * factor for s in pair.spacing)
        coarser = replace(pair, shape=(i, j, k), spacing=(a, b, c), moving=round(pair.moving * shrunk),
                          held=round(pair.held * shrunk))
        return plan(config, coarser, arch=arch, gpu=gpu, output=output, slab_voxels=slabs.VOXELS // SMALLER).peak <= limit

    ways = [f"images resampled to voxels {factor:g} times as long" for factor in (1.25, 1.5, 2, 2.5, 3, 4, 6, 8)
            if fits(config, factor)][:1]
    if "dinov2" in config.features and fits(replace(config, features="mind")):
        ways.insert(0, "--features mind")
    size = "x".join(map(str, pair.shape))
    raise RegistrationError(f"registering {size} voxels needs about {found.peak / GIB:.2f} GiB beside the program itself (stage "
                            f"{found.dearest}); the memory limit leaves {max(limit, 0) / GIB:.2f} GiB; what would fit: "
                            f"{', or '.join([*ways, 'a limit higher by ' + f'{(found.peak - limit) / GIB:.2f} GiB'])}")
