"""How much memory a GPU needs for training: weights, gradients and Adam's state as they are sharded, and activations.

The activations of a decoder layer are those that autograd keeps for Qwen2 and Llama with fused attention: a unit test
counts them. What is predicted is a training's need at its longest rows, so that what fits, fits to the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from prefmill.core.errors import ConfigError
from prefmill.distributed.deepspeed_file import deepspeed_settings
from prefmill.training.config import TrainingConfig, weights_precision

GIGABYTE = 2.0**30
NUMBER_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_NF4_BYTES = 0.5 + 0.127 / 8  # 4 bits, and block scales that are quantized too (QLoRA, arXiv 2305.14314: 0.127 bits)
# Moments as large as the weights that optimizers keep, by parts of transformers' names for them; others: Adam's two.
_MOMENTS = {
    "adafactor": 0, "lomo": 0, "schedule_free_sgd": 1, "sgd": 0, "adagrad": 1, "lion": 1, "rmsprop": 1, "ademamix": 3,
    "grokadamw": 3,
}  # fmt: skip
_RUNTIME_GB = 1.5  # CUDA context, kernels, NCCL's buffers
FRAGMENTS = 0.05  # of everything: what the allocator cannot use


# What each number of GpuMemory is made of, for whoever has to believe it.
ORIGINS = {
    "weights": "parameters x bytes a number, by rank under ZeRO-3 and FSDP2; 4 bits: 0.516 a linear weight",
    "gradients": "trained parameters x bytes a number, by rank from ZeRO-2 on; whole where several passes add to them",
    "optimizer": "a trained parameter's moments (AdamW's 8 bytes) and DeepSpeed's fp32 copy, by rank from ZeRO-1 on",
    "activations": "what autograd keeps of a microbatch: rows x tokens x a layer's bytes, or counted on an image model",
    "logits": "tokens projected together x vocabulary x (4 + 4 + bytes a number)",
    "gathered": "the layers, embeddings and head that are whole at a time",
    "average": "4 bytes a trained parameter: the moving average of the weights",
    "runtime": "CUDA context, kernels, NCCL's buffers: an allowance",
}
# LLaDA-8B's config.json as published (arXiv 2502.09992), for machines that have not downloaded it.
_LLADA_8B = {
    "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12_288,
    "vocab_size": 126_464, "embedding_size": 126_464, "max_sequence_length": 4096, "weight_tying": False,
}  # fmt: skip
_PUBLISHED = {"GSAI-ML/LLaDA-8B-Instruct": _LLADA_8B, "GSAI-ML/LLaDA-8B-Base": _LLADA_8B}


@dataclass(frozen=True)
class Numbers:
    """How many numbers a model has, an optimizer changes, and autocast keeps copies of."""

    parameters: int
    trained: int
    cast: int


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
    block_length: int | None = None  # of a block-diffusion model


@dataclass(frozen=True)
class GpuMemory:
    """What one GPU holds at its fullest, in GB of 2^30 bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float = 0.0
    gathered: float = 0.0
    average: float = 0.0
    runtime: float = _RUNTIME_GB

    @property
    def total(self) -> float:
        """All of it, and what the allocator loses between."""
        parts: list[float] = [getattr(self, field.name) for field in fields(self)]
        return sum(parts) * (1 + FRAGMENTS)


@dataclass(frozen=True)
class Sharding:
    """How ranks share a model: from stage 1 on the optimizer's state, from 2 the gradients, from 3 the weights."""

    name: str
    stage: int
    offloads_optimizer: bool = False
    offloads_weights: bool = False


def model_size(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSize:
    """The shape of a language model, from its config alone; raises ConfigError where that cannot be read."""
    from transformers import AutoConfig

    from prefmill.families.mdlm.native import (
        LladaConfig,  # transformers' Auto classes know LLaDA and Dream from here on
    )

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with readable(name_or_path):
        try:  # what is here already is not asked for again
            config = AutoConfig.from_pretrained(name_or_path, local_files_only=True, **options)
        except OSError:
            if name_or_path in _PUBLISHED:
                return _shape(LladaConfig.from_dict(dict(_PUBLISHED[name_or_path])), trust_remote_code=False)
            config = AutoConfig.from_pretrained(name_or_path, **options)
    return _shape(config, trust_remote_code)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Raise ConfigError where the config of the model `name` cannot be read within."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot read the model's config", where=name, got=str(error).splitlines()[0],
            fix="download the model first, or give its folder",
        ) from None  # fmt: skip


