"""FLUX's and SD 3's layers by their original code's names: one layer there is often several in diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

Layer = tuple[str, tuple[Tensor, ...]]
"""A layer's name, and the parts of its weight, which stand one below the other."""

# By group of blocks, the original's and diffusers', the layers; several of diffusers' are joined in one.
_QKV, _ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_TIMES, _TEXTS = "time_text_embed.timestep_embedder.linear_", "time_text_embed.text_embedder.linear_"
_GUIDANCE = "time_text_embed.guidance_embedder.linear_"
_LAST = {"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}
_FLUX = {
    ("", ""): {
        "img_in": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer": f"{_TIMES}1",
        "time_in.out_layer": f"{_TIMES}2", "vector_in.in_layer": f"{_TEXTS}1", "vector_in.out_layer": f"{_TEXTS}2",
        "guidance_in.in_layer": f"{_GUIDANCE}1", "guidance_in.out_layer": f"{_GUIDANCE}2", **_LAST,
    },
    ("double_blocks", "transformer_blocks"): {
        "img_mod.lin": "norm1.linear", "img_attn.qkv": _QKV, "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "txt_mod.lin": "norm1_context.linear",
        "txt_attn.qkv": _ADDED, "txt_attn.proj": "attn.to_add_out", "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
    },
    ("single_blocks", "single_transformer_blocks"): {
        "modulation.lin": "norm.linear", "linear1": f"{_QKV} proj_mlp", "linear2": "proj_out",
    },
}  # fmt: skip
_SD3 = {
    ("", ""): {
        "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "t_embedder.mlp.0": f"{_TIMES}1",
        "t_embedder.mlp.2": f"{_TIMES}2", "y_embedder.mlp.0": f"{_TEXTS}1", "y_embedder.mlp.2": f"{_TEXTS}2", **_LAST,
    },
    ("joint_blocks", "transformer_blocks"): {
        "x_block.adaLN_modulation.1": "norm1.linear", "x_block.attn.qkv": _QKV, "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn2.qkv": _QKV.replace("attn", "attn2"), "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
        "context_block.adaLN_modulation.1": "norm1_context.linear", "context_block.attn.qkv": _ADDED,
        "context_block.attn.proj": "attn.to_add_out", "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
    },
}  # fmt: skip


def original_layers(transformer: Any) -> Iterator[Layer]:
    """The layers of a FLUX or SD 3 transformer by their original names, as `double_blocks.0.img_attn.qkv`."""
    modules = dict(transformer.named_modules())
    for (theirs, ours), layers in (_FLUX if hasattr(transformer, "single_transformer_blocks") else _SD3).items():
        numbers = [f".{number}." for number in range(len(getattr(transformer, ours)))] if ours else [""]
        for number in numbers:
            for name, parts in layers.items():
                found = [f"{ours}{number}{part}" for part in parts.split()]
                if all(part in modules for part in found):  # the last blocks lack some
                    yield f"{theirs}{number}{name}", tuple(w for part in found for w in _as_there(modules, part))


def _as_there(modules: Mapping[str, Any], name: str) -> tuple[Tensor, ...]:
    """A weight in the order of rows that it has there: a last norm's shift comes before its scale."""
    weight: Tensor = modules[name].weight
    norm = modules[name.rpartition(".")[0]] if "." in name else None
    return weight.chunk(2)[::-1] if type(norm).__name__ == "AdaLayerNormContinuous" else (weight,)
