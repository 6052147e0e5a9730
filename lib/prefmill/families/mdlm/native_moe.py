"""Configurations of masked-diffusion mixtures of experts, for modules that transformers has; `native` registers them.

LLaDA-MoE (arXiv 2509.24389) is Qwen3-MoE: query and key norms per head, a softmax router that is not renormalised.
(OLMoE, which it is often likened to, has one norm over all heads.) LLaDA2.x (arXiv 2512.15745) is GLM-4-MoE: half of
a head is rotated, sigmoid scores choose among groups of experts, one expert is shared; its query, key and value are one
matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Qwen3MoeConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from prefmill.families.mdlm.as_published import AsPublished, require_fixed

_LLADA_MOE_FIXED = {
    "qk_layernorm": True, "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False,
    "shared_expert_intermediate_size": None, "partial_rotary_factor": 1.0, "rope_scaling": None, "clip_qkv": None,
    "routed_scaling_factor": 1, "norm_topk_prob": None, "router_num_group": None,
}  # fmt: skip
_LLADA2_FIXED = {
    "use_qk_norm": True, "use_bias": False, "norm_head": False, "score_function": "sigmoid", "rope_scaling": None,
    "use_sliding_window": False, "norm_topk_prob": True, "moe_router_enable_expert_bias": True,
}  # fmt: skip
_LLADA2_NAMES = {
    "model.word_embeddings": "model.embed_tokens",
    ".attention.dense.": ".self_attn.o_proj.",
    ".attention.query_layernorm.": ".self_attn.q_norm.",
    ".attention.key_layernorm.": ".self_attn.k_norm.",
    ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
}


class LladaMoeConfig(AsPublished, Qwen3MoeConfig):
    """LLaDA-MoE's configuration as a Qwen3-MoE's; published under three model types."""

    model_type = "llada_moe"

    @classmethod
    def translate(cls, published: Mapping[str, Any]) -> dict[str, Any]:
        """LLaDA-MoE's keys as Qwen3MoeConfig's; raises InputError for what that cannot do."""
        # False and null mean the same: the router's probabilities are not renormalised.
        require_fixed({**published, "norm_topk_prob": published.get("norm_topk_prob") or None}, _LLADA_MOE_FIXED)
        # Which conversion of weights applies goes by the model type, and this one is published under LLaDA's.
        keys = {key: value for key, value in published.items() if key != "model_type"}
        layers = keys.pop("moe_layer_freq", None) or []
        return {
            **keys,
            "moe_intermediate_size": keys["expert_intermediate_size"],
            "intermediate_size": keys.get("dense_intermediate_size") or keys["expert_intermediate_size"],
            "head_dim": keys["hidden_size"] // keys["num_attention_heads"],
            "mlp_only_layers": [layer for layer, has_experts in enumerate(layers) if not has_experts],
            "norm_topk_prob": False,
        }


class OlderLladaMoeConfig(LladaMoeConfig):
    """The same under another model type."""

    model_type = "lladamoe"


class Llada2Config(AsPublished, Glm4MoeConfig):
    """LLaDA2.x's configuration as a GLM-4-MoE's."""

    model_type = "llada2_moe"
    block_length: ClassVar[int] = 32  # what it was made to write at once (section 3 of the paper); no key of its own

    @classmethod
    def translate(cls, published: Mapping[str, Any]) -> dict[str, Any]:
        """LLaDA2's keys as Glm4MoeConfig's; raises InputError for what that cannot do."""
        require_fixed(published, _LLADA2_FIXED)
        keys = dict(published)
        rope = {"rope_type": "default", "rope_theta": keys.pop("rope_theta", 10_000.0)}
        return {
            **{key: value for key, value in keys.items() if key not in ("rope_scaling", "num_experts")},
            "num_key_value_heads": keys.get("num_key_value_heads") or keys["num_attention_heads"],
            "head_dim": keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"],
            "n_routed_experts": keys["num_experts"],
            "n_shared_experts": keys["num_shared_experts"],
            "attention_bias": keys.get("use_qkv_bias", False),
            "rope_parameters": {**rope, "partial_rotary_factor": keys.get("partial_rotary_factor", 0.5)},
            "use_qk_norm": True,
            "num_nextn_predict_layers": 0,
        }


class SplitHeads(ConversionOps):
    """One matrix of queries, keys and values, whose numbers of heads differ, as three; back by concatenation."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """[(q + 2 kv) x d, H] to [q x d, H] and twice [kv x d, H]."""
        (found,) = input_dict.values()
        whole: Tensor = found[0] if isinstance(found, list) else found
        config = kwargs["config"]
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts = torch.split(whole, [number * config.head_dim for number in heads])
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        """The three in their order."""
        return Concatenate(dim=0)


def _fused(kind: str) -> WeightConverter:
    ours = [f".self_attn.{part}_proj.{kind}" for part in "qkv"]
    return WeightConverter([f".attention.query_key_value.{kind}"], ours, operations=[SplitHeads()])


# Files have weights for each expert, transformers' modules one tensor for all of a layer's.
_EXPERTS = get_checkpoint_conversion_mapping("qwen2_moe")
CONVERSIONS = {
    "llada_moe": _EXPERTS,
    "lladamoe": _EXPERTS,
    "llada2_moe": [
        *(WeightRenaming(theirs, ours) for theirs, ours in _LLADA2_NAMES.items()),
        *map(_fused, ("weight", "bias")),
        *_EXPERTS,
    ],
}
