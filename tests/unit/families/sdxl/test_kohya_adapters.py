"""Adapters by kohya's keys make the pipeline that their formulas say, in float64, or are refused by key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefmill.core.errors import InputError
from prefmill.demo.tiny_models import build
from prefmill.families.sdxl.generator import add_adapter
from prefmill.families.sdxl.kohya import DORA_NORM, original_name

PARTS = {"lora_unet": "unet", "lora_te1_text_model": "text_encoder", "lora_te2": "text_encoder_2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdxl", tmp_path_factory.mktemp("sdxl"), 0)


def opened(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def layers(pipeline: Any, original: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Weights by their names in files as sd-scripts writes them: SDXL's UNet by its original code's."""
    for prefix, part in PARTS.items():
        for name, module in getattr(pipeline, part).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                known = original_name(name, 1) if original and part == "unet" else name
                yield f"{prefix}_{str(known).replace('.', '_')}", module.weight


def factors(kind: str, shape: torch.Size, rank: int, draw: Any) -> tuple[dict[str, Tensor], Tensor] | None:
    """An adapter's tensors for a weight of this shape, and its change in float64 at strength 1."""
    out, into, kernel = shape[0], shape[1], tuple(shape[2:])
    ones, flat = (1,) * len(kernel), shape[1:].numel()
    if kind == "lora":
        up, down = draw(out, rank, *ones), draw(rank, into, *kernel)
        change = up.flatten(1).double() @ down.flatten(1).double()
        return {"lora_up.weight": up, "lora_down.weight": down}, change
    if kind == "locon":
        if len(kernel) == 0:
            return None
        down, mid, up = draw(rank, into, 1, 1), draw(rank, rank, *kernel), draw(out, rank, 1, 1)
        # Its own three convolutions, one after the other, on a picture of one pixel for each input channel.
        conv, side = nn.functional.conv2d, kernel[0] // 2
        pixels = nn.functional.pad(torch.eye(into, dtype=torch.float64)[..., None, None], (side,) * 4)
        seen = conv(conv(conv(pixels, down.double()), mid.double(), padding=side), up.double())
        change = seen.transpose(0, 1).flip(2, 3)
        return {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, change
    if kind == "loha":
        named = {"hada_w1_a": draw(out, rank), "hada_w1_b": draw(rank, flat)}
        named |= {"hada_w2_a": draw(out, rank), "hada_w2_b": draw(rank, flat)}
        a, b, c, d = (value.double() for value in named.values())
        return named, (a @ b) * (c @ d)
    small, a, b = draw(2, 2), draw(out // 2, rank), draw(rank, flat // 2)
    if out % 2 or into % 2:
        return None
    blocks = [[small[i, j].double() * (a.double() @ b.double()) for j in range(2)] for i in range(2)]
    return {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b}, torch.cat([torch.cat(row, 1) for row in blocks])


def written(file: Path, pipeline: Any, kind: str, norm: str | None, original: bool = True) -> dict[str, Tensor]:
    """Write an adapter whose rank and alpha differ by layer; the weights that it means, by their names."""
    generator = torch.Generator().manual_seed(0)
    tensors, meant = {}, {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 5

    for number, (name, weight) in enumerate(layers(pipeline, original)):
        rank, alpha = 2 + number % 3, 1.0 + number % 4
        if (made := factors(kind, weight.shape, rank, draw)) is None:
            continue
        given, change = made
        old = weight.detach().double()
        new = old + alpha / rank * change.reshape(old.shape)
        given["alpha"] = torch.tensor(alpha)
        if norm is not None:
            each_row = (-1, *[1] * (old.dim() - 1))
            rows, base_rows = (value.flatten(1).norm(dim=1) for value in (old if norm == "base" else new, old))
            given["dora_scale"] = (base_rows * (1 + draw(len(old)))).float().reshape(each_row)
            new = new * given["dora_scale"].double() / rows.reshape(each_row)
        tensors |= {f"{name}.{factor}": value.contiguous() for factor, value in given.items()}
        meant[name] = new
    save_file(tensors, file, {DORA_NORM: norm} if norm == "base" else None)
    return meant


@pytest.mark.parametrize(
    ("kind", "norm", "original"),
    [
        ("lora", None, True), ("lora", None, False), ("lora", "merged", True), ("lora", "base", True),
        ("locon", None, True), ("loha", None, True), ("loha", "merged", True), ("lokr", None, True),
    ],
)  # fmt: skip
def test_every_layer_becomes_what_its_formula_says(
    folder: Path, tmp_path: Path, kind: str, norm: str | None, original: bool
) -> None:
    pipeline, file = opened(folder), tmp_path / "kohya.safetensors"
    before = {name: weight.detach().clone() for name, weight in layers(pipeline, original)}
    meant = written(file, pipeline, kind, norm, original)
    add_adapter(pipeline, file, 0.5)
    after = dict(layers(pipeline, original))
    assert len(meant) > 10
    for name, weight in after.items():
        expected = (before[name].double() + meant.get(name, before[name].double())) / 2
        assert torch.allclose(weight.double(), expected, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("tool", ["comfyui", "lycoris"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_the_same_adapter_under_other_tools_names(folder: Path, tmp_path: Path, tool: str, kind: str) -> None:
    """ComfyUI saves the modules' own dots, PEFT's names for a pair, and no text encoder below them."""
    pipeline, file = opened(folder), tmp_path / "kohya.safetensors"
    written(file, pipeline, kind, None, tool == "comfyui")
    given = {key: value for key, value in load_file(file).items() if key.startswith("lora_unet_")}
    kinds = nn.Linear | nn.Conv2d
    modules = [original_name(name, 1) for name, module in pipeline.unet.named_modules() if isinstance(module, kinds)]
    dotted = {f"lora_unet_{str(name).replace('.', '_')}": f"diffusion_model.{name}" for name in modules}

    def named(key: str) -> str:
        module, _, factor = key.partition(".")
        if tool == "lycoris":
            return key.replace("lora_unet_", "lycoris_")
        return f"{dotted[module]}.{factor.replace('lora_up', 'lora_B').replace('lora_down', 'lora_A')}"

    both = []
    for name, tensors in (("kohya", given), ("other", {named(key): value for key, value in given.items()})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        add_adapter(pipeline := opened(folder), tmp_path / f"{name}.safetensors", 1.0)
        both.append(pipeline.unet.state_dict())
    assert len(given) > 100
    assert all(torch.equal(value, both[1][key]) for key, value in both[0].items())
    assert any(not torch.equal(value, both[1][key]) for key, value in opened(folder).unet.state_dict().items())


def test_pickles_and_files_that_do_not_say_alpha_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"lora.ckpt[\s\S]*no pickle is opened"):
        add_adapter(opened(folder), tmp_path / "lora.ckpt", 1.0)
    key = "base_model.model.conv_in.lora_A.weight"
    save_file({key: torch.zeros(2, 4, 3, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"PEFT's own keys[\s\S]*conv_in[\s\S]*merge_and_unload"):
        add_adapter(opened(folder), tmp_path / "adapter_model.safetensors", 1.0)


def test_diffusers_alone_would_lose_alphas_and_magnitudes(folder: Path, tmp_path: Path) -> None:
    """The control: why such files are not left to it."""
    pipeline, file = opened(folder), tmp_path / "kohya.safetensors"
    meant = written(file, pipeline, "lora", "merged")
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    wrong = [name for name, weight in layers(pipeline) if not torch.allclose(weight.double(), meant[name], atol=1e-2)]
    assert len(wrong) > len(meant) / 2


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("lora_unet_out_2.oft_blocks", r"another kind[\s\S]*lora_unet_out_2[\s\S]*oft_blocks[\s\S]*merge it"),
        ("lora_unet_out_2.lora_up.weight", r"another kind[\s\S]*lora_down"),
        ("lora_unet_out_2.diff", r"does not fit[\s\S]*lora_unet_out_2[\s\S]*3, 3[\s\S]*base"),
        ("lora_unet_double_blocks_0_img_mlp_0.diff", r"does not fit[\s\S]*double_blocks_0_img_mlp_0[\s\S]*base"),
        ("bundle_emb.cat.clip_l", r"another kind[\s\S]*bundle_emb[\s\S]*merge it"),
        # As LyCORIS writes its train_norm and GLoRA: no fault of the base.
        ("lora_unet_input_blocks_1_0_in_layers_0.w_norm", r"another kind[\s\S]*in_layers_0[\s\S]*w_norm[\s\S]*merge"),
        (
            "lycoris_mid_block_resnets_0_conv1.a1.weight",
            r"another kind[\s\S]*resnets_0_conv1[\s\S]*a1.weight[\s\S]*merge",
        ),
    ],
)
def test_what_has_no_place_or_meaning_is_refused_by_its_key(folder: Path, tmp_path: Path, key: str, told: str) -> None:
    file, good = tmp_path / "kohya.safetensors", torch.zeros(4, 8, 3, 3)
    save_file({"lora_unet_input_blocks_0_0.diff": good.transpose(0, 1).contiguous(), key: torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match=told):
        add_adapter(opened(folder), file, 1.0)


# The layers of FLUX's and SD 3's original code: outputs and inputs, in widths of the tiny ones.
FLUX = {
    "img_in": (32, 64), "txt_in": (32, 32), "time_in.in_layer": (32, 256), "time_in.out_layer": (32, 32),
    "vector_in.in_layer": (32, 32), "vector_in.out_layer": (32, 32), "guidance_in.in_layer": (32, 256),
    "guidance_in.out_layer": (32, 32), "final_layer.linear": (64, 32), "final_layer.adaLN_modulation.1": (64, 32),
    "double_blocks.0.img_mod.lin": (192, 32), "double_blocks.0.txt_mod.lin": (192, 32),
    "double_blocks.0.img_attn.qkv": (96, 32), "double_blocks.0.txt_attn.qkv": (96, 32),
    "double_blocks.0.img_attn.proj": (32, 32), "double_blocks.0.txt_attn.proj": (32, 32),
    "double_blocks.0.img_mlp.0": (128, 32), "double_blocks.0.txt_mlp.0": (128, 32),
    "double_blocks.0.img_mlp.2": (32, 128), "double_blocks.0.txt_mlp.2": (32, 128),
    "single_blocks.0.modulation.lin": (96, 32), "single_blocks.0.linear1": (224, 32),
    "single_blocks.0.linear2": (32, 160),
}  # fmt: skip
SD3 = {
    "context_embedder": (32, 64), "t_embedder.mlp.0": (32, 256), "t_embedder.mlp.2": (32, 32),
    "y_embedder.mlp.0": (32, 64), "y_embedder.mlp.2": (32, 32), "final_layer.linear": (64, 32),
    "final_layer.adaLN_modulation.1": (64, 32),
    "joint_blocks.0.x_block.adaLN_modulation.1": (288, 32), "joint_blocks.0.x_block.attn2.qkv": (96, 32),
    "joint_blocks.0.x_block.attn2.proj": (32, 32), "joint_blocks.0.context_block.adaLN_modulation.1": (192, 32),
    "joint_blocks.0.context_block.attn.proj": (32, 32), "joint_blocks.0.context_block.mlp.fc1": (128, 32),
    "joint_blocks.0.context_block.mlp.fc2": (32, 128), "joint_blocks.1.x_block.adaLN_modulation.1": (192, 32),
    # The last block makes no more of the prompt's states than the picture attends to.
    "joint_blocks.1.context_block.adaLN_modulation.1": (64, 32),
    **{f"joint_blocks.{block}.{layer}": shape for block in (0, 1) for layer, shape in (
        ("x_block.attn.qkv", (96, 32)), ("context_block.attn.qkv", (96, 32)), ("x_block.attn.proj", (32, 32)),
        ("x_block.mlp.fc1", (128, 32)), ("x_block.mlp.fc2", (32, 128)))},
}  # fmt: skip


def converted(name: str, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """diffusers' names for an original file's weights, by diffusers' own conversion of such files."""
    whole = {f"{layer}.weight": value.clone() for layer, value in weights.items()}
    whole |= {f"{layer}.bias": torch.zeros(len(value)) for layer, value in weights.items()}
    norms = ("ln_q.weight", "ln_k.weight") if name == "sd3" else ("norm.query_norm.scale", "norm.key_norm.scale")
    for layer in [layer for layer in weights if layer.endswith((".qkv", ".linear1"))]:
        whole |= {f"{layer.removesuffix('.qkv').removesuffix('.linear1')}.{norm}": torch.ones(8) for norm in norms}
    if name == "sd3":
        whole |= {key: torch.zeros(1) for key in ("pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias")}
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(whole)
    split = torch.split

    def in_proportion(value: Tensor, sizes: Any, dim: int = 0) -> Any:
        """It has the widths of the published FLUX in it."""
        return split(value, [len(value) * size // sum(sizes) for size in sizes], dim=dim)

    with monkeypatch.context() as patched:
        patched.setattr(single_file_utils.torch, "split", in_proportion)
        return single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(whole)


@pytest.mark.parametrize(("name", "shapes"), [("flux_dev", FLUX), ("sd3", SD3)])
@pytest.mark.parametrize("norm", [None, "merged"])
def test_transformers_take_files_by_their_original_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shapes: dict[str, tuple[int, int]], norm: str | None
) -> None:
    """Every layer of the original code, joined or with its rows in another order here, and all text encoders."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(build(name, tmp_path / "model", 0))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    old = {layer: torch.randn(*shape, generator=generator) for layer, shape in shapes.items()}
    own = pipeline.transformer.state_dict()
    theirs = converted(name, old, monkeypatch).items()
    placed = {key: value for key, value in theirs if key in own and value.shape == own[key].shape}
    pipeline.transformer.load_state_dict(placed, strict=False)
    t5 = "text_encoder_2" if name == "flux_dev" else "text_encoder_3"
    texts = {"lora_te1_text_model": pipeline.text_encoder, "lora_te3": getattr(pipeline, t5)}
    if name == "sd3":
        texts["lora_te2_text_model"] = pipeline.text_encoder_2
    others = {f"{prefix}_{key.replace('.', '_')}": module.weight for prefix, model in texts.items()
              for key, module in model.named_modules() if isinstance(module, nn.Linear)}  # fmt: skip
    file, tensors, new = tmp_path / "kohya.safetensors", {}, {}
    weights = {f"lora_unet_{layer.replace('.', '_')}": weight for layer, weight in old.items()} | others
    for module, weight in weights.items():
        up, down = (torch.randn(*shape, generator=generator) / 5 for shape in ((len(weight), 2), (2, weight.shape[1])))
        given = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(3.0)}
        new[module] = weight.detach().double() + 3 / 2 * up.double() @ down.double()
        if norm is not None:
            given["dora_scale"] = 1 + torch.rand(len(weight), 1, generator=generator)
            new[module] *= given["dora_scale"].double() / new[module].norm(dim=1, keepdim=True)
        tensors |= {f"{module}.{factor}": value.contiguous() for factor, value in given.items()}
    save_file(tensors, file)
    add_adapter(pipeline, file, 1.0)
    meant = converted(name, {layer: new[f"lora_unet_{layer.replace('.', '_')}"].float() for layer in old}, monkeypatch)
    after = pipeline.transformer.state_dict()
    assert len(placed) > 40
    for key in placed:
        assert torch.allclose(after[key], meant[key], rtol=1e-4, atol=1e-5), key
    for module, weight in others.items():
        assert torch.allclose(weight.double(), new[module], rtol=1e-4, atol=1e-5), module
