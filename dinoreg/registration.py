"""A pair of volumes in, a displacement field out: the pipeline.

paths -> volumes -> one grid -> intensities and masks -> features (frozen) -> joint PCA -> discrete stage, both directions ->
Adam, coarse to fine -> folds repaired -> field at full resolution.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinoreg import compiled, published, slabs
from dinoreg.align import align
from dinoreg.basis import FixedBasis, token_provenance
from dinoreg.cache import TokenCache
from dinoreg.config import AXES, Config
from dinoreg.convex import discrete
from dinoreg.dino import ProjectedPair, pair_features, placement
from dinoreg.encoding import EncodedVolume, encode_volume, encoding_key, same_view, upright
from dinoreg.errors import ConfigError, InputError, OutputError, RegistrationError
from dinoreg.features import PairFeatures
from dinoreg.grid import compose, lattice_shape, resize, resize_disp, shape3, unfold
from dinoreg.initial import checked, folded, undone
from dinoreg.memory import cgroup_limit, resident_bytes
from dinoreg.pca import token_moments
from dinoreg.plan import Output, Pair, fitting
from dinoreg.preprocess import body_mask, grown, on_grid, to_unit_range, valid_region
from dinoreg.published_features import encode_pair, slice_masks, voxel_features
from dinoreg.refine import LNCC, FeatureSSD, MutualInformation, Similarity, Sum, lattices, refine
from dinoreg.result import Registration
from dinoreg.slices import PatchEncoder, volume_tokens
from dinoreg.stages import advance, stage
from dinoreg.volume import Volume
from dinoreg.weights import load_encoder

log = logging.getLogger(__name__)

COLOUR_CELLS = 96  # along the longest side of the picture of what the encoder saw
SATURATED = 0.02  # share of cells at the edge of the search above which a warning is given
LARGEST = 1e37  # a tenth of what float32 can hold: differences of values have to stay finite as well
STILL = 1e-3  # cells; a field that is nowhere longer says that nothing moved: a hundredth of what noise alone does


class Registrar:
    """Registers pairs with one configuration. Holds the configuration and the encoder's weights, nothing of any pair: what is
    kept between pairs is in the cache.

    Args:
        config: a preset or one's own.
        weights: folder with the encoder's checkpoint; see ``dinoreg.weights.load_encoder`` for where it is looked for without.
        device: "auto" (CUDA if there is one), "cpu" or "cuda".
        threads: CPU threads; all that there are if not given.
        encoder: an encoder to use instead of a checkpoint.
        time_limit: seconds for a pair, from the beginning of ``register``: when they are over, the refinement ends, and the
            result is the best field so far, with a warning. What comes before (features, discrete search) and after (bringing the
            field to the voxels) is always done. Without it, no result depends on the clock.
        max_memory: bytes that the process may hold; the limit of its control group (cgroup), if there is one, counts as well.
        cache: where encoded volumes are kept. With it, or with a basis, each volume is encoded by itself (see ``by_itself``).
        basis: principal components for all pairs, in place of each pair's own.

    Raises:
        ConfigError: unknown device, CUDA asked for where there is none, threads below 1, a time limit that is not positive.
        WeightsError: the features need DINOv2 and its weights are missing or wrong.
    """

    def __init__(self, config: Config, weights: Path | None = None, device: str = "auto", threads: int | None = None,
                 encoder: PatchEncoder | None = None, time_limit: float | None = None, *, max_memory: int | None = None,
                 cache: TokenCache | None = None, basis: FixedBasis | None = None) -> None:
        if time_limit is not None and not 0 < time_limit < math.inf:
            raise ConfigError(f"the time limit must be a positive number of seconds; got {time_limit}")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1; got {threads}")
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda; got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda was asked for, but no CUDA GPU is visible; use --device auto or cpu, "
                              "or give the container its GPU (docker run --gpus all)")
        if threads is not None:
            torch.set_num_threads(threads)
        self.config = config
        self.device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        self.time_limit = time_limit
        self.max_memory = min(filter(None, (max_memory, cgroup_limit())), default=None)
        self.encoder, self.cache, self.basis = encoder, cache, basis
        if (cache or basis) and (config.solver == "published" or "dinov2" not in config.features or config.encoder.axis == "all"):
            raise ConfigError("a cache and a basis are for the tokens of DINOv2, each volume by itself: expected features with "
                              "dinov2, one view and a preset other than published; got "
                              f"{config.features}, {config.encoder.axis}, {config.preset}")
        if encoder is None and "dinov2" in config.features:
            self.encoder = load_encoder(config.encoder.arch, weights, device=self.device)
        if basis is not None:
            basis.check(token_provenance(config, self.engine))
        log.info("features %s%s, device %s", config.features,
                 f" ({self._encoder_name()})" if "dinov2" in config.features else "",
                 torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads")

    @property
    def engine(self) -> dict[str, Any]:
        """What results depend on besides configuration and images: "device"; with DINOv2, "encoder" and
        "encoder_sha256", "encoded" ("by itself" or "in pairs") and "basis_sha256"."""
        device = {"device": str(self.device)}
        if "dinov2" not in self.config.features:
            return device
        encoder = {"encoder": self._encoder_name(), "encoder_sha256": getattr(self.encoder, "sha256", None)}
        basis = {"basis_sha256": self.basis.sha256 if self.basis else None}
        return device | encoder | {"encoded": "by itself" if self.by_itself else "in pairs"} | basis

    def _encoder_name(self) -> str:
        return f"{getattr(self.encoder, 'arch', type(self.encoder).__name__)}, {getattr(self.encoder, 'source', 'given')}"

    @torch.no_grad()
    def register(self, fixed: Volume, moving: Volume, *, fixed_mask: Volume | None = None, moving_mask: Volume | None = None,
                 modalities: Sequence[str] = ("", ""), initial: npt.ArrayLike | None = None,
                 colours: bool = False, output: Output = "") -> Registration:
        """Register a pair.

        Args:
            fixed, moving: the images; the moving one is brought to the fixed grid through the headers first.
            fixed_mask, moving_mask: where the images count, if that is not everywhere; any grid, 0 is outside. They are grown
                by 3 voxels: a contour is seen by both of its sides.
            modalities: of fixed and moving image ("CT", "CBCT", "MR" or ""), over those of the preset.
            initial: 4x4, RAS mm, fixed point -> moving point: where to start, after the headers; or "auto": where the images say,
                if they say clearly that the headers are far off (:mod:`dinoreg.align`; never with the solver "published").
                It becomes part of the field.
            colours: also give what the encoder saw, as colours, for a report.

        Raises:
            InputError: an image with non-finite values or without contrast, no overlap, or an unusable initial transform.
            RegistrationError: the field is not finite, no foreground was found, or memory is too short or ran out.
        """
        planned = self._plan(fixed, moving, (fixed_mask, moving_mask), output)
        with slabs.of(planned["slab_voxels"]):
            result = self._register(fixed, moving, fixed_mask, moving_mask, modalities, initial, colours)
        result.info["plan"] = planned
        return result

    def _plan(self, fixed: Volume, moving: Volume, masks: Sequence[Volume | None], output: Output) -> dict[str, Any]:
        """The memory that the pair will take, for the report; see ``dinoreg.plan``. Bytes."""
        pair, gpu = Pair.of(fixed, moving, masks), self.device.type == "cuda"
        compiled.kernels()  # whose compiler takes 200 MB: part of the program
        base = max(0, resident_bytes() - pair.held)
        limit = sys.maxsize if self.max_memory is None else self.max_memory - base
        found = fitting(self.config, pair, limit, arch=getattr(self.encoder, "arch", None), gpu=gpu, output=output)
        if gpu and found.gpu_peak > (free := torch.cuda.mem_get_info()[0]):
            log.warning("about %.1f GiB of GPU memory will be needed, %.1f GiB are free: this may fail", found.gpu_peak / 2**30,
                        free / 2**30)
        return {"limit": self.max_memory, "base": base, "slab_voxels": found.slab_voxels, "stages": found.host, "gpu": found.gpu}

    def _register(self, fixed: Volume, moving: Volume, fixed_mask: Volume | None, moving_mask: Volume | None,
                  modalities: Sequence[str], initial: npt.ArrayLike | None, colours: bool) -> Registration:
        until = math.inf if self.time_limit is None else time.monotonic() + self.time_limit
        stages: dict[str, dict[str, float]] = {}
        warnings: list[str] = []
        info: dict[str, Any] = {"features": self.config.features, **self.engine, "threads": torch.get_num_threads()}
        kinds = [given or own for given, own in zip(modalities, self.config.modalities, strict=True)]
        if isinstance(initial, str) and initial == "auto":
            initial = None
            if self.config.solver != "published":
                with stage("align", stages):
                    found = align(fixed, moving, fixed_mask, moving_mask, kinds, self.config.intensity)
                info["alignment"] = found.to_dict()
                if found.needed:
                    initial = found.matrix
                    warnings.append(f"the moving image was moved before it was registered, {found}; look at the picture, and if "
                                    "the headers were right, register again with the initial transform none")
        start = np.eye(4) if initial is None else checked(initial)
        given = moving, moving_mask
        if initial is not None:
            moving, moving_mask = undone(moving, start), moving_mask and undone(moving_mask, start)
        with stage("prepare", stages):
            pair, shown, bodies = self._prepare(fixed, moving, fixed_mask, moving_mask, kinds)
        if "dinov2" in self.config.features:
            with stage("encode", stages):
                if self.by_itself:
                    view = given if same_view(given[0], moving) else (moving, moving_mask)
                    dino, info["volumes_encoded"] = self._encode_each(((fixed, fixed_mask), view), (fixed, moving), kinds)
                else:
                    dino, *views = self._encode_pair(shown, bodies, fixed.affine)
                    pair = replace(pair, views=tuple(views))
                pair = replace(pair, dino=dino)
                del shown, bodies
        with stage("discrete", stages):
            disp, saturated, clear = self._discrete(pair, fixed.spacing)
            info["saturated"] = saturated
            if saturated > SATURATED:
                warnings.append(f"the motion reaches the edge of the search range in {100 * saturated:.0f} % of the volume: look "
                                "at the picture, and align the images first if they are far apart")
        with stage("refine", stages):
            disp, info["levels"] = self._refine(pair, disp, fixed.spacing, until)
            info["ended"] = next((level["ended"] for level in info["levels"] if level["ended"]), None)
            warnings += self._ended_early(info["levels"])
            if float(disp.abs().max()) < STILL and not torch.equal(pair.fixed, pair.moving):
                warnings.append("the field is zero everywhere, though the images differ: nothing of them could be matched; check "
                                "masks, modalities and intensities")
        with stage("finish", stages):
            tokens = pair.dino
            del pair  # the images have done their part
            disp = resize_disp(disp, fixed.shape)
            if not self.config.quirks.folds_kept:
                info["repaired_voxels"] = unfold(disp)
            seen = None
            if colours and tokens is not None:
                longest = max(n * s for n, s in zip(fixed.shape, fixed.spacing, strict=True))
                seen = tokens.colours(lattice_shape(fixed.shape, fixed.spacing, longest / COLOUR_CELLS), disp)
            confidence = None if clear is None else resize(clear, fixed.shape).cpu().numpy()
            result = folded(disp.float().cpu().numpy(), start, fixed.affine)
        if not np.isfinite([result.min(), result.max()]).all():
            raise RegistrationError("the field holds values that are not finite; please report this with the images' headers")
        return Registration(result, fixed.affine, stages, warnings, info, start, confidence, seen)

    def _prepare(self, fixed: Volume, moving: Volume, fixed_mask: Volume | None, moving_mask: Volume | None,
                 kinds: Sequence[str]) -> tuple[PairFeatures, list[Tensor], list[Tensor]]:
        """Both images on the fixed grid, scaled, with their regions; what the encoder sees of them, and the body masks (of both,
        or nothing where there is no encoder, or each volume is encoded by itself)."""
        images, shown, regions, bodies = [], [], [], []
        encoded, quirks = "dinov2" in self.config.features and not self.by_itself, self.config.quirks
        for name, image, mask, kind in (("fixed", fixed, fixed_mask, kinds[0]), ("moving", moving, moving_mask, kinds[1])):
            extremes = (float(image.array.min()), float(image.array.max()))
            if not np.isfinite(extremes).all():
                raise InputError(f"the {name} image holds NaN or infinite values: replace them, or mask them out and fill them")
            if max(map(abs, extremes)) > LARGEST:
                raise InputError(f"the {name} image holds values of up to {max(map(abs, extremes)):.3g}; expected no more than "
                                 f"{LARGEST:g}: check it, and replace what marks missing values")
            array = np.asarray(on_grid(image, fixed), dtype=np.float32)
            if np.isnan(np.fmax.reduce(array, None)):
                raise InputError("by their headers the images have no voxel in common: correct the headers, or align them first")
            valid = valid_region(array)
            if mask is not None:
                valid &= grown(np.asarray(on_grid(mask, fixed, order=0)) != 0)
                if not valid.any():
                    raise InputError(f"the {name} mask leaves nothing of the {name} image: correct it, or leave it out")
            try:
                unit = to_unit_range(array, kind, self.config.intensity, quirks.all_voxel_percentiles)
                seen = (to_unit_range(array, kind, self.config.encoder_intensity, quirks.all_voxel_percentiles) if encoded
                        else None)
            except InputError as error:
                raise InputError(f"{name} image: {error}") from error
            images.append(torch.from_numpy(unit).to(self.device))
            regions.append(torch.from_numpy(valid).to(self.device))
            if seen is not None:
                shown.append(torch.from_numpy(seen))
                bodies.append(torch.from_numpy(slice_masks(seen, kind) if quirks.slice_masks else body_mask(unit, valid)))
        mind = self.config.mind if "mind" in self.config.features else None
        return PairFeatures(images[0], images[1], regions[0], regions[1], None, mind), shown, bodies

    @property
    def by_itself(self) -> bool:
        """Whether each volume is encoded on its own grid and in its own window, for any partner; else both on the fixed grid and
        in one window, at the same scale."""
        return self.cache is not None or self.basis is not None

    def _encode_pair(self, shown: list[Tensor], bodies: list[Tensor], affine: npt.NDArray[np.float64]) -> list[ProjectedPair]:
        """Both images on the fixed grid, in every view that the configuration asks for."""
        assert self.encoder is not None  # the constructor loads it
        if self.config.solver == "published":
            return [encode_pair((shown[0], shown[1]), (bodies[0], bodies[1]), affine, self.encoder, self.config, self.device)]
        window, found = bodies[0] | bodies[1], []
        axes = AXES if self.config.encoder.axis == "all" else (self.config.encoder.axis,)
        for number, axis in enumerate(axes):
            config = replace(self.config.encoder, axis=axis)
            grids = [volume_tokens(image, body, affine, self.encoder, config, window=window,
                                   progress=partial(advance, part=2 * number + half, parts=2 * len(axes)))
                     for half, (image, body) in enumerate(zip(shown, bodies, strict=True))]
            first, second = (EncodedVolume(grid, token_moments(grid.tokens, grid.foreground, self.device)) for grid in grids)
            found.append(pair_features(first, second, self.config.pca, self.device))
        return found

    def _encode_each(self, views: tuple[tuple[Volume, Volume | None], ...], images: tuple[Volume, Volume],
                     kinds: Sequence[str]) -> tuple[ProjectedPair, int]:
        """Each volume by itself, as it is in ``views`` with its mask, placed as the headers of ``images`` say; and how many were
        not in the cache."""
        (first, new), (second, also_new) = (
            self.encode(volume, mask, kind, partial(advance, part=half, parts=2))
            for half, ((volume, mask), kind) in enumerate(zip(views, kinds, strict=True)))
        placed = (placement(upright(images[0]), images[0]), placement(upright(images[1]), images[0]))
        basis = self.basis.basis if self.basis else None
        return pair_features(first, second, self.config.pca, self.device, basis=basis, placed=placed), new + also_new

    @torch.no_grad()
    def encode(self, volume: Volume, mask: Volume | None, modality: str,
               progress: Callable[[int, int], None] | None = None) -> tuple[EncodedVolume, bool]:
        """What the encoder sees of a volume, from the cache if it is there, and whether it had to be encoded.

        Args:
            volume, mask, modality, progress: see :func:`dinoreg.encoding.encode_volume`.

        Raises:
            ConfigError: the features have no encoder.
            InputError, RegistrationError: see there.
        """
        if self.encoder is None:
            raise ConfigError(f"features {self.config.features} have no encoder; choose dinov2 or dinov2+mind")
        key = ""
        if self.cache is not None:
            key = encoding_key(volume, mask, modality, self.encoder, self.config,
                               self.basis.sha256 if self.basis else None)
            if (kept := self.cache.get(key)) is not None:
                return kept, False
        encoded = encode_volume(volume, mask, modality, self.encoder, self.config, device=self.device, progress=progress)
        if self.basis is not None:
            encoded = encoded.project(self.basis.basis, self.config.pca.center, self.device)
        if self.cache is not None:
            try:
                self.cache.put(key, encoded)
            except OutputError as error:  # the result is as good without
                log.warning("not kept for other pairs: %s", error)
        return encoded, True

    def _discrete(self, pair: PairFeatures, spacing: Sequence[float]) -> tuple[Tensor, float, Tensor | None]:
        """The field on the last level's coarse lattice, the share of the first one's that reaches the edge of the search, and the
        confidence: that of all levels, multiplied (solver "composed")."""
        if self.config.solver == "published":
            features = voxel_features(pair, self.config.quirks)
            return *published.discrete(*features, self.config.published, self.config.quirks), None
        config, shape = self.config.discrete, shape3(pair.fixed)
        disp, clear, saturated = pair.fixed.new_zeros((3, 1, 1, 1)), pair.fixed.new_ones((1, 1, 1)), []
        for number, (cells, pool, reach) in enumerate(config.levels, 1):
            cell = max(n * s for n, s in zip(shape, spacing, strict=True)) / cells
            fine = lattice_shape(shape, spacing, cell)
            coarse = lattice_shape(fine, (1.0, 1.0, 1.0), pool)
            fixed, moving = pair.on(fine)
            moving = moving.warp(resize_disp(disp, fine))
            step, share, sure = discrete(fixed, moving, reach, coarse, config.consistency_iterations)
            disp = compose(resize_disp(disp, coarse), step)
            clear = resize(clear, coarse) * sure
            saturated.append(share)
            advance(number, len(config.levels))
        return disp, saturated[0], clear

    def _refine(self, pair: PairFeatures, disp: Tensor, spacing: Sequence[float],
                until: float) -> tuple[Tensor, list[dict[str, Any]]]:
        """The field on the finest lattice that there was time for, and what happened on each."""
        if self.config.solver == "published":
            voxels = list(voxel_features(pair, self.config.quirks))
            features = (voxels.pop(0) for _ in range(2))  # so that nobody holds what has been taken
            disp, losses = published.refine(features, disp, self.config.published, self.config.quirks, until)
            return disp, [{"lattice": list(shape3(disp)), **_ran(losses, self.config.published.iterations)}]
        config, shape = self.config.refine, shape3(pair.fixed)
        history: list[dict[str, Any]] = []
        total = sum(iterations for _, iterations in config.levels)

        def tick(done: int, _: float) -> None:
            advance(sum(level["iterations"] for level in history) + done, total)

        found = disp
        for lattice, (_, iterations) in zip(lattices(shape, spacing, config), config.levels, strict=True):
            if time.monotonic() > until:  # not even the features of the level are wanted any more
                history.append(_ran([], iterations))
                continue
            cell = [n * s / m for n, s, m in zip(shape, spacing, lattice, strict=True)]
            terms: list[tuple[float, Similarity]] = []
            if config.lncc:
                terms.append((config.lncc, LNCC(*pair.images(lattice), config.window)))
            if config.features:
                terms.append((config.features, FeatureSSD(*pair.on(lattice))))
            if config.information:
                terms.append((config.information, MutualInformation(*pair.images(lattice))))
            disp, losses = refine(Sum(terms), resize_disp(disp, lattice), cell, iterations, rate=config.rate,
                                  regularity=config.regularity, step_sigma=config.step_sigma, damping=config.damping,
                                  anchor=resize_disp(found, lattice) if config.anchored else None, until=until, progress=tick)
            history.append({"lattice": list(lattice), "cell_mm": [round(c, 3) for c in cell], **_ran(losses, iterations)})
        return disp, history

    def _ended_early(self, levels: Sequence[Mapping[str, Any]]) -> list[str]:
        """What a user should know of levels that did not do all of their iterations."""
        done, wanted = (sum(level[name] for level in levels) for name in ("iterations", "iterations_wanted"))
        warnings = []
        if any(level["ended"] == "time limit" for level in levels):
            warnings.append(f"time limit of {self.time_limit:g} s: {done} of {wanted} iterations of the refinement are done; "
                            "the field is the best so far, not the one that the preset asks for")
        if any(level["ended"] == "not finite" for level in levels):
            warnings.append("the refinement met values that are not finite and was ended: the field is the best one before; "
                            "look at the picture, and check the intensities of both images")
        return warnings


def _ran(losses: Sequence[float], wanted: int) -> dict[str, Any]:
    """What the losses of a level tell; "ended" is None, "time limit" or "not finite"."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    ended = "not finite" if len(finite) < len(losses) else "time limit" if len(losses) < wanted else None
    return {"iterations": len(finite), "iterations_wanted": wanted, "ended": ended, "loss_first": finite[0] if finite else None,
            "loss_last": finite[-1] if finite else None}
