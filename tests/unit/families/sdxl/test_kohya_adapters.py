"""Adapters by kohya's keys make the pipeline that their formulas say, in float64, or are refused by key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
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
        ("lora_unet_out_2.oft_blocks", r"another kind or shape[\s\S]*lora_unet_out_2[\s\S]*oft_blocks[\s\S]*merge it"),
        ("lora_unet_out_2.lora_up.weight", r"another kind or shape[\s\S]*lora_down"),
        ("lora_unet_out_2.diff", r"another kind or shape[\s\S]*lora_unet_out_2"),
        ("lora_unet_double_blocks_0_img_mlp_0.diff", r"does not fit[\s\S]*double_blocks_0_img_mlp_0[\s\S]*base"),
        ("bundle_emb.cat.clip_l", r"does not fit[\s\S]*bundle_emb"),
    ],
)
def test_what_has_no_place_or_meaning_is_refused_by_its_key(folder: Path, tmp_path: Path, key: str, told: str) -> None:
    file, good = tmp_path / "kohya.safetensors", torch.zeros(4, 8, 3, 3)
    save_file({"lora_unet_input_blocks_0_0.diff": good.transpose(0, 1).contiguous(), key: torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match=told):
        add_adapter(opened(folder), file, 1.0)
