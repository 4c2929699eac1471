"""Everything that decides a result, as frozen values, and the presets that bundle them.

A configuration is checked when it is made; an unknown key or a value out of range is a ``ConfigError``. The whole of it goes
into the report of a run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dinoreg.errors import ConfigError

FEATURES = ("dinov2", "mind", "dinov2+mind")
MODALITIES = ("CT", "CBCT", "MR", "")
AXES = ("axial", "coronal", "sagittal")
SOLVERS = ("composed", "published")
PLAIN: dict[Any, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}  # annotation -> types


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ConfigError(f"configuration: {what}")


@dataclass(frozen=True)
class IntensityConfig:
    """Grey values to [0, 1], per modality: a window in the image's own units, or percentiles where no window is known."""

    ct_window: tuple[float, float] = (-1000.0, 500.0)  # HU
    cbct_window: tuple[float, float] = (-1000.0, 500.0)  # the same: a CBCT is only roughly calibrated
    percentiles: tuple[float, float] = (0.5, 99.5)  # MR and unknown modalities

    def __post_init__(self) -> None:
        for name in ("ct_window", "cbct_window", "percentiles"):
            low, high = getattr(self, name)
            _require(math.isfinite(low) and math.isfinite(high) and low < high, f"{name} must be (low, high); got {low}, {high}")
        _require(self.percentiles[0] >= 0 and self.percentiles[1] <= 100, "percentiles lie between 0 and 100")


@dataclass(frozen=True)
class EncoderConfig:
    """How a volume becomes tokens."""

    arch: str = "auto"  # a name of dinoreg.vit.ARCHITECTURES; auto: the largest whose checkpoint is there
    last_layers: int = 1  # output of this many last blocks, concatenated
    imagenet_norm: bool = False  # the published code feeds [0, 1] grey values as they are
    long_side_tokens: int = 37  # along the longer side of a slice; 37 (518 px) is what the checkpoints were trained on
    gap_mm: float = 6.0  # distance of encoded slices
    axis: str = "axial"  # normal of the slices, patient axis; all: each of the three, features side by side, three times the time
    crop: bool = True  # encode the body's bounding box alone

    def __post_init__(self) -> None:
        _require(1 <= self.last_layers <= 12, f"encoder.last_layers must be 1..12; got {self.last_layers}")
        _require(4 <= self.long_side_tokens <= 256, f"encoder.long_side_tokens must be 4..256; got {self.long_side_tokens}")
        _require(self.gap_mm > 0, f"encoder.gap_mm must be positive; got {self.gap_mm}")
        _require(self.axis in (*AXES, "all"), f"encoder.axis must be one of {', '.join(AXES)}, all; got {self.axis!r}")


@dataclass(frozen=True)
class PcaConfig:
    """Projection of the tokens of a pair."""

    components: int = 24
    center: bool = True  # subtract the mean token; the published code does not

    def __post_init__(self) -> None:
        _require(1 <= self.components <= 256, f"pca.components must be 1..256; got {self.components}")


@dataclass(frozen=True)
class MindConfig:
    """MIND-SSC, in voxels of the lattice on which it is computed."""

    radius: int = 1
    dilation: int = 1
    weight: float = 1.0  # of its squared differences against those of the encoder, where both are taken

    def __post_init__(self) -> None:
        _require(0 <= self.radius <= 5 and 1 <= self.dilation <= 5, "mind.radius must be 0..5 and mind.dilation 1..5")
        _require(0 < self.weight <= 100, f"mind.weight must lie in (0, 100]; got {self.weight}")


