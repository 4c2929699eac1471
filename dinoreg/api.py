"""Registration from Python in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy.typing as npt

from dinoreg.config import MODALITIES, Config, auto_preset, get_preset
from dinoreg.convert import Image, to_volume
from dinoreg.errors import ConfigError
from dinoreg.jobs import check_images
from dinoreg.registration import Registrar
from dinoreg.result import Registration
from dinoreg.stages import Progress, watched


def register(fixed: Image, moving: Image, *, fixed_mask: Image | None = None, moving_mask: Image | None = None,
             preset: str | Config = "auto", features: str | None = None, modalities: Sequence[str] = ("", ""),
             initial: npt.ArrayLike | None = "auto", weights: str | Path | None = None, device: str = "auto",
             threads: int | None = None, time_limit: float | None = None, max_memory: int | None = None,
             progress: Progress | None = None) -> Registration:
    """Register one pair. For many, make a ``dinoreg.registration.Registrar``, which loads the weights once.

    Args:
        fixed, moving: images of any kind that :func:`dinoreg.convert.to_volume` takes, on any grids.
        fixed_mask, moving_mask: where they count, each on the grid of its image; 0 is outside.
        preset: a name of ``dinoreg.config.PRESETS``, "auto" (by the modalities), or a configuration.
        features: "dinov2+mind", "dinov2" or "mind", in place of the preset's; "mind" needs no weights.
        modalities: of fixed and moving image: "CT", "CBCT", "MR" or "" (unknown, or as the preset says).
        initial: where to start: "auto" (the headers, unless the images say clearly that these are far off: see
            :mod:`dinoreg.align`), None (the headers), or 4x4, RAS mm, fixed point -> moving point, after the headers.
        weights: folder with the encoder's checkpoint; see ``dinoreg.weights.load_encoder``.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads; all if not given.
        time_limit: seconds; when they are over, the refinement ends and the best field so far is the result, with a warning.
        max_memory: bytes that the process may hold; what needs more is refused before it begins.
        progress: called as ``progress(stage, done, total)``, at the beginning and the end of each stage and as it goes on.

    Returns:
        The field and what can be done with it; warnings of the checks are among its warnings.

    Raises:
        ConfigError, InputError, WeightsError, RegistrationError: see ``dinoreg.errors``.
    """
    given = {"fixed": fixed, "moving": moving, "fixed_mask": fixed_mask, "moving_mask": moving_mask}
    names = {role: str(image) if isinstance(image, str | Path) else role.replace("_", " ") for role, image in given.items()}
    volumes = {role: to_volume(image, names[role]) for role, image in given.items()
               if image is not None or role in ("fixed", "moving")}
    config = chosen_config(preset, features, modalities)
    images = check_images(volumes, names, (modalities[0], modalities[1]), config.modalities, initial=kind_of_start(initial))
    registrar = Registrar(config, weights=Path(weights) if weights else None, device=device, threads=threads,
                          time_limit=time_limit, max_memory=max_memory)
    with watched(progress):
        result = registrar.register(images.fixed, images.moving, fixed_mask=images.fixed_mask, moving_mask=images.moving_mask,
                                    modalities=modalities, initial=initial)
    return dataclasses.replace(result, warnings=[*images.warnings, *result.warnings])


def kind_of_start(initial: npt.ArrayLike | None) -> str:
    """"none", "auto" or "given", as the checks of a pair call it (:func:`dinoreg.validate.check_pair`)."""
    if initial is None:
        return "none"
    return "auto" if isinstance(initial, str) and initial == "auto" else "given"


def chosen_config(preset: str | Config, features: str | None, modalities: Sequence[str]) -> Config:
    """The configuration for a pair of images.

    Args:
        preset: a name, "auto" (by the modalities) or a configuration.
        features: in place of the preset's, if given.
        modalities: of fixed and moving image.

    Raises:
        ConfigError: an unknown preset, modality or kind of features.
    """
    if len(modalities) != 2 or any(kind not in MODALITIES for kind in modalities):
        raise ConfigError(f"modalities: expected two of {', '.join(filter(None, MODALITIES))} or '' (unknown), of the fixed and "
                          f"the moving image; got {tuple(modalities)}")
    if isinstance(preset, str):
        preset = get_preset(auto_preset("", modalities) if preset == "auto" else preset)
    return dataclasses.replace(preset, features=features) if features else preset
