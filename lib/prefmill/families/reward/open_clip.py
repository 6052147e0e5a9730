"""CLIP under OpenCLIP's own names, as transformers' CLIPModel."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import unescape
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from prefmill.core.errors import InputError

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
_HEAD_WIDTH = 64  # OpenCLIP's, where a vision configuration names none
# Settings that are followed, or have no part in these towers' outputs.
_READ = {
    "image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout", "context_length",
    "vocab_size", "heads", "hf_tokenizer_name", "tokenizer_kwargs", "pad_id", "eos_id",
}  # fmt: skip
_DEFAULTS = (None, False, "tok", "argmax", "linear", "learnable")  # of the others, where a file spells them out
_OF_A_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
               "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
_AROUND = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    # The misspelling is transformers' own, and part of the names of its published weights.
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}


def as_open_clip_reads(prompt: str) -> str:
    """A prompt before OpenCLIP's tokenizer takes it apart: HTML's names as their signs, curled quotes as plain ones.

    What its ftfy changes besides, such as text in a wrong encoding, stays.
    """
    plain = unescape(unescape(prompt))
    return re.sub("[\u201c-\u201f]", '"', re.sub("[\u02bc\u2018-\u201b]", "'", plain))


def is_open_clip(name: str) -> bool:
    """Whether this is a folder with OpenCLIP's configuration and none of transformers'."""
    return (Path(name) / CONFIG_FILE).is_file() and not (Path(name) / "config.json").is_file()


def load_open_clip(folder: Path, attention: str | None = None) -> CLIPModel:
    """The model of a folder, in fp32; raises InputError for other towers and for weights that do not fit."""
    said = json.loads((folder / CONFIG_FILE).read_bytes())
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            "no safetensors of this OpenCLIP model", where=folder, expected=WEIGHTS_FILE,
            fix="download that file too; a .bin or .pt is a pickle and is not opened",
        )  # fmt: skip
    config = clip_config(said.get("model_cfg", said), folder)
    model = CLIPModel._from_config(config, attn_implementation=attention)
    found = dict(renamed(load_file(folder / WEIGHTS_FILE)))
    # Not strict: torch would list hundreds of names where three say enough.
    missing, unknown = model.load_state_dict({name: value.float() for name, value in found.items()}, strict=False)
    if wrong := sorted({*missing, *unknown}):
        raise InputError(
            "the weights are not those of the configuration", where=folder, got=", ".join(wrong[:3]),
            fix="give the two files of one model; towers other than plain vision and text transformers cannot be used",
        )  # fmt: skip
    return model


def clip_config(said: Mapping[str, Any], folder: Path) -> CLIPConfig:
    """transformers' configuration of an OpenCLIP `model_cfg`."""
    vision, text = said["vision_cfg"], said["text_cfg"]
    # The same weights mean something else under other poolings, masks and activations.
    other = [f"{key}: {value}" for key, value in (*vision.items(), *text.items())
             if key not in _READ and value not in _DEFAULTS]  # fmt: skip
    if other or not isinstance(vision.get("layers"), int):
        raise InputError(
            "not a CLIP of two plain transformers", where=folder / CONFIG_FILE,
            got=", ".join(other) or f"layers: {vision.get('layers')}",
            fix="use one such as ViT-L-14 or ViT-H-14",
        )  # fmt: skip
    act = "quick_gelu" if said.get("quick_gelu") else "gelu"
    width, heads = vision["width"], vision.get("head_width", _HEAD_WIDTH)
    return CLIPConfig(
        projection_dim=said["embed_dim"],
        vision_config={
            "hidden_size": width, "num_hidden_layers": vision["layers"], "num_attention_heads": width // heads,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4)), "patch_size": vision["patch_size"],
            "image_size": vision["image_size"], "hidden_act": act,
        },
        text_config={
            "hidden_size": text["width"], "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4)),
            "vocab_size": text["vocab_size"], "hidden_act": act,
            "max_position_embeddings": text["context_length"],
            "eos_token_id": 2,  # transformers' sign for OpenCLIP's rule: the text is read at its largest token id
        },
    )  # fmt: skip


def renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors under transformers' names: products transposed, query, key and value apart."""
    for name, value in state.items():
        if ".resblocks." in name:
            side = "vision_model" if name.startswith("visual.") else "text_model"
            layer, _, part = name.partition(".resblocks.")[2].partition(".")
            yield from _of_layer(f"{side}.encoder.layers.{layer}", part, value)
        elif name in ("visual.proj", "text_projection"):
            yield f"{'visual' if name == 'visual.proj' else 'text'}_projection.weight", value.T.contiguous()
        elif name != "attn_mask":
            stem, _, kind = name.rpartition(".")
            known = _AROUND.get(name) or (f"{_AROUND[stem]}.{kind}" if stem in _AROUND else name)
            yield known, value


def _of_layer(layer: str, part: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        # torch's MultiheadAttention keeps the three in one matrix, in this order.
        for name, third in zip("qkv", torch.chunk(value, 3), strict=True):
            yield f"{layer}.self_attn.{name}_proj.{kind}", third.contiguous()
    else:
        stem, _, kind = part.rpartition(".")
        yield f"{layer}.{_OF_A_LAYER.get(stem, stem)}.{kind}", value