@dataclass(frozen=True)
class DiscreteConfig:
    """The discrete stage, coarse to fine. Lattices are counted in cells along the longest side of the field of view, so that cost
    and relative reach are the same for a hippocampus and for a thorax; they never get finer than the voxels.

    A level is (cells along the longest side of the lattice on which features are compared, how many of these make a cell of the
    field along an axis, largest displacement in cells).
    """

    levels: tuple[tuple[int, int, int], ...] = ((48, 2, 6), (96, 3, 4))  # the first one reaches 1/8 of the longest side
    consistency_iterations: int = 15

    def __post_init__(self) -> None:
        _require(len(self.levels) > 0, "discrete.levels must hold at least one level")
        for cells, pool, reach in self.levels:
            whole = all(isinstance(n, int) for n in (cells, pool, reach))
            _require(whole and 8 <= cells <= 128 and 1 <= pool <= 8 and 1 <= reach <= 12,
                     f"discrete.levels: cells must be 8..128, pool 1..8, reach 1..12; got {(cells, pool, reach)}")
        _require(0 <= self.consistency_iterations <= 100, "discrete.consistency_iterations must be 0..100")


@dataclass(frozen=True)
class RefineConfig:
    """The continuous stage."""

    levels: tuple[tuple[float, int], ...] = ((2, 60), (1, 30))  # (cell in the smallest voxel spacing, iterations)
    max_cells: int = 16_000_000  # of the finest level; where it would have more, the cells of all levels are larger by one factor
    lncc: float = 0.0  # weight of the local cross-correlation of intensities: where modalities match
    features: float = 1.0  # weight of the squared feature difference: where they do not
    information: float = 0.0  # weight of the mutual information of intensities: between CT and MR, beside features
    window: int = 5  # cells, width of the local cross-correlation's window
    rate: float = 0.25  # cells a step
    regularity: float = 1.0  # weight of the diffusion energy against the data term
    anchored: bool = True  # only what is added to the discrete stage's field costs energy: large motion is not pulled back
    step_sigma: float = 2.0  # cells, Gaussian smoothing of a step
    damping: float = 0.05  # in units of the data term a cell: slopes well below it move little

    def __post_init__(self) -> None:
        _require(all(cell >= 0.5 and isinstance(iterations, int) and iterations >= 0 for cell, iterations in self.levels),
                 f"refine.levels: cells must be at least 0.5, iterations whole numbers from 0; got {self.levels}")
        _require(self.max_cells >= 1000, f"refine.max_cells must be at least 1000; got {self.max_cells}")
        weights = (self.lncc, self.features, self.information)
        _require(min(weights) >= 0 and max(weights) > 0,
                 "refine.lncc, refine.features and refine.information must not be negative, and one of them positive")
        _require(self.window >= 3 and self.window % 2 == 1, f"refine.window must be odd and at least 3; got {self.window}")
        _require(0 < self.rate <= 1, f"refine.rate must lie in (0, 1]: longer steps may fold; got {self.rate}")
        _require(self.regularity >= 0 and self.step_sigma >= 0 and self.damping > 0,
                 "refine.regularity and refine.step_sigma must not be negative, refine.damping positive")


@dataclass(frozen=True)
class PublishedConfig:
    """The solver "published" (``dinoreg.published``), in voxels whatever the spacing; for it, ``discrete`` and ``refine`` do not
    count. Defaults are the released numbers."""

    pool: int = 6  # voxels a cell of the discrete stage, along an axis
    half_width: int = 4  # cells: +-24 voxels
    consistency_iterations: int = 15
    iterations: int = 1000  # of Adam, at the voxels
    rate: float = 3.0  # voxels a step
    boxes: int = 5  # passes of a moving average over the field in every iteration,
    box_width: int = 7  # of so many voxels: a Gaussian of sigma 4.5
    regularity: float = 2.0  # weight of the diffusion energy

    def __post_init__(self) -> None:
        _require(1 <= self.pool <= 16 and 1 <= self.half_width <= 8, "published.pool must be 1..16, published.half_width 1..8")
        _require(0 <= self.consistency_iterations <= 100, "published.consistency_iterations must be 0..100")
        _require(self.iterations >= 0 and self.rate > 0, "published.iterations >= 0, published.rate > 0")
        _require(self.boxes >= 0 and self.box_width % 2 == 1, "published.boxes >= 0, published.box_width odd")
        _require(self.regularity >= 0, f"published.regularity must not be negative; got {self.regularity}")


