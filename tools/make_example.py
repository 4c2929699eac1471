"""Makes the bundled example: a procedural chest CT and cone-beam CT in Learn2Reg layout, with the motion between them known.

    python tools/make_example.py [FOLDER]          (default: test/input)

The moving image is the phantom's CT in inspiration. The fixed image is the same anatomy after breathing out: a smooth stationary
velocity field (breathing, smooth random motion, a set-up error) is integrated to a diffeomorphism, the anatomy is pulled through
it in three phases of breathing, averaged, and degraded as cone-beam CT is (scatter, streaks, noise, shifted grey values, a short
cylinder of view). Landmarks are forks of the lungs' vessel trees, carried by the same motion. One seed: two runs write the same
bytes.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import phantom
from phantom import AFFINE, LABELS, MARGIN, SHAPE, SPACING
from scipy import ndimage

NAME = "ThoraxCBCTexample"
SEED = 14
FIXED, MOVING = "0001_0001", "0001_0000"
FIELD_OF_VIEW = (128.0, 105.0)  # radius and half height of the cone-beam CT's cylinder, mm
BREATHING = 15.0  # mm that the diaphragm travels at most
SIGNS = np.sign(np.diag(AFFINE)[:3])  # direction of the array axes in the patient
SQUARINGS = 6


def patient_axes() -> list[np.ndarray]:
    """Patient coordinates (mm) of the image's voxels along the three axes, shaped to broadcast."""
    return [(AFFINE[axis, axis] * np.arange(n) + AFFINE[axis, 3]).reshape([-1 if other == axis else 1 for other in range(3)])
            for axis, n in enumerate(SHAPE)]


