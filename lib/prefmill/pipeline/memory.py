"""How much memory a GPU needs for training: weights, gradients and Adam's state, sharded as ZeRO does, and activations.

The activations of a decoder layer are those that autograd keeps for Qwen2 and Llama with fused attention: a unit test
counts them. What is predicted is a training's need at its longest rows, so that what fits, fits to the end.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from prefmill.errors import ConfigError
from prefmill.training import TrainingConfig, weights_precision

GIGABYTE = 2.0**30
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_ADAM_BYTES = 8  # two moments in fp32
_RUNTIME_GB = 1.5  # CUDA context, kernels, NCCL's buffers
_FRAGMENTS = 0.05  # of everything: what the allocator cannot use


@dataclass(frozen=True)
class ModelSize:
    """A decoder's shape; `linear_widths` is the sum of inputs and outputs of its linear layers, the head left out."""

    parameters: int
    linear_parameters: int
    linear_widths: int
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int


@dataclass(frozen=True)
class GpuMemory:
    """What one GPU holds at its fullest, in GB of 2^30 bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    runtime: float = _RUNTIME_GB

    @property
    def total(self) -> float:
        """All of it, and what the allocator loses between."""
        parts: list[float] = [getattr(self, field.name) for field in fields(self)]
        return sum(parts) * (1 + _FRAGMENTS)


def model_size(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSize:
    """The shape of a causal language model, from its config alone; raises ConfigError where that cannot be read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        try:  # what is here already is not asked for again
            config = AutoConfig.from_pretrained(name_or_path, local_files_only=True, **options)
        except OSError:
            config = AutoConfig.from_pretrained(name_or_path, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot read the model's config", where=name_or_path, got=str(error).splitlines()[0],
            fix="download the model first, or give its folder",
        ) from None  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    linears = [layer for layer in model.get_decoder().modules() if isinstance(layer, torch.nn.Linear)]
    text = config.get_text_config()
    heads = text.num_key_value_heads or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        parameters=model.num_parameters(), linear_parameters=sum(layer.weight.numel() for layer in linears),
        linear_widths=sum(layer.in_features + layer.out_features for layer in linears),
        layers=text.num_hidden_layers, hidden=text.hidden_size, intermediate=text.intermediate_size,
        key_value=heads * width, vocabulary=text.vocab_size,
    )  # fmt: skip


def gpu_memory(size: ModelSize, config: TrainingConfig, world: int, rows: int, logits_at_once: int) -> GpuMemory:
    """What each of `world` GPUs needs for microbatches of `rows` sequences of `max_length` tokens.

    `logits_at_once` is how many tokens' logits exist together, in fp32 with their gradient.
    """
    stage = zero_stage(config)
    kept = _BYTES["bf16" if stage else weights_precision(config)]
    trained = size.parameters if config.lora is None else config.lora.r * size.linear_widths
    # Under ZeRO the optimizer keeps the fp32 weights; without it they are the weights.
    optimizer = trained * (_ADAM_BYTES + (4 if stage else 0)) / (world if stage >= 1 else 1)
    gradients = trained * (2 if stage else 4) / (world if stage >= 2 else 1)
    buckets = trained * 4 if world > 1 and not stage else 0  # DDP sends copies
    copies = 0 if stage or kept == _BYTES[config.precision] else size.linear_parameters * _BYTES[config.precision]
    weights = size.parameters * kept / (world if stage >= 3 else 1)
    per_layer = layer_bytes(size, config.precision, residual=kept) * config.max_length * rows
    boundaries = size.layers * size.hidden * kept * config.max_length * rows
    activations = boundaries + per_layer if config.activation_checkpointing else size.layers * per_layer
    return GpuMemory(
        weights=(weights + copies) / GIGABYTE, gradients=(gradients + buckets) / GIGABYTE,
        optimizer=optimizer / GIGABYTE, activations=activations / GIGABYTE,
        logits=logits_at_once * size.vocabulary * (4 + 4 + _BYTES[config.precision]) / GIGABYTE,
    )  # fmt: skip


def layer_bytes(size: ModelSize, precision: str, residual: int) -> int:
    """Bytes that one layer keeps for one token; `residual` are those of a number of the residual stream.

    The norms' inputs and fp32 intermediates; inputs and outputs of the attention, which are kept again as cast where
    the stream is wider than what is computed in; keys and values; gate, up, their activation and product.
    """
    number = _BYTES[precision]
    norms = 2 * 2 * 4 if residual == 4 else 2 * (4 + residual)
    attention = number * (4 if residual == number else 7)
    return size.hidden * (norms + attention) + number * (2 * size.key_value + 4 * size.intermediate)


def zero_stage(config: TrainingConfig) -> int:
    """The ZeRO stage of the DeepSpeed file, 3 for FSDP, 0 for neither; raises ConfigError for an unreadable file."""
    if config.fsdp:
        return 3
    if config.deepspeed is None:
        return 0
    from prefmill.strategies import deepspeed_settings

    return int(deepspeed_settings(config.deepspeed).get("zero_optimization", {}).get("stage", 0))