@dataclass(frozen=True)
class QuirksConfig:
    """What the released code does besides its method, by accident or by haste. For the solver "published" alone."""

    # from images to tokens
    all_voxel_percentiles: bool = False  # MR: the 97th percentile is that of all voxels, so it falls with the background's share
    slice_masks: bool = False  # the body is found plane by plane along the third array axis; whole patches inside it count
    token_grid: tuple[int, int] | None = None  # planes of the third array axis, stretched to so many rows x columns of tokens,
    # whatever their aspect, spacing and orientation; None: ``encoder`` decides
    gap_slices: int = 0  # planes between encoded ones, whatever their spacing; 0: ``encoder.gap_mm`` decides
    shifted_last_gap: bool = False  # between the last two encoded slices features lie one slice too far, the last slice's as well
    # from tokens to features
    randomised_pca: bool = False  # a randomised sketch: components of little variance are a matter of chance (here seeded)
    raw_scale: bool = False  # features as they come: coupling and regularity weigh differently for each encoder and pair
    zero_fill: bool = False  # where an image shows nothing its features are zero: the edge of the view looks like anatomy
    # solver
    truncated_pooling: bool = False  # the remainder of a size by ``published.pool`` is cut off, and the field stretched over it
    untied_start: bool = False  # cells without evidence start at the first candidate, the far corner of the search
    zero_border: bool = False  # fields and features are zero beyond the volume: displacements fade within 15 voxels of the border
    short_displacement: bool = False  # displacements are sampled n / (n - 1) too long, so they are found (n - 1) / n too short
    folds_kept: bool = False  # folds stay in the field

    def __post_init__(self) -> None:
        grid = self.token_grid
        _require(grid is None or (len(grid) == 2 and all(isinstance(n, int) and 4 <= n <= 256 for n in grid)),
                 f"quirks.token_grid must be two numbers of 4..256, or None; got {grid}")
        _require(self.gap_slices >= 0, f"quirks.gap_slices must not be negative; got {self.gap_slices}")