def _shape(config: Any, trust_remote_code: bool) -> ModelSize:
    import torch
    from transformers import AutoModelForCausalLM

    # Shapes alone: on the meta device a model of any size takes no memory and no download.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    linears = [layer for layer in model.get_decoder().modules() if isinstance(layer, torch.nn.Linear)]
    text = config.get_text_config()
    heads = text.num_key_value_heads or text.num_attention_heads
    # Some models, such as Qwen3-0.6B, have heads wider than hidden_size divided by their number.
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        parameters=model.num_parameters(), linear_parameters=sum(layer.weight.numel() for layer in linears),
        linear_widths=sum(layer.in_features + layer.out_features for layer in linears),
        layers=text.num_hidden_layers, hidden=text.hidden_size, intermediate=text.intermediate_size,
        key_value=heads * width, vocabulary=text.vocab_size, block_length=getattr(config, "block_length", None),
    )  # fmt: skip


def gpu_memory(
    size: ModelSize, config: TrainingConfig, world: int, rows: int, logits_at_once: int, several_passes: bool = False
) -> GpuMemory:
    """What each of `world` GPUs needs for microbatches of `rows` sequences of `max_length` tokens.

    `logits_at_once` is how many tokens' logits exist together, in fp32 with their gradient. What DeepSpeed offloads is
    not counted: see `host_memory`. `several_passes` of a microbatch add to a gradient before ranks share it: autograd
    holds it whole until the last.
    """
    shards, number, kept = sharding(config), NUMBER_BYTES[config.precision], NUMBER_BYTES[weights_precision(config)]
    numbers = Numbers(size.parameters, trained_parameters(size, config), size.linear_parameters)
    states = model_states(numbers, config, world, _weight_bytes(size, config, kept), several_passes)
    per_layer = layer_bytes(size, config.precision, residual=number if config.fsdp else kept) * config.max_length * rows
    boundaries = size.layers * size.hidden * (number if config.fsdp else kept) * config.max_length * rows
    activations = boundaries + per_layer if config.activation_checkpointing else size.layers * per_layer
    return GpuMemory(
        **states, activations=activations / GIGABYTE,
        logits=logits_at_once * size.vocabulary * (4 + 4 + number) / GIGABYTE,
        gathered=_gathered_bytes(size, config, world) / GIGABYTE if shards.stage >= 3 else 0.0,
    )  # fmt: skip


def model_states(
    numbers: Numbers, config: TrainingConfig, world: int, weight_bytes: float, several_passes: bool = False
) -> dict[str, float]:
    """The GB of `weights`, of which there are `weight_bytes` in all, `gradients` and `optimizer` on each GPU."""
    shards, number, kept = sharding(config), NUMBER_BYTES[config.precision], NUMBER_BYTES[weights_precision(config)]
    trained = numbers.trained
    # DeepSpeed trains fp32 copies of what it computes with; without it the weights are fp32 themselves.
    by_deepspeed = shards.stage > 0 and not config.fsdp
    each = optimizer_bytes(config.optim or "adamw") + (4 if by_deepspeed and kept < 4 else 0)
    optimizer = trained * each / (world if shards.stage >= 1 else 1)
    gradients = trained * (kept if by_deepspeed else 4) / (world if shards.stage >= 2 else 1)
    gradients += trained * number if several_passes and shards.stage >= 2 and world > 1 else 0
    buckets = trained * 4 if world > 1 and not shards.stage else 0  # DDP sends copies
    # Autocast keeps the weights it has cast until its context ends.
    copies = 0 if shards.stage or kept == number else numbers.cast * number
    weights = weight_bytes / (world if shards.stage >= 3 else 1)
    return {
        "weights": (0 if shards.offloads_weights else weights + copies) / GIGABYTE,
        "gradients": (0 if shards.offloads_optimizer else gradients + buckets) / GIGABYTE,
        "optimizer": (0 if shards.offloads_optimizer else optimizer) / GIGABYTE,
    }


