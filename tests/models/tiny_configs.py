"""Tiny configurations of every architecture that transformers knows, made from the defaults of its own classes."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

RULES: tuple[tuple[str, int], ...] = (  # the first that matches a key's whole name; sizes that fit each other
    (r"bos_token_id", 1), (r"eos_token_id", 2), (r"pad_token_id|padding_idx", 0),
    (r"image_token_(id|index)|media_placeholder_token_id", 3), (r"(video|audio)_token_(id|index)", 4),
    (r"\w+_token_(id|index)|eoi_token\w*", 5),
    (r"\w*vocab_size\w*|\w*_vocab", 96),
    (r"hidden_size_per_layer_input", 8),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|depth|num_blocks", 2),
    (r"(swa_|index_)?(num_attention_heads|n_heads)|n_head|num_heads|\w+_attention_heads|linear_num_value_heads", 4),
    (r"(swa_)?num_key_value_heads|num_global_key_value_heads|num_kv_heads|linear_num_key_heads", 2),
    (r"(swa_|global_|linear_(key_|value_)?)?head_dim|kv_channels|dim_head|v_head_dim|qk_nope_head_dim|rotary_dim", 8),
    (r"qk_rope_head_dim", 8), (r"index_head_dim", 16), (r"qk_head_dim", 16), (r"query_pre_attn_scalar", 8),
    (r"\w*hidden_size|d_model|n_embd|embed_dim|dim|embedding_size|out_hidden_size|projection_dim", 32),
    (r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|n_inner|dff|dim_ff|mlp_dim", 48),
    (r"(moe_)?num_experts|n_routed_experts|num_local_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1), (r"n_group|topk_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"\w+_lora_rank", 8), (r"sliding_window|local_attention|sliding_window_size", 5),
    (r"attention_chunk_size", 5),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length", 128),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 8), (r"mamba_(d_head|head_dim|headdim)", 8),
    (r"mamba_d_state|state_size|ssm_state_size", 8), (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"mamba_chunk_size|chunk_size", 4),
    (r"mamba_d_ssm", 64), (r"mamba_dt_rank|time_step_rank", 4),
    (r"mm_tokens_per_image", 4), (r"image_size", 16), (r"patch_size", 4), (r"num_channels|in_channels", 3),
)  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}}
_MLA = {"num_key_value_heads": 4}  # every head has keys of its own, compressed
ABSENT = object()
KEYS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
                     "kimi_linear", "longcat_flash", "minicpm3", "mistral4", "youtu"), _MLA),
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"window_size": 5, "attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8}, "reformer": {"is_decoder": True},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm4v_text", "glm_ocr_text",
                     "glm46v_text", "paddleocr_vl_text"), _MROPE),
    "glm4v_moe_text": {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "num_hidden_layers": 3,
               "layer_types": ABSENT, "num_mem_blocks": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """The configuration of `model_type` at a few thousand parameters, each kind of layer that it has once."""
    given = tiny_keys(CONFIG_MAPPING[model_type], model_type)
    return AutoConfig.for_model(model_type, **given)


def tiny_keys(kind: Any, model_type: str) -> dict[str, Any]:
    """The keys of a configuration class that decide its size, small."""
    given = {name: size for name in _names(kind) if (size := _small(name)) is not None}
    kinds = _kinds_of_layers(kind)
    if kinds:
        given |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    for name in getattr(kind, "sub_configs", None) or {}:
        sub = getattr(_default(kind), name, None)
        if sub is not None:
            given[name] = {"model_type": sub.model_type, **tiny_keys(type(sub), sub.model_type)}
    given |= KEYS.get(model_type, {})
    return {name: value for name, value in given.items() if value is not ABSENT}


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind) if field.init] if is_dataclass(kind) else []


def _small(name: str) -> int | None:
    return next((size for pattern, size in RULES if re.fullmatch(pattern, name)), None)


@lru_cache
def _default(kind: Any) -> Any:
    try:
        return kind()
    except Exception:
        return None


def _kinds_of_layers(kind: Any) -> list[str]:
    found = getattr(_default(kind), "layer_types", None) or [] if "layer_types" in _names(kind) else []
    return list(dict.fromkeys(found)) * (2 if len(set(found)) == 1 else 1)
