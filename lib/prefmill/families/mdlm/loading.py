"""Loading masked-diffusion language models: LLaDA, Dream, and Llama or Qwen2 that attend both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.precision import Precision, torch_dtype
from prefmill.families.causal.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantization = Literal["4bit"]
_NATIVE = ("llama", "qwen2")


def check_remote_code(trust: bool, name: str, revision: str | None) -> None:
    """Code from the hub runs only when the configuration says so, and only a pinned revision of it.

    Raises ConfigError for a hub name without a revision; a local folder is pinned by being there.
    """
    from pathlib import Path

    if trust and revision is None and not Path(name).is_dir():
        raise ConfigError(
            "trust_remote_code needs a pinned revision", where=name, got="revision=null",
            expected="the commit of the model repository that you have read",
            fix="set revision to that commit's 40 hexadecimal digits",
        )  # fmt: skip


def load_diffusion_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a masked-diffusion model, with a chat template and an end token; raises InputError without."""
    check_remote_code(trust_remote_code, name, revision)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end token, with which answers are filled up", where=name, fix="set its eos_token"
        )
    return tokenizer


def load_diffusion_model(
    name: str,
    *,
    precision: Precision,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The model of `name`, its dropout off; raises InputError for one that attends to what comes before only."""
    check_remote_code(trust_remote_code, name, revision)
    if trust_remote_code or quantization is not None:
        model = _load_with_its_code(name, precision, revision, trust_remote_code, quantization)
    else:
        model = load_model(name, precision=precision, revision=revision, attn_implementation=attn_implementation)
    if model.config.model_type in _NATIVE and getattr(model.config, "is_causal", True):
        raise InputError(
            "this model attends to earlier tokens only", where=name, got=f"{model.config.model_type}, is_causal=true",
            expected="a masked-diffusion model",
            fix="give a model trained with masks; a Llama or Qwen2 as one has is_causal=false in config.json",
        )  # fmt: skip
    return switch_dropout_off(model)


def mask_token_of(model: Any, tokenizer: Any, given: int | None = None) -> int:
    """The id of the mask token: given, of the model's configuration, or of the tokenizer; raises InputError without."""
    found = [given, getattr(model.config, "mask_token_id", None), tokenizer.mask_token_id]
    mask = next((value for value in found if value is not None), None)
    if mask is None:
        raise InputError(
            "the model has no mask token", where=getattr(model.config, "name_or_path", None) or model.config.model_type,
            fix="set mask_token_id (LLaDA-8B: 126336)",
        )  # fmt: skip
    return int(mask)


def predicts_next(model: Any, given: bool | None = None) -> bool:
    """Whether the output at a place is for the token after it: Dream's shifted logits, or as the configuration says."""
    return str(model.config.model_type).lower() == "dream" if given is None else given


def switch_dropout_off(model: Any) -> Any:
    """`model` without dropout: policy and reference must agree."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def _load_with_its_code(
    name: str, precision: Precision, revision: str | None, trust: bool, quantization: Quantization | None
) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
    # Dream registers itself under AutoModel only.
    known = getattr(config, "auto_map", None) or {}
    auto = AutoModel if known and "AutoModelForCausalLM" not in known else AutoModelForCausalLM
    extra: dict[str, Any] = {"dtype": torch_dtype(precision), "use_safetensors": True}
    if quantization is not None:
        extra["quantization_config"] = _four_bit(precision)
    try:
        return auto.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust,
            dtype=torch_dtype(precision),
            use_safetensors=True,
            **extra,
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            "cannot load the model", where=name, got=str(error).splitlines()[0],
            fix="check the name, the revision, and that what its code imports is installed (4bit: bitsandbytes)",
        ) from error  # fmt: skip


def _four_bit(precision: Precision) -> Any:
    """4-bit NF4 weights with their scales quantized too (QLoRA, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(precision),
    )