def ramp(values: np.ndarray, start: float, end: float) -> np.ndarray:
    """0 at ``start``, 1 at ``end``, smooth between."""
    t = np.clip((values - start) / (end - start), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def velocities(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Velocity (voxels along the array axes) from the expiration to the inspiration state: breathing alone, and all motion."""
    x, y, z = patient_axes()
    half_width, half_depth = phantom.cavity_radii(z)
    cavity = np.sqrt((x / np.maximum(half_width, 20)) ** 2 + ((y + 6) / np.maximum(half_depth, 20)) ** 2)
    inside = 1 - ramp(cavity, 0.72, 1.22)
    beside_spine = 1 - 0.6 * np.exp(-(x / 34) ** 2) * (1 - ramp(y, -75, -10))
    breathing = np.zeros((3, *SHAPE))
    breathing[2] = -BREATHING * ramp(z, 88, -45) * inside * beside_spine
    breathing[1] = 4.5 * ramp(y, -60, 90) * ramp(z, 110, 20)
    breathing[0] = 2.5 * np.tanh(x / 60) * ramp(-z, 100, -10) * ramp(np.abs(x), 0, 90)
    other = np.stack([ndimage.gaussian_filter(rng.standard_normal(SHAPE), 8.0) for _ in range(3)])
    other *= 1.6 / other.std()
    angle = np.radians(1.2)  # set-up error: a small turn of the body and a shift of the table
    other += np.stack(np.broadcast_arrays(-angle * y + 2.0 + 0 * z, angle * x - 2.5 + 0 * z, 2.0 + 0 * (x + y + z)))
    to_voxels = (SIGNS / SPACING).reshape(3, 1, 1, 1)
    return breathing * to_voxels, (breathing + other) * to_voxels


def sample(volume: np.ndarray, points: np.ndarray, order: int = 1) -> np.ndarray:
    """Values of (i, j, k) at points (3, ...), the edge continued."""
    return ndimage.map_coordinates(volume, points, order=order, mode="nearest")


def integrate(velocity: np.ndarray) -> np.ndarray:
    """Displacement (3, i, j, k) after unit time along a stationary velocity: scaling and squaring."""
    grid = np.indices(SHAPE, dtype=np.float64)
    disp = velocity / 2 ** SQUARINGS
    for _ in range(SQUARINGS):
        disp = disp + np.stack([sample(component, grid + disp) for component in disp])
    return disp


def refine(disp: np.ndarray) -> np.ndarray:
    """The displacement between the voxels too: (3, i, j, k) -> (3, 2i-1, 2j-1, 2k-1), still in image voxels."""
    for axis in (1, 2, 3):
        disp = np.moveaxis(disp, axis, 0)
        fine = np.empty((2 * len(disp) - 1, *disp.shape[1:]), dtype=np.float32)
        fine[::2], fine[1::2] = disp, (disp[1:] + disp[:-1]) / 2
        disp = np.moveaxis(fine, 0, axis)
    return disp


def to_image(fine: np.ndarray) -> np.ndarray:
    """Image voxels from twice finer samples: each collects its neighbourhood with weights 1/4, 1/2, 1/4 along each axis."""
    for axis in range(3):
        fine = np.moveaxis(fine, axis, 0)
        shares = np.concatenate([fine[:1], fine, fine[-1:]])
        fine = np.moveaxis(shares[:-2:2] / 4 + shares[1:-1:2] / 2 + shares[2::2] / 4, 0, axis)
    return fine


def cone_beam(rng: np.random.Generator, hu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What cone-beam CT makes of grey values: image and its field of view (bool)."""
    x, y, z = patient_axes()
    radius = np.sqrt(x ** 2 + y ** 2) + 0 * z
    in_view = (radius < FIELD_OF_VIEW[0]) & (np.abs(z) < FIELD_OF_VIEW[1])
    image = ndimage.gaussian_filter(hu, 0.45)
    image = -1000 + 0.9 * (image + 1000) + 25
    image -= 70 * np.exp(-(x / 95) ** 2 - ((y + 5) / 70) ** 2) * ramp(image, -1000, 0)  # scatter: a dark middle
    shading = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 14.0)
    image += 22 * shading / shading.std()
    for height in range(SHAPE[2]):  # streaks of a moving heart, of few projections
        for _ in range(9):
            angle, offset = rng.uniform(0, np.pi), rng.normal(0, 30)
            line = (x[:, :, 0] + 20) * np.cos(angle) + y[:, :, 0] * np.sin(angle) - offset
            image[:, :, height] += rng.normal(0, 24) * np.exp(-(line / 2.6) ** 2)
    rings = ndimage.gaussian_filter1d(rng.standard_normal(120), 0.7)
    image += 9 * np.interp(radius, np.arange(120) * 1.5, rings)
    noise = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 0.5)
    image += 30 * noise / noise.std() * (0.7 + 0.5 * np.exp(-(radius / 80) ** 2))
    return np.where(in_view, image, -1000.0), in_view


