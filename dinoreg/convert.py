"""Images of other libraries in and out: numpy, SimpleITK, nibabel, and paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias, cast

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from dinoreg.errors import InputError
from dinoreg.io import from_itk, read_volume, to_itk
from dinoreg.volume import Volume

Image: TypeAlias = Any  # Volume, numpy array, sitk.Image, nibabel image, str or Path; the last two are files or DICOM folders


def to_volume(image: Image, name: str = "image") -> Volume:
    """An image of any kind as a volume; its array may be shared.

    Args:
        image: a ``Volume``, a path, a SimpleITK or nibabel image, or a numpy array (i, j, k). An array has no header: it lies on
            a grid of 1 mm, axes to the right, front and head; for another one give ``Volume(array, affine)``.
        name: what messages call it.

    Raises:
        InputError: another type, not 3D, not of numbers, or a file that cannot be read.
    """
    if isinstance(image, str | Path):
        return read_volume(Path(image))
    if isinstance(image, Volume):
        array, affine = image.array, image.affine
    elif isinstance(image, np.ndarray):
        array, affine = image, np.eye(4)
    elif isinstance(image, sitk.Image):
        array, affine = from_itk(image)
    elif isinstance(image, nib.spatialimages.SpatialImage):
        array, affine = np.asanyarray(image.dataobj), np.asarray(image.affine, dtype=np.float64)
    else:
        raise InputError(f"{name}: expected a numpy array, a SimpleITK or nibabel image, a dinoreg.Volume or a path; got "
                         f"{type(image).__name__}")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name}: expected one number a voxel; got values of type {array.dtype}; extract one channel")
    if array.ndim > 3 and all(n == 1 for n in array.shape[3:]):
        array = array.reshape(array.shape[:3])
    if array.ndim != 3:
        raise InputError(f"{name}: expected a 3D image; got shape {array.shape}; extract one 3D volume")
    if array.dtype == bool and not isinstance(image, Volume):  # which no file format holds; a volume is taken as it is
        array = array.astype(np.uint8)
    elif array.dtype == np.float16:  # which scipy cannot interpolate
        array = array.astype(np.float32)
    return Volume(array, affine)


def like(image: Image, volume: Volume) -> Any:
    """The volume as the kind of thing that ``image`` is; a ``Volume`` for a path."""
    if isinstance(image, np.ndarray):
        return volume.array
    if isinstance(image, sitk.Image):
        return to_itk(volume)
    if isinstance(image, nib.spatialimages.SpatialImage):
        array = cast(Any, volume.array)
        return nib.Nifti1Image(array, volume.affine, dtype=array.dtype)
    return volume
