"""Masked-diffusion models as modules that transformers has: LLaDA is Llama, Dream is Qwen2, both attending both ways.

Nobody's code runs: their configurations and weight names are read into transformers' own classes, and written back as
they came, so that the published code and tools that serve these models load the finished folder. Importing this module
makes transformers' Auto classes know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from prefmill.families.mdlm.as_published import AsPublished, require_fixed
from prefmill.families.mdlm.native_moe import CONVERSIONS, Llada2Config, LladaMoeConfig, OlderLladaMoeConfig

# What LLaDA calls each key of LlamaConfig (its configuration descends from OLMo's).
_LLADA_KEYS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "vocab_size": "embedding_size",
    "max_position_embeddings": "max_sequence_length",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "weight_tying",
    "attention_bias": "include_qkv_bias",
    "hidden_act": "activation_type",
}
# What its code could also do and Llama does not: a model that asks for it is refused, not read as something else.
_LLADA_FIXED = {
    "block_type": "llama", "layer_norm_type": "rms", "rope": True, "alibi": False, "include_bias": False,
    "bias_for_layer_norm": False, "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
    "multi_query_attention": None, "block_group_size": 1,
}  # fmt: skip
# In this order: the head is called as each block's last projection is. A name that is ours already stays: PEFT renames
# those of an adapter as well, and left weights out that it no longer found a place for.
_LLADA_NAMES = {
    "model.transformer.ff_out": "lm_head",
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.blocks": "model.layers",
    ".attn_norm.": ".input_layernorm.",
    "(?<!self_attn).q_proj.": ".self_attn.q_proj.",
    "(?<!self_attn).k_proj.": ".self_attn.k_proj.",
    "(?<!self_attn).v_proj.": ".self_attn.v_proj.",
    ".attn_out.": ".self_attn.o_proj.",
    ".ff_norm.": ".post_attention_layernorm.",
    ".ff_proj.": ".mlp.gate_proj.",
    "(?<!mlp).up_proj.": ".mlp.up_proj.",
    ".ff_out.": ".mlp.down_proj.",
}
_IDS = ("pad_token_id", "eos_token_id", "bos_token_id")


class LladaConfig(AsPublished, LlamaConfig):
    """LLaDA's configuration (arXiv 2502.09992) as a Llama's."""

    model_type = "llada"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As published; LLaDA-MoE goes by the same model type and is told by its experts."""
        kind: Any = LladaMoeConfig if "num_experts" in config_dict else super()
        return kind.from_dict(config_dict, **kwargs)

    @classmethod
    def translate(cls, published: Mapping[str, Any]) -> dict[str, Any]:
        """LLaDA's keys as LlamaConfig's; raises InputError for a block that is not Llama's."""
        require_fixed(published, _LLADA_FIXED)
        keys: dict[str, Any] = {
            ours: published[theirs] for ours, theirs in _LLADA_KEYS.items() if published.get(theirs) is not None
        }
        # No number of its own is plain multi-head attention: a key head for every query head.
        keys.setdefault("num_key_value_heads", published["n_heads"])
        # `embedding_size` is the vocabulary filled up for the hardware; the weights have that many rows.
        keys.setdefault("vocab_size", published["vocab_size"])
        if "intermediate_size" not in keys:
            keys["intermediate_size"] = published["mlp_ratio"] * published["d_model"]
        return {**keys, **{key: published[key] for key in _IDS if published.get(key) is not None}}


class DreamConfig(AsPublished, Qwen2Config):
    """Dream's configuration (arXiv 2508.15487), also DiffuCoder's: Qwen2's own keys."""

    model_type = "Dream"


class A2dQwen2Config(AsPublished, Qwen2Config):
    """A Qwen2 that was converted to masked diffusion, as the library dllm writes it."""

    model_type = "a2d-qwen2"


class A2dQwen3Config(AsPublished, Qwen3Config):
    """A Qwen3 that was converted to masked diffusion, as the library dllm writes it."""

    model_type = "a2d-qwen3"


def _model(config: Any, base: Any) -> tuple[Any, Any]:
    """A configuration and its model: `base`, which attends both ways by that configuration, under a name of its own."""
    return config, type(config.__name__.replace("Config", "ForCausalLM"), (base,), {"config_class": config})


MODELS = (
    _model(LladaConfig, LlamaForCausalLM),
    _model(DreamConfig, Qwen2ForCausalLM),
    _model(A2dQwen2Config, Qwen2ForCausalLM),
    _model(A2dQwen3Config, Qwen3ForCausalLM),
    _model(LladaMoeConfig, Qwen3MoeForCausalLM),
    _model(OlderLladaMoeConfig, Qwen3MoeForCausalLM),
    _model(Llada2Config, Glm4MoeForCausalLM),
)
# Dream began as the autoregressive Qwen2.5, and kept its shift by one.
SHIFTED = ("Dream",)  # the output at a place is for the token after it

for _config, _model in MODELS:
    # `exist_ok`: a transformers that knows one of these types by itself would else refuse at import.
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
_LLADA = [WeightRenaming(theirs, ours) for theirs, ours in _LLADA_NAMES.items()]
for _name, _steps in {"llada": _LLADA, **CONVERSIONS}.items():
    register_checkpoint_conversion_mapping(_name, _steps, overwrite=True)