def landmarks(disp: np.ndarray, points_mm: np.ndarray, in_view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of points in the fixed and the moving image, (n, 3) voxels, at least 9 mm apart and well inside the field of view."""
    moving = (points_mm - AFFINE[:3, 3]) / np.diag(AFFINE)[:3]
    fixed = moving.copy()
    for _ in range(60):  # solves fixed + disp(fixed) = moving
        fixed = moving - np.stack([sample(component, fixed.T) for component in disp], axis=1)
    residual = np.abs(fixed + np.stack([sample(component, fixed.T) for component in disp], axis=1) - moving).max(axis=1)
    deep = ndimage.distance_transform_edt(in_view)
    kept: list[int] = []
    for n in np.flatnonzero((residual < 1e-3) & (sample(deep, fixed.T) > 3)):
        if all(np.linalg.norm(fixed[n] - fixed[m]) * SPACING >= 9 for m in kept):
            kept.append(int(n))
    return fixed[kept], moving[kept]


def write_nifti(path: Path, array: np.ndarray) -> None:
    """A .nii.gz without a time stamp, so that equal arrays are equal files."""
    image = nib.Nifti1Image(array, AFFINE)
    image.header.set_xyzt_units("mm")
    write_gzip(path, image.to_bytes())


def write_gzip(path: Path, content: bytes) -> None:
    """Compressed content at the highest level, no name and no time in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as stream:
        stream.write(content)


def describe() -> dict[str, object]:
    """The data set's JSON."""
    files = {"image": "imagesTr/{}.nii.gz", "label": "labelsTr/{}.nii.gz", "mask": "masksTr/{}.nii.gz",
             "keypoints": "keypointsTr/{}.csv"}
    cases = [{kind: "./" + name.format(f"{NAME}_{case}") for kind, name in files.items()} for case in (MOVING, FIXED)]
    return {
        "name": NAME, "release": "1.0", "licence": "Apache-2.0", "reference": "tools/make_example.py",
        "description": "Procedural chest phantom: CT in inspiration (moving), cone-beam CT in expiration (fixed). No patient.",
        "pairings": "paired", "modality": {"0": "CT", "1": "CBCT"}, "labels": {str(n): text for n, text in LABELS.items()},
        "tensorImageShape": {"0": list(SHAPE)}, "tensorImageSize": {"0": "3D"}, "file_ending": ".nii.gz", "numTraining": 2,
        "training": cases, "numTest": 0, "test": [], "numPairedTraining": 0, "training_paired_images": [],
        "numRegistration_val": 1, "registration_val": [{"fixed": cases[1]["image"], "moving": cases[0]["image"]}],
        "numRegistration_test": 0, "registration_test": [],
    }


def main(folder: Path) -> None:
    """Write the data set into ``folder``."""
    rng = np.random.default_rng(SEED)
    canvas, body, forks = phantom.draw_anatomy(rng)
    breathing, motion = velocities(rng)
    disp = integrate(motion)

    inner = (slice(2 * MARGIN, -2 * MARGIN),) * 3
    moving = to_image(canvas.hu[inner])
    x, y, _ = patient_axes()
    couch = np.exp(-((y + 129 - (x / 60) ** 2) / 3) ** 4) * (np.abs(x) < 158)
    moving = np.maximum(moving, -1000 + 560 * couch) + rng.normal(0, 8, SHAPE)

    grid = np.indices([2 * n - 1 for n in SHAPE], dtype=np.float32) / 2  # in image voxels
    fine_disp, fine_breathing = refine(disp), refine(breathing)
    phases = [sample(canvas.hu, 2 * (grid + fine_disp + share * fine_breathing + MARGIN)) for share in (-0.13, 0.0, 0.13)]
    fixed, in_view = cone_beam(rng, to_image(np.mean(phases, axis=0)))

    centres = 2 * (np.indices(SHAPE) + disp + MARGIN)
    labels = {MOVING: canvas.labels[inner][::2, ::2, ::2], FIXED: sample(canvas.labels, centres, order=0) * in_view}
    masks = {MOVING: body[inner][::2, ::2, ::2], FIXED: (sample(body.astype(np.uint8), centres, order=0) > 0) & in_view}
    points = dict(zip((FIXED, MOVING), landmarks(disp, forks, in_view), strict=True))
    for case, image in ((MOVING, moving), (FIXED, fixed)):
        write_nifti(folder / "imagesTr" / f"{NAME}_{case}.nii.gz", np.rint(image.clip(-1024, 3071)).astype(np.int16))
        write_nifti(folder / "labelsTr" / f"{NAME}_{case}.nii.gz", labels[case].astype(np.uint8))
        write_nifti(folder / "masksTr" / f"{NAME}_{case}.nii.gz", masks[case].astype(np.uint8))
        (folder / "keypointsTr").mkdir(exist_ok=True)
        np.savetxt(folder / "keypointsTr" / f"{NAME}_{case}.csv", points[case], fmt="%.3f", delimiter=",")
    (folder / "gt_dispTr").mkdir(exist_ok=True)
    half = (np.rint(disp[:, ::2, ::2, ::2] * 128) / 128).transpose(1, 2, 3, 0).astype(np.float16)  # good to 0.004 voxel
    np.savez_compressed(folder / "gt_dispTr" / f"disp_{FIXED}_{MOVING}.npz", disp_stride2=half)
    (folder / f"{NAME}_dataset.json").write_text(json.dumps(describe(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "test" / "input")