def optimizer_bytes(name: str) -> float:
    """Bytes that the optimizer of this name in transformers keeps for a trained number."""
    moments = next((count for part, count in _MOMENTS.items() if part in name), 2)
    return moments * (1 if "8bit" in name else 0.5 if "4bit" in name else 4)


def _weight_bytes(size: ModelSize, config: TrainingConfig, kept: int) -> float:
    """Embeddings and head stay in bf16 beside linear layers in 4 bits, of which one at a time is whole in bf16."""
    if config.quantization is None:
        return size.parameters * kept
    rest = size.parameters - size.linear_parameters
    return size.linear_parameters * _NF4_BYTES + (rest + size.hidden * size.intermediate) * 2


def host_memory(size: ModelSize, config: TrainingConfig, world: int) -> float:
    """What each of `world` ranks keeps in the host's memory for its GPU, in GB of 2^30 bytes; 0 without offload.

    16 bytes a trained parameter (Adam's moments, weights and gradients in fp32), and its weights as computed with where
    they are offloaded too: 18, as DeepSpeed's estimate_zero3_model_states_mem_needs counts.
    """
    shards = sharding(config)
    each = optimizer_bytes(config.optim or "adamw") + 4 + 4
    optimizer = trained_parameters(size, config) * each if shards.offloads_optimizer else 0
    weights = size.parameters * NUMBER_BYTES[weights_precision(config)] if shards.offloads_weights else 0
    return (optimizer + weights) / world / GIGABYTE


def trained_parameters(size: ModelSize, config: TrainingConfig) -> int:
    """Numbers that the optimizer changes: all, or an adapter's."""
    return size.parameters if config.lora is None else config.lora.r * size.linear_widths


def _gathered_bytes(size: ModelSize, config: TrainingConfig, world: int) -> float:
    """What a sharded model holds whole at a time.

    ZeRO-3: its largest layer, and that layer's gradient. FSDP2: embeddings and head with their gradient for all of the
    backward pass, a layer with its gradient, which is summed in fp32, and the layer fetched ahead.
    """
    if world == 1:
        return 0.0
    number, layer = NUMBER_BYTES[config.precision], size.linear_parameters / size.layers
    share = 1 if config.lora is None else 0  # frozen weights have no gradients
    if not config.fsdp:
        return max(layer, size.vocabulary * size.hidden) * number * (1 + share)
    root = size.parameters - size.linear_parameters
    return root * number * (1 + share) + layer * (2 * number + share * (number + 4))


def layer_bytes(size: ModelSize, precision: str, residual: int) -> int:
    """Bytes that one layer keeps for one token; `residual` are those of a number of the residual stream.

    The norms' inputs and fp32 intermediates; inputs and outputs of the attention, which are kept again as cast where
    the stream is wider than what is computed in; keys and values; gate, up, their activation and product.
    """
    number = NUMBER_BYTES[precision]
    norms = 2 * 2 * 4 if residual == 4 else 2 * (4 + residual)
    attention = number * (4 if residual == number else 7)
    return size.hidden * (norms + attention) + number * (2 * size.key_value + 4 * size.intermediate)


def sharding(config: TrainingConfig) -> Sharding:
    """How the strategy asked for spreads a model; raises ConfigError for an unreadable DeepSpeed file."""
    if config.fsdp:
        return Sharding("FSDP2", 3)
    if config.deepspeed is None:
        return Sharding("ZeRO 0", 0)
    zero = deepspeed_settings(config.deepspeed).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    away = {
        key: (zero.get(key) or {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")
    }
    return Sharding(f"ZeRO {stage}", stage, away["offload_optimizer"], away["offload_param"])
