"""Models whose files hold 8 or 4 bits a weight: read as whole weights, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefmill.core.errors import InputError
from prefmill.core.precision import Precision, Quantization, torch_dtype

# What transformers multiplies out while it reads, and was held against weights computed from the stored bytes.
_READ_WHOLE = ("fp8", "mxfp4", "compressed-tensors")
_KEY = "quantization_config"


def quantization_of(config: Any) -> str | None:
    """The `quant_method` that a configuration states, `none stated` where it leaves that out; None for whole.

    compressed-tensors also writes its key where no group of weights is quantized; transformers fails on that.
    """
    found = getattr(config, _KEY, None) or getattr(config.get_text_config(), _KEY, None)
    stated = found if isinstance(found, dict | None) else found.to_dict()
    if not stated or (stated.get("quant_method") == "compressed-tensors" and not stated.get("config_groups")):
        return None
    return str(stated.get("quant_method", "none stated"))


def require_trainable(name: str, config: Any, quantization: Quantization | None) -> None:
    """Raise InputError for quantized weights that are not read whole, or that `quantization` would quantize again."""
    stored = quantization_of(config)
    if stored is None or (stored in _READ_WHOLE and quantization is None):
        return
    again = "leave quantization out, or " if stored in _READ_WHOLE else ""
    raise InputError(
        "these weights are quantized in a way that is not trained here", where=name, got=f"{_KEY} of {stored}",
        expected=f"whole weights, or {', '.join(_READ_WHOLE)}, which are read as whole weights",
        fix=f"{again}give the model before it was quantized; quantization=4bit quantizes it while it is loaded",
    )  # fmt: skip


def four_bit(precision: Precision) -> Any:
    """4-bit NF4 weights with their scales quantized too (QLoRA, arXiv 2305.14314); raises InputError without it."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise InputError(
            "quantization needs bitsandbytes", got="not installed", fix="install it, or leave quantization out"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(precision),
    )


def load_whole(load: Callable[..., tuple[Any, Any]], name: str, config: Any, precision: Precision) -> tuple[Any, Any]:
    """`load(config=config)`, a model and its loading info, with weights of 8 or 4 bits multiplied out where possible.

    Other methods of transformers stay as they are, for scoring and generation. Raises InputError for an unknown one,
    which transformers would skip with a warning.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored = quantization_of(config)
    if stored is None:
        _forget(config)
    if stored not in _READ_WHOLE:
        if stored not in (None, "bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING):
            raise InputError(
                "this quantization is not known", where=name, got=f"quant_method {stored}",
                expected="one that the installed transformers reads", fix="give the model before it was quantized",
            )  # fmt: skip
        return load(config=config)
    for owner in (config, config.get_text_config()):
        if getattr(owner, _KEY, None):
            getattr(owner, _KEY)["dequantize"] = True
    model, info = load(config=config)
    return unquantized(model, precision), info


def _forget(config: Any) -> None:
    for owner in (config, config.get_text_config()):
        owner.__dict__.pop(_KEY, None)


def unquantized(model: Any, precision: Precision) -> Any:
    """The same weights in a model that nothing has quantized: it rounds no activations, and is saved as it is."""
    import torch

    _forget(model.config)
    with torch.device("meta"):
        own = type(model)(model.config).state_dict().keys()
    weights = {key: value for key, value in model.state_dict().items() if key in own}
    plain = type(model).from_pretrained(None, config=model.config, state_dict=weights, dtype=torch_dtype(precision))
    del plain._weight_conversions  # its names as transformers saves any other model of its kind
    if hasattr(model, "generation_config"):  # encoders such as BERT write nothing
        plain.generation_config = model.generation_config
    return plain
