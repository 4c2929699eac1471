"""The small case: the bundled example at half resolution, as a Learn2Reg folder and as a single pair; and a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

EXAMPLE = Path(__file__).resolve().parents[1] / "input"
PAIR = {"fixed": "ThoraxCBCTexample_0001_0001", "moving": "ThoraxCBCTexample_0001_0000"}
FIELD = "disp_0001_0001_0001_0000.nii.gz"


def write_learn2reg(folder: Path) -> None:
    """Every second voxel of both images and masks of the example, as a Learn2Reg data set."""
    for kind in ("images", "masks"):
        (folder / f"{kind}Tr").mkdir(parents=True)
        for stem in PAIR.values():
            image = nibabel.load(EXAMPLE / f"{kind}Tr" / f"{stem}.nii.gz")  # type: ignore[attr-defined]
            array = np.asarray(image.dataobj)[::2, ::2, ::2]  # type: ignore[attr-defined]
            affine = image.affine @ np.diag([2.0, 2.0, 2.0, 1.0])  # type: ignore[attr-defined]
            nibabel.Nifti1Image(array, affine).to_filename(folder / f"{kind}Tr" / f"{stem}.nii.gz")  # type: ignore[attr-defined]
    (dataset,) = EXAMPLE.glob("*_dataset.json")
    content = json.loads(dataset.read_text(encoding="utf-8"))
    content["tensorImageShape"] = {"0": list(array.shape)}
    (folder / dataset.name).write_text(json.dumps(content), encoding="utf-8")


def write_single(folder: Path, learn2reg: Path) -> None:
    """The same pair as a platform lays out a single one, with the list of its sockets."""
    sockets = []
    for role, stem in PAIR.items():
        for suffix, kind in (("", "images"), ("-mask", "masks")):
            slug = role + suffix
            (folder / "images" / slug).mkdir(parents=True)
            image = SimpleITK.ReadImage(str(learn2reg / f"{kind}Tr" / f"{stem}.nii.gz"))
            for key in image.GetMetaDataKeys():  # of NIfTI; the other format has no place for them, and SimpleITK complains
                image.EraseMetaData(key)
            SimpleITK.WriteImage(image, str(folder / "images" / slug / "a1b2.mha"))
            sockets.append({"interface": {"slug": slug, "relative_path": f"images/{slug}"}})
    (folder / "inputs.json").write_text(json.dumps(sockets), encoding="utf-8")


def write_encoder(folder: Path) -> None:
    """A ViT-S/14 with four registers and seeded random weights, in the Hugging Face layout."""
    import torch
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=384, num_attention_heads=6, image_size=518,
                                                               patch_size=14))
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is made private, and the user in the container is another
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone, and a container runs as somebody else
