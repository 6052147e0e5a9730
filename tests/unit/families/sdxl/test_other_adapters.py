"""Adapters by diffusers' or ComfyUI's names with what diffusers reads in part: used as they say, or refused by key."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prefmill.core.errors import InputError
from prefmill.demo.tiny_models import build
from prefmill.families.sdxl.generator import add_adapter
from prefmill.families.sdxl.kohya import adapted, original_unet_names

PART = {"flux_dev": "transformer", "sd3": "transformer", "sdxl": "unet"}
PAIRS = [("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_A.default", "lora_B.default")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    from diffusers import DiffusionPipeline

    made = cache(lambda name: build(name, tmp_path_factory.mktemp(name), 0))
    return lambda name: DiffusionPipeline.from_pretrained(made(name))  # type: ignore[arg-type]


def effective(layer: Any) -> Tensor:
    """The weight by which a layer maps inputs to outputs, whether its adapter is merged or runs beside it."""
    with torch.no_grad():
        found: Tensor = layer(torch.eye(layer.in_features)) - layer(torch.zeros(1, layer.in_features))
    return found.T


@pytest.mark.parametrize("written", ["diffusers", "kohya"])
@pytest.mark.parametrize(("theirs", "given"), [("sd15", "sdxl"), ("sdxl", "sd15"), ("sdxl", "sd3")])
def test_an_adapter_of_another_base_is_told_to_be_one(
    opened: Callable[[str], Any], tmp_path: Path, theirs: str, given: str, written: str
) -> None:
    """The fix was to download a sound file again, or to merge it with another tool."""
    tensors = {}
    for part in ("unet", "text_encoder"):
        layers = getattr(opened(theirs), part).named_modules()
        for name, module in (
            (name, layer) for name, layer in layers if name.endswith(("attn2.to_k", "self_attn.q_proj"))
        ):
            pair = torch.ones(2, module.in_features), torch.ones(module.out_features, 2)
            prefix = f"{part}.{name}" if written == "diffusers" else f"lora_{part[:4]}_{name}".replace(".", "_")
            prefix = prefix.replace("lora_text_", "lora_te1_text_model_")
            sides = ("lora_A", "lora_B") if written == "diffusers" else ("lora_down", "lora_up")
            tensors |= {f"{prefix}.{side}.weight": value for side, value in zip(sides, pair, strict=True)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"does not fit the pipeline[\s\S]*fix: *give the base that it was trained on"):
        add_adapter(opened(given), tmp_path / "lora.safetensors", 1.0)


@pytest.mark.parametrize(("down", "up"), PAIRS)
@pytest.mark.parametrize("name", PART)
def test_alphas_beside_diffusers_names_count(
    opened: Callable[[str], Any], tmp_path: Path, name: str, down: str, up: str
) -> None:
    """Of FLUX diffusers passes over those beside lora_down: the adapter was rank / alpha times too strong."""
    pipeline, tensors, meant = opened(name), {}, {}
    parts = {PART[name]: "attn", **({"text_encoder": "q_proj", "text_encoder_2": "k_proj"} if name == "sdxl" else {})}
    generator = torch.Generator().manual_seed(0)
    for part, word in parts.items():
        for key, module in getattr(pipeline, part).named_modules():
            if isinstance(module, nn.Linear) and word in key:
                a = torch.randn(2, module.in_features, generator=generator)
                b = torch.randn(module.out_features, 2, generator=generator)
                tensors |= {f"{part}.{key}.{down}.weight": a, f"{part}.{key}.{up}.weight": b}
                tensors[f"{part}.{key}.alpha"] = torch.tensor(0.5)
                meant[part, key] = module.weight.detach().double() + 0.5 / 2 * b.double() @ a.double()
    save_file(tensors, tmp_path / "lora.safetensors")
    add_adapter(pipeline, tmp_path / "lora.safetensors", 1.0)
    assert len(meant) > 4
    for (part, key), weight in meant.items():
        found = effective(getattr(pipeline, part).get_submodule(key))
        assert torch.allclose(found.double(), weight, atol=1e-4), f"{part}.{key}"


@pytest.mark.parametrize("name", PART)
def test_an_adapter_that_a_denoiser_saved_itself(opened: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    """It has no `unet.` before its names, and says alpha in its head."""
    from peft import LoraConfig

    model = getattr(opened(name), PART[name])
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 4}))
    for key, value in model.named_parameters():
        value.data += 0.1 * ("lora_B" in key)
    model.save_lora_adapter(tmp_path)
    meant = {key: effective(layer) for key, layer in model.named_modules() if hasattr(layer, "lora_A")}
    pipeline = opened(name)
    add_adapter(pipeline, tmp_path, 1.0)
    assert len(meant) >= 4
    for key, weight in meant.items():
        assert torch.allclose(effective(getattr(pipeline, PART[name]).get_submodule(key)), weight, atol=1e-5), key


def test_text_encoders_by_comfyuis_names(opened: Callable[[str], Any], tmp_path: Path) -> None:
    """As its node that takes the difference of two models apart saves them, beside `diffusion_model.`"""
    pipeline = opened("sd3")
    places = {
        "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": ("text_encoder", "encoder.layers.0.mlp.fc1"),
        "clip_g.transformer.text_model.encoder.layers.0.mlp.fc2": ("text_encoder_2", "encoder.layers.0.mlp.fc2"),
        "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q":
            ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q"),
    }  # fmt: skip
    tensors, meant = {}, {}
    for name, (part, layer) in places.items():
        [weight] = [
            value for key, value in getattr(pipeline, part).named_parameters() if key.endswith(f"{layer}.weight")
        ]
        tensors[f"text_encoders.{name}.diff"] = change = torch.randn_like(weight)
        meant[weight] = weight.detach() + change
    save_file(tensors, tmp_path / "lora.safetensors")
    add_adapter(pipeline, tmp_path / "lora.safetensors", 1.0)
    assert all(torch.allclose(weight, new) for weight, new in meant.items())


@pytest.mark.parametrize("more", ["diff_b", "w_norm", "weight"])
@pytest.mark.parametrize("name", ["flux_dev", "sdxl"])
def test_what_is_no_factor_of_a_lora_is_refused_by_its_key(
    opened: Callable[[str], Any], tmp_path: Path, name: str, more: str
) -> None:
    """diffusers passes it over in adapters of FLUX; of others it said that the file was damaged."""
    pipeline = opened(name)
    layer = next(key for key, _ in getattr(pipeline, PART[name]).named_modules() if key.endswith("to_q"))
    tensors = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2), more: torch.ones(32)}
    save_file({f"{PART[name]}.{layer}.{key}": value for key, value in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=rf"more than a LoRA[\s\S]*1 other keys, as .*to_q.{more}[\s\S]*merge it"):
        add_adapter(pipeline, tmp_path / "lora.safetensors", 1.0)


def test_one_layer_with_two_kinds_of_adapter_is_refused(opened: Callable[[str], Any], tmp_path: Path) -> None:
    factors = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2), "diff": torch.ones(32, 32)}
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.{key}": value for key, value in factors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"another kind[\s\S]*attn_to_q[\s\S]*diff[\s\S]*lora"):
        add_adapter(opened("flux_dev"), tmp_path / "lora.safetensors", 1.0)


def test_a_unets_layers_have_the_names_of_its_original_code() -> None:
    """By diffusers' own conversion; SD 1.5's first upsampler stands in a block without attention, SDXL's never do."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 32, 32), down_block_types=(down[0], *down), up_block_types=(*up, up[1]),
            layers_per_block=2, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        )  # fmt: skip
    pairs = dict(original_unet_names(unet))
    ends = ("weight", "bias")
    whole = {f"model.diffusion_model.{name}.{end}": f"{ours}.{end}" for name, ours in pairs.items() for end in ends}
    found = convert_ldm_unet_checkpoint(whole, {**unet.config, "layers_per_block": 2})
    kinds = (nn.Linear, nn.Conv2d)
    assert {*pairs.values()} == {name for name, module in unet.named_modules() if isinstance(module, kinds)}
    assert set(found) == set(whole.values())
    assert all(name == ours for name, ours in found.items())
    assert "output_blocks.2.1.conv" in pairs


