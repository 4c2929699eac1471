"""Another frozen encoder: token for token that of the reference, loaded strictly, and good for the whole pipeline."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_pair import QUICK, SHIFT_MM, small_pair
from test_vit import FLOAT32_TOLERANCE, randomise
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEModel

from dinoreg import mae
from dinoreg.config import EncoderConfig
from dinoreg.errors import ConfigError, WeightsError
from dinoreg.mae import MaeSpec, MaskedAutoencoderVit, load_mae, random_mae
from dinoreg.registration import Registrar

SMALL = MaeSpec(dim=48, depth=3, heads=4, patch=16)


@pytest.fixture
def model() -> MaskedAutoencoderVit:
    found = MaskedAutoencoderVit(SMALL).eval()
    randomise(found, 1)
    return found


def reference(model: MaskedAutoencoderVit) -> ViTMAEModel:
    """The encoder of ``transformers`` with the same weights, none of whose patches are masked."""
    spec = model.spec
    other = ViTMAEModel(ViTMAEConfig(hidden_size=spec.dim, num_hidden_layers=spec.depth, num_attention_heads=spec.heads,
                                     intermediate_size=4 * spec.dim, image_size=224, patch_size=spec.patch, mask_ratio=0.0,
                                     layer_norm_eps=1e-6)).eval()
    names = ((r"^cls_token", "embeddings.cls_token"), (r"^pos_embed", "embeddings.position_embeddings"),
             (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^norm\.", "layernorm."),
             (r"^blocks\.", "layers."), (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
             (r"\.attn\.proj\.", ".attention.o_proj."))
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        for pattern, theirs in names:
            name = re.sub(pattern, theirs, name)
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = rows
        else:
            state[name] = value
    other.load_state_dict(state, strict=True)
    return other


def hidden(model: MaskedAutoencoderVit, pixels: Tensor) -> list[Tensor]:
    """States of the reference before the final norm: the input of block 1, then the outputs of all blocks; patches alone."""
    n = (pixels.shape[2] // 16) * (pixels.shape[3] // 16)
    noise = torch.arange(n).float().expand(len(pixels), -1)  # patches stay in order
    found = reference(model)(pixels, noise=noise, interpolate_pos_encoding=True, output_hidden_states=True)
    assert torch.allclose(found.last_hidden_state, model.norm(found.hidden_states[-1]), atol=FLOAT32_TOLERANCE)
    return [state[:, 1:] for state in found.hidden_states]


def image(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 16 * rows, 16 * cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "cols"), [(14, 14), (9, 17), (20, 14)])
def test_tokens_equal_the_reference_one_by_one(model: MaskedAutoencoderVit, rows: int, cols: int) -> None:
    pixels = image(rows, cols)
    with torch.no_grad():
        expected = model.norm(hidden(model, pixels)[-1]).reshape(2, rows, cols, SMALL.dim)
        found = model.patch_tokens(pixels)
    assert found.shape == (2, rows, cols, SMALL.dim)
    assert (found - expected).abs().max() < FLOAT32_TOLERANCE


def test_last_layers_are_concatenated_the_earliest_first(model: MaskedAutoencoderVit) -> None:
    pixels = image(14, 14)
    with torch.no_grad():
        expected = torch.cat([model.norm(state) for state in hidden(model, pixels)[-2:]], dim=-1).reshape(2, 14, 14, -1)
        assert (model.patch_tokens(pixels, last_layers=2) - expected).abs().max() < FLOAT32_TOLERANCE


def test_vit_b_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        sizes = {arch: sum(value.numel() for value in MaskedAutoencoderVit(spec).parameters())
                 for arch, spec in mae.ARCHITECTURES.items()}
    # ViT-B, -L and -H without a classifier, the table of positions among them
    assert sizes == {"mae_vitb16": 85_798_656, "mae_vitl16": 303_301_632, "mae_vith14": 630_764_800}


@pytest.fixture
def checkpoint(model: MaskedAutoencoderVit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(mae.ARCHITECTURES, "small", SMALL)
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_checkpoint_is_loaded_as_it_was_saved(model: MaskedAutoencoderVit, checkpoint: Path) -> None:
    encoder = load_mae("small", checkpoint, sha256(checkpoint))
    pixels = image(3, 4)
    with torch.no_grad():
        assert torch.equal(encoder.patch_tokens(pixels, 1), model.patch_tokens(pixels))
    assert encoder.patch == 16 and encoder.sha256 == sha256(checkpoint) and "mae.pth" in encoder.source


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.pop("norm.bias"), "norm.bias is missing"),
    (lambda state: state.update(mask_token=torch.zeros(1, 1, 8)), "mask_token is unknown"),
    (lambda state: state.update(cls_token=torch.zeros(1, 1, 8)), r"cls_token has shape \(1, 1, 8\)"),
    (lambda state: state.update(cls_token=torch.full((1, 1, 48), torch.nan)), "cls_token has NaN")])
def test_anything_but_its_tensors_is_refused(model: MaskedAutoencoderVit, checkpoint: Path, change: object, message: str) -> None:
    state = dict(model.state_dict())
    change(state)  # type: ignore[operator]
    torch.save({"model": state}, checkpoint)
    with pytest.raises(WeightsError, match=message):
        load_mae("small", checkpoint, sha256(checkpoint))


def test_a_file_of_another_hash_is_not_opened(checkpoint: Path) -> None:
    with pytest.raises(WeightsError, match="not opened"):
        load_mae("small", checkpoint, "0" * 64)
    with pytest.raises(WeightsError, match="check the path"):
        load_mae("small", checkpoint.parent / "gone.pth", "0" * 64)
    checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(WeightsError, match="plain tensors"):
        load_mae("small", checkpoint, sha256(checkpoint))
    with pytest.raises(ConfigError, match="mae_vitb16"):
        load_mae("vitb16", checkpoint, "")


def test_the_pipeline_takes_it_as_it_takes_dinov2(checkpoint: Path) -> None:
    """Untrained, it is yet a projection of patches: most of a shift of 5.4 mm between two grids is found (2.3 mm are left)."""
    fixed, moving = small_pair()
    config = dataclasses.replace(QUICK, features="dinov2", encoder=EncoderConfig(long_side_tokens=24, gap_mm=2.0))
    result = Registrar(config, device="cpu", encoder=random_mae("small", 0)).register(fixed, moving)
    assert result.info["encoder"] == "small, random weights, seed 0"
    mm = np.einsum("ab,bijk->aijk", fixed.affine[:3, :3], result.disp)[:, 6:-6, 6:-6, 6:-6].reshape(3, -1).mean(1)
    assert np.linalg.norm(mm - SHIFT_MM) < 0.6 * np.linalg.norm(SHIFT_MM)