@dataclass(frozen=True)
class Config:
    """All of it."""

    preset: str = "generic"
    modalities: tuple[str, str] = ("", "")  # of fixed and moving image, taken where the input does not say
    features: str = "dinov2+mind"
    intensity: IntensityConfig = field(default_factory=IntensityConfig)  # for MIND and LNCC
    encoder_intensity: IntensityConfig = field(default_factory=IntensityConfig)  # what the encoder sees
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    pca: PcaConfig = field(default_factory=PcaConfig)
    mind: MindConfig = field(default_factory=MindConfig)
    discrete: DiscreteConfig = field(default_factory=DiscreteConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    solver: str = "composed"  # or "published", for comparisons
    published: PublishedConfig = field(default_factory=PublishedConfig)
    quirks: QuirksConfig = field(default_factory=QuirksConfig)

    def __post_init__(self) -> None:
        _require(self.features in FEATURES, f"features must be one of {', '.join(FEATURES)}; got {self.features!r}")
        _require(len(self.modalities) == 2 and all(m in MODALITIES for m in self.modalities),
                 f"modalities must be two of {MODALITIES}; got {self.modalities}")
        _require(self.solver in SOLVERS, f"solver must be one of {', '.join(SOLVERS)}; got {self.solver!r}")
        _require(self.solver != "published" or self.encoder.axis != "all", "the solver 'published' sees one view; got all")
        _require(self.solver == "published" or self.quirks == QuirksConfig(), "quirks are those of the solver 'published' alone")

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for reports; ``from_dict`` gives it back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """The configuration of a report.

        Raises:
            ConfigError: unknown keys, missing types or values out of range.
        """
        config: Config = _build(Config, values, "config")
        return config


def _build(kind: Any, values: Any, where: str) -> Any:
    """A (nested) dataclass from a mapping; lists become tuples."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of {kind.__name__}; got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(fields)}")
    arguments = {}
    for name, value in values.items():
        default = fields[name].default_factory
        nested = default is not dataclasses.MISSING and dataclasses.is_dataclass(default)
        arguments[name] = _build(default, value, f"{where}.{name}") if nested else _tuples(value)
        plain = PLAIN.get(fields[name].type)
        if plain and (type(value) not in plain or value in (math.inf, -math.inf)):
            raise ConfigError(f"{where}.{name}: expected {fields[name].type}; got {value!r}")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def modality(text: str) -> str:
    """CT, CBCT or MR out of a data set's own words ("CT (FBCT)", "T1w", "CBCT"); "" if they say none of these."""
    words = re.findall(r"[A-Z0-9]+", text.upper())
    if any(word.startswith(("CBCT", "CONE")) for word in words):
        return "CBCT"
    if any(word in ("CT", "FBCT", "CECT", "LDCT") for word in words):
        return "CT"
    if any(word in ("MR", "MRI", "T1", "T2", "T1W", "T2W", "FLAIR") for word in words):
        return "MR"
    return ""


PRESETS: dict[str, Config] = {
    config.preset: config
    for config in (
        Config("generic"),
        # The window of the encoder is the published one; refinement on intensities, which CT and CBCT share but for scatter. The
        # discrete field of a noisy CBCT is no anchor.
        Config("thorax-cbct", modalities=("CBCT", "CT"), encoder_intensity=IntensityConfig((-1350.0, 150.0), (-1350.0, 150.0)),
               discrete=DiscreteConfig(levels=((48, 2, 6),)),
               refine=RefineConfig(levels=((4, 60), (2, 60), (1, 30)), lncc=1.0, features=0.0, window=3,
                                   anchored=False)),
        # MIND needs no window and loses by a narrow one; the encoder sees soft tissue, as published.
        Config("abdomen-mrct", modalities=("MR", "CT"), intensity=IntensityConfig(ct_window=(-1000.0, 1000.0)),
               encoder_intensity=IntensityConfig(ct_window=(-150.0, 250.0), percentiles=(0.0, 97.0)),
               discrete=DiscreteConfig(levels=((48, 2, 6), (96, 3, 4), (96, 2, 3))), refine=RefineConfig(information=0.4)),
        # Local cross-correlation sees any locally linear relation, an inverted contrast (T1 to T2) too. Folded cortex needs finer
        # steps than organs.
        Config("brain-mr", modalities=("MR", "MR"), discrete=DiscreteConfig(levels=((48, 2, 6),)),
               refine=RefineConfig(levels=((4, 60), (2, 60), (1, 30)), lncc=1.0, features=0.0, anchored=False, regularity=0.5,
                                   step_sigma=1.0)),
        # The released AbdomenMRCT script, made for 192 x 160 x 192 voxels of 2 mm: for comparisons, never chosen by itself.
        Config("published", modalities=("MR", "CT"), features="dinov2", solver="published",
               encoder_intensity=IntensityConfig((-150.0, 250.0), (-1350.0, 150.0), (0.0, 97.0)),
               encoder=EncoderConfig(arch="vitl14_reg4", long_side_tokens=112, crop=False), pca=PcaConfig(center=False),
               quirks=QuirksConfig(all_voxel_percentiles=True, slice_masks=True, token_grid=(112, 96), gap_slices=3,
                                   shifted_last_gap=True, randomised_pca=True, raw_scale=True, zero_fill=True,
                                   truncated_pooling=True, untied_start=True, zero_border=True, short_displacement=True,
                                   folds_kept=True)),
    )
}


def get_preset(name: str) -> Config:
    """A preset by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]


def auto_preset(dataset: str, modalities: Sequence[str]) -> str:
    """The preset for a data set by its name and modalities; "generic" where they say nothing.

    Args:
        dataset: name of the data set, such as "ThoraxCBCT"; may be empty.
        modalities: of its images, as in ``modality``.
    """
    name = dataset.lower()
    kinds = {modality(text) for text in modalities} - {""}
    if "cbct" in name or "oncoreg" in name or "CBCT" in kinds:
        return "thorax-cbct"
    if "mrct" in name or kinds == {"MR", "CT"}:
        return "abdomen-mrct"
    if any(part in name for part in ("brain", "oasis", "lumir", "hippocampus", "ixi")):
        return "brain-mr"
    return "generic"
