"""The transformer: token for token that of the reference implementation, at and off the native grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from dinoreg.errors import ConfigError
from dinoreg.vit import ARCHITECTURES, NATIVE_GRID, VisionTransformer, VitSpec, build_vit

# float32 rounding through 12 blocks, tokens of order 1 after the final LayerNorm; a wrong epsilon, GELU, key order or
# position shows at 1e-3 and above.
FLOAT32_TOLERANCE = 3e-5


def randomise(model: VisionTransformer, seed: int) -> None:
    """Weights with every part far from its neutral value, so that nothing can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight")):
            parameter.data = 1 + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.2 * noise
        elif name in ("pos_embed", "cls_token", "register_tokens"):
            parameter.data = 0.5 * noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5


def reference(model: VisionTransformer) -> torch.nn.Module:
    """The model of ``transformers`` with the same weights, filled attribute by attribute."""
    spec = model.spec
    sizes = {"hidden_size": spec.dim, "num_hidden_layers": spec.depth, "num_attention_heads": spec.heads, "image_size": 518,
             "patch_size": 14, "use_swiglu_ffn": spec.swiglu}
    other = (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=spec.registers, **sizes)) if spec.registers
             else Dinov2Model(Dinov2Config(**sizes)))
    other.eval().requires_grad_(False)

    def copy(target: torch.nn.Module, source: torch.nn.Module) -> None:
        target.load_state_dict(source.state_dict(), strict=True)

    embeddings = other.embeddings
    embeddings.cls_token.data = model.cls_token.data
    embeddings.position_embeddings.data = model.pos_embed.data
    copy(embeddings.patch_embeddings.projection, model.patch_embed.proj)
    if spec.registers:
        embeddings.register_tokens.data = model.register_tokens.data
    copy(other.layernorm, model.norm)
    for theirs, ours in zip(other.encoder.layer, model.blocks, strict=True):
        copy(theirs.norm1, ours.norm1)
        copy(theirs.norm2, ours.norm2)
        for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = slice(number * spec.dim, (number + 1) * spec.dim)
            getattr(theirs.attention, part).weight.data = ours.attn.qkv.weight.data[rows]
            getattr(theirs.attention, part).bias.data = ours.attn.qkv.bias.data[rows]
        copy(theirs.attention.o_proj, ours.attn.proj)
        theirs.layer_scale1.lambda1.data = ours.ls1.gamma.data
        theirs.layer_scale2.lambda1.data = ours.ls2.gamma.data
        if spec.swiglu:
            half = ours.mlp.w3.in_features
            theirs.mlp.gate_proj.weight.data, theirs.mlp.up_proj.weight.data = ours.mlp.w12.weight.data.split(half)
            theirs.mlp.gate_proj.bias.data, theirs.mlp.up_proj.bias.data = ours.mlp.w12.bias.data.split(half)
            copy(theirs.mlp.down_proj, ours.mlp.w3)
        else:
            copy(theirs.mlp.fc1, ours.mlp.fc1)
            copy(theirs.mlp.fc2, ours.mlp.fc2)
    return other


def image(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 14 * rows, 14 * cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ["vits14", "vits14_reg4"])
def test_vit_s_equals_the_reference_token_by_token_at_the_native_grid(arch: str) -> None:
    model = build_vit(arch)
    randomise(model, 1)
    pixels = image(NATIVE_GRID, NATIVE_GRID)
    with torch.no_grad():
        expected = reference(model)(pixels).last_hidden_state
        found = model(pixels)
    assert found.shape == (1, 1 + model.spec.registers + NATIVE_GRID**2, 384)
    assert (found - expected).abs().max() < FLOAT32_TOLERANCE


@pytest.mark.parametrize("registers", [0, 4])
def test_swiglu_model_equals_the_reference(registers: int) -> None:
    model = VisionTransformer(VitSpec(dim=96, depth=3, heads=6, registers=registers, swiglu=True)).eval()
    randomise(model, 2)
    pixels = image(NATIVE_GRID, NATIVE_GRID, 3)
    with torch.no_grad():
        assert (model(pixels) - reference(model)(pixels).last_hidden_state).abs().max() < FLOAT32_TOLERANCE


def test_last_layers_are_the_last_hidden_states_each_after_the_final_norm() -> None:
    model = VisionTransformer(VitSpec(dim=48, depth=5, heads=3, registers=4)).eval()
    randomise(model, 4)
    pixels = image(NATIVE_GRID, NATIVE_GRID, 5)
    with torch.no_grad():
        states = reference(model)(pixels, output_hidden_states=True).hidden_states  # input of block 1, then outputs of 1..5
        expected = torch.cat([model.norm(state) for state in states[-4:]], dim=-1)
        assert (model(pixels, last_layers=4) - expected).abs().max() < FLOAT32_TOLERANCE