@pytest.mark.parametrize("half", [False, True])
def test_a_text_encoders_dora_that_is_read_in_part_is_refused(
    opened: Callable[[str], Any], tmp_path: Path, half: bool
) -> None:
    """diffusers' own saver writes it; its magnitudes were those of the base again: an eighth of the change was lost."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    given: dict[str, Any] = {}
    for part, layers in (("unet", ["to_q"]), ("text_encoder", ["q_proj"])):
        model = getattr(opened("sdxl"), part)
        model.add_adapter(LoraConfig(r=2, target_modules=layers, use_dora=True))
        for name, value in model.named_parameters():
            value.data = value.data * 1.2 if "magnitude" in name else value.data + 0.1 * ("lora_B" in name)
        state = get_peft_model_state_dict(model)
        state = {name: value.half() if half else value for name, value in state.items()}
        given[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state) if part != "unet" else state
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "unet", unet_lora_layers=given["unet_lora_layers"])
    add_adapter(opened("sdxl"), tmp_path / "unet", 1.0)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "both", **given)
    with pytest.raises(InputError, match="DoRA's magnitudes do not arrive"):
        add_adapter(opened("sdxl"), tmp_path / "both", 1.0)


def test_lokr_with_a_core_is_the_product_of_its_three_factors() -> None:
    """LyCORIS' use_tucker: torch.kron refuses the strides that einsum leaves, and the file was refused."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (3, 8), "lokr_w2_b": (3, 4), "lokr_t2": (3, 3, 3, 3)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weight = torch.randn(16, 8, 3, 3, generator=generator)
    small, a, b, core = (given[name].double().numpy() for name in shapes)
    large = sum(core[i, j] * a[i][:, None, None, None] * b[j][None, :, None, None] for i in range(3) for j in range(3))
    change = np.empty((16, 8, 3, 3))
    for row in range(2):
        for column in range(2):
            change[8 * row : 8 * row + 8, 4 * column : 4 * column + 4] = small[row, column] * large
    found = adapted(weight, {**given, "alpha": torch.tensor(1.5)}, "merged", 1.0) - weight
    np.testing.assert_allclose(found.numpy(), 1.5 / 3 * change, atol=1e-5)
