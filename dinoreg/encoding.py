"""One volume to tokens, whatever its partner in a pair: what can be computed once and kept.

For cohorts (a cache, or a fixed basis). A volume is shown to the encoder on its own grid, cropped to its own body, in the
orientation of a radiological display. Nothing of the image that it is registered to enters, so its tokens and their moments
hold for every pair it is part of; where the tokens of the moving image lie on the fixed grid is told by both headers
afterwards (``dinoreg.dino``). Only a volume whose axes are turned against the patient's by more than ``MAX_TILT_DEGREES`` is
brought upright first: a slice of another plane shows another anatomy.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from dinoreg.config import Config
from dinoreg.pca import Basis, Moments, project, token_moments
from dinoreg.preprocess import body_mask, grown, on_grid, to_unit_range, valid_region
from dinoreg.slices import PatchEncoder, TokenGrid, volume_tokens
from dinoreg.volume import AXIS_CODES, Volume

MAX_TILT_DEGREES = 10.0
FORM = 1  # of the tokens: to be raised by whoever changes what a volume's tokens are


@dataclass(frozen=True, eq=False)
class EncodedVolume:
    """What the encoder saw of one volume, to be placed on the grid that :func:`upright` gives for it.

    Attributes:
        grid: its tokens; already projected, float32, where a fixed basis is used.
        moments: of the foreground tokens; None where they are projected.
    """

    grid: TokenGrid
    moments: Moments | None

    def project(self, basis: Basis, center: bool, device: torch.device | str) -> EncodedVolume:
        """The same with its tokens in a basis; see :func:`dinoreg.pca.project`."""
        features = project(self.grid.tokens, self.grid.foreground, basis, center, device)
        return EncodedVolume(replace(self.grid, tokens=features), None)


def encode_volume(volume: Volume, mask: Volume | None, modality: str, encoder: PatchEncoder, config: Config, *,
                  device: torch.device | str = "cpu", progress: Callable[[int, int], None] | None = None) -> EncodedVolume:
    """Encode one volume.

    Args:
        volume: the image, finite.
        mask: where it counts, if that is not everywhere; on any grid, 0 is outside.
        modality: "CT", "CBCT", "MR" or "".
        encoder: where slices go.
        config: intensity windows, and how slices are made.
        device: where the moments are computed.
        progress: called after every batch with the number of slices encoded and to be encoded.

    Raises:
        InputError: the image has no contrast.
        RegistrationError: no foreground, or tokens that are not finite.
    """
    grid = upright(volume)
    array = np.asarray(on_grid(volume, grid), dtype=np.float32)
    valid = valid_region(array)
    if mask is not None:
        valid &= grown(np.asarray(on_grid(mask, grid, order=0)) != 0)
    body = body_mask(to_unit_range(array, modality, config.intensity), valid)
    seen = to_unit_range(array, modality, config.encoder_intensity)
    frame = along_patient(grid.orientation, _rounded(grid.spacing))
    tokens = volume_tokens(torch.from_numpy(seen), torch.from_numpy(body), frame, encoder, config.encoder, progress=progress)
    return EncodedVolume(tokens, token_moments(tokens.tokens, tokens.foreground, device))


def encoding_key(volume: Volume, mask: Volume | None, modality: str, encoder: PatchEncoder, config: Config,
                 basis_sha256: str | None = None) -> str:
    """Hash of everything that the tokens of a volume follow from: values, geometry, mask, preprocessing, encoder and its weights.

    Moving a volume as a whole changes nothing: neither its tokens nor the key.

    Args:
        basis_sha256: of the fixed basis in which tokens are kept, if there is one.
    """
    tilted = tilt_degrees(volume) > MAX_TILT_DEGREES
    geometry = volume.affine.tolist() if tilted else [volume.orientation, _rounded(volume.spacing)]
    what = {"form": FORM, "shape": volume.shape, "dtype": volume.array.dtype.str, "geometry": geometry, "modality": modality,
            "intensity": asdict(config.intensity), "encoder_intensity": asdict(config.encoder_intensity),
            "encoder": asdict(config.encoder), "weights": [encoder.arch, encoder.sha256 or encoder.source, encoder.device.type],
            "basis": basis_sha256 and [basis_sha256, config.pca.center]}
    if mask is not None and not mask.same_grid(volume):
        what["mask"] = [mask.shape, mask.affine.tolist(), volume.affine.tolist()]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(volume.array).data)
    if mask is not None:
        digest.update(b"mask")
        digest.update(np.packbits(np.ascontiguousarray(mask.array) != 0).data)
    return digest.hexdigest()


def tilt_degrees(volume: Volume) -> float:
    """The largest angle between an axis of the array and the patient axis that it follows."""
    cosines = np.abs(volume.affine[:3, :3] / volume.spacing)
    along = (cosines[_patient_axis(code)[0], axis] for axis, code in enumerate(volume.orientation))
    return float(np.degrees(np.arccos(np.clip(min(along), 0, 1))))


def same_view(volume: Volume, moved: Volume) -> bool:
    """Whether an affine start leaves what the encoder sees of a volume as it is: then it is encoded by its own header, and its
    tokens hold for every start. A volume that gets another orientation, or is or gets tilted, is encoded as it was moved."""
    straight = max(tilt_degrees(volume), tilt_degrees(moved)) <= MAX_TILT_DEGREES
    return straight and volume.orientation == moved.orientation


def along_patient(orientation: str, spacing: Sequence[float]) -> npt.NDArray[np.float64]:
    """4x4, voxel -> RAS mm, of a grid whose axes point exactly along patient directions such as "LPS"; voxel 0 is at 0."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (code, mm) in enumerate(zip(orientation, spacing, strict=True)):
        row, sign = _patient_axis(code)
        affine[row, axis] = sign * mm
    return affine


def upright(volume: Volume) -> Volume:
    """The grid on which a volume is encoded: its own, or where it is tilted, an empty one along the patient's axes that holds it,
    with the volume's spacing and the nearest order and direction of its axes."""
    if tilt_degrees(volume) <= MAX_TILT_DEGREES:
        return volume
    affine = along_patient(volume.orientation, volume.spacing)
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in volume.shape)))) @ volume.affine[:3, :3].T
    local = np.linalg.solve(affine[:3, :3], (corners + volume.affine[:3, 3]).T)  # (3, 8), voxels of the new grid
    low, high = local.min(1), local.max(1)
    shape = np.maximum(1, np.ceil(high - low - 1e-6)).astype(int)
    affine[:3, 3] = affine[:3, :3] @ ((low + high - shape + 1) / 2)
    return Volume(np.broadcast_to(np.float32(0), tuple(shape)), affine)


def _patient_axis(code: str) -> tuple[int, int]:
    """The RAS axis of a direction such as "L", and -1 where it runs against it."""
    row = next(row for row, pair in enumerate(AXIS_CODES) if code in pair)
    return row, 1 if AXIS_CODES[row][1] == code else -1


def _rounded(spacing: Sequence[float]) -> list[float]:
    """To five digits: what headers of one scanner, or a rotation, change beyond that is no other geometry."""
    return [float(f"{mm:.5g}") for mm in spacing]