@pytest.mark.parametrize(("rows", "cols"), [(5, 9), (37, 20), (64, 48)])
def test_registers_model_equals_the_reference_at_other_sizes(rows: int, cols: int) -> None:
    """For the register models transformers follows the official rule (by size, antialiased), so it is an oracle here too."""
    model = VisionTransformer(VitSpec(dim=24, depth=2, heads=2, registers=4)).eval()
    randomise(model, 6)
    pixels = image(rows, cols, 7)
    with torch.no_grad():
        assert (model(pixels) - reference(model)(pixels).last_hidden_state).abs().max() < FLOAT32_TOLERANCE


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def plain_weights(size: int) -> np.ndarray:
    """Rule of the models without registers: kernel a = -3/4 at (x + 1/2) 37 / (size + 0.1) - 1/2, borders replicated."""
    weights = np.zeros((size, NATIVE_GRID))
    for x in range(size):
        centre = (x + 0.5) * NATIVE_GRID / (size + 0.1) - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[x, min(max(tap, 0), NATIVE_GRID - 1)] += cubic(np.array(centre - tap), -0.75)
    return weights


def antialiased_weights(size: int) -> np.ndarray:
    """Rule of the models with registers: kernel a = -1/2, as wide as a target cell if that is wider, cut at the borders."""
    scale = NATIVE_GRID / size
    centres = (np.arange(size) + 0.5) * scale - 0.5
    weights = cubic((np.arange(NATIVE_GRID) - centres[:, None]) / max(scale, 1.0), -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("rows", "cols"), [(37, 36), (16, 16), (7, 50), (64, 49)])
@pytest.mark.parametrize("registers", [0, 4])
def test_position_table_is_resized_by_the_official_rule(registers: int, rows: int, cols: int) -> None:
    model = VisionTransformer(VitSpec(dim=8, depth=1, heads=1, registers=registers)).eval()
    randomise(model, 8)
    table = model.pos_embed.detach()[0, 1:].double().numpy().reshape(NATIVE_GRID, NATIVE_GRID, 8)
    weights = antialiased_weights if registers else plain_weights
    expected = np.einsum("ra,cb,abd->rcd", weights(rows), weights(cols), table).reshape(-1, 8)
    with torch.no_grad():
        found = model.position_embedding(rows, cols)[0].numpy()
    assert np.array_equal(found[0], model.pos_embed.detach().numpy()[0, 0])
    # float32 coordinates and sums of 16 or more products of order 1; the 0.1 offset left out shows at 1e-2 and above.
    np.testing.assert_allclose(found[1:], expected, atol=2e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_patch_tokens_leave_out_class_and_register_tokens(registers: int) -> None:
    """The published forks left the registers in, which shifts the token grid by four."""
    model = VisionTransformer(VitSpec(dim=16, depth=1, heads=2, registers=registers)).eval()
    randomise(model, 9)
    pixels = image(3, 5)
    with torch.no_grad():
        grid, everything = model.patch_tokens(pixels), model(pixels)
    assert grid.shape == (1, 3, 5, 16)
    assert torch.equal(grid.reshape(1, 15, 16), everything[:, 1 + registers :])
    changed = pixels.clone()
    changed[:, :, 14:28, 28:42] = 0  # the patch at row 1, column 2
    with torch.no_grad():
        moved = (model.patch_tokens(changed) - grid).abs().amax(-1)[0]
    assert moved.argmax() == 1 * 5 + 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parameter_count_is_that_of_the_published_checkpoint(arch: str) -> None:
    """4 bytes a parameter and a container of at most 0.4 % around them: the sizes of the published files."""
    published = {"vits14": 88283115, "vits14_reg4": 88291785, "vitb14": 346378731, "vitb14_reg4": 346393545,
                 "vitl14": 1217586395, "vitl14_reg4": 1217607321, "vitg14": 4546108579, "vitg14_reg4": 4546140349}
    bytes_of_parameters = 4 * sum(value.numel() for value in build_vit(arch, "meta").state_dict().values())
    assert 0 < published[arch] - bytes_of_parameters < 0.004 * published[arch]


def test_unknown_architecture_is_refused_with_the_list_of_names() -> None:
    with pytest.raises(ConfigError, match=r"vits16.*vitl14_reg4"):
        build_vit("vits16")
