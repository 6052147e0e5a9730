"""What training a UNet, a transformer of images or a reward model keeps on a GPU, counted on the model itself.

It is built on torch's meta device, of shapes without numbers, and run once with the casts of CUDA's autocast, while
autograd says what it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from prefmill.core.precision import torch_dtype
from prefmill.families.sdxl.backbone import BACKBONES, Backbone, backbone_of
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.slurm.memory import GIGABYTE, GpuMemory, Numbers, model_states, readable
from prefmill.training.config import TrainingConfig, weights_precision

# unet/config.json and config.json as published, for machines that have not downloaded them.
SDXL_UNET = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "cross_attention_dim": 2048,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
CLIP_L_14 = {
    "projection_dim": 768,
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                      "num_attention_heads": 16, "patch_size": 14, "image_size": 224},
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}  # fmt: skip
_CLIP = ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "openai/clip-vit-large-patch14")
_TOKENS = 77  # of CLIP's text encoders, whatever the prompt
# CUDA's lists of autocast (pytorch.org/docs/stable/amp.html), as far as these models call them.
_IN_LOW = {functional.linear, functional.conv2d, torch.conv2d, torch.addmm, torch.matmul, Tensor.matmul, torch.bmm}
_IN_FP32 = {functional.group_norm, functional.layer_norm, torch.layer_norm, functional.normalize,
            functional.rms_norm, torch.rms_norm}  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """A model's numbers, the bytes that autograd keeps for one microbatch, and of what that is."""

    numbers: Numbers
    kept_bytes: int
    samples: str
    on_disk: str = ""


def image_memory(counted: Counted, config: TrainingConfig, world: int) -> GpuMemory:
    """What each of `world` GPUs needs."""
    kept, numbers = torch_dtype(weights_precision(config)).itemsize, counted.numbers
    frozen, trained = numbers.parameters - numbers.trained, numbers.trained
    average = trained * 4 if getattr(config, "use_ema", False) else 0
    return GpuMemory(
        **model_states(numbers, config, world, frozen * kept + trained * (4 if config.lora else kept)),
        activations=counted.kept_bytes / GIGABYTE, average=average / GIGABYTE,
    )  # fmt: skip


def count(name: str, config: TrainingConfig) -> Counted:
    """The training of an image stage on model `name`; raises ConfigError where the model's config cannot be read."""
    if isinstance(config, SdxlPreferenceConfig):
        return count_unet(name, config)
    return count_reward(name, config)


def notes(counted: Counted, config: TrainingConfig) -> list[str]:
    """The arithmetic, and what is kept on disk."""
    numbers, kept = counted.numbers, torch_dtype(weights_precision(config)).itemsize
    found = [
        f"{numbers.parameters:,} numbers of {kept} bytes, {numbers.trained:,} of them trained; "
        f"activations: {counted.kept_bytes:,} bytes for {counted.samples}"
    ]
    return [*found, counted.on_disk] if counted.on_disk else found


def count_unet(name: str, config: SdxlPreferenceConfig) -> Counted:
    """The UNet or transformer of pipeline `name` at the configured resolution."""
    from prefmill.families.sdxl.dpo import winner_alone
    from prefmill.families.sdxl.loading import add_adapter

    backbone, make, said = _denoiser(name, config.revision)
    dtype, blocks = torch_dtype(weights_precision(config)), _Blocks()
    # The losers run without a gradient where they have no part in it.
    samples = config.per_device_train_batch_size * (1 if winner_alone(config) else 2)
    channels, side = said["in_channels"] // (backbone.patch**2 if backbone.packed else 1), config.resolution // 8
    tokens = _TOKENS * backbone.clip_states + sum(backbone.reads(said).values())
    text = said.get("cross_attention_dim") or said["joint_attention_dim"]
    text = text if isinstance(text, int) else text[0]  # one a block; those that are trained have one for all
    with torch.device("meta"):
        model = make.from_config(said).train()
        nn.Module.to(model, dtype)
        if config.activation_checkpointing:
            model.enable_gradient_checkpointing(blocks)
        latents, words = (
            torch.empty(samples, channels, side, side, dtype=dtype),
            torch.empty(samples, tokens, text, dtype=dtype),
        )
        pooled = torch.empty(samples, _pooled_width(said), dtype=dtype)
        given = (latents, torch.empty(samples), words, pooled, torch.empty(samples, 6))
        call, model = backbone.calling(said, config.guidance_scale), add_adapter(model, config)
        numbers, kept = _count(model, config, blocks, lambda: call(model, *given))
    microbatch = f"a microbatch of {samples} at {config.resolution} x {config.resolution} pixels"
    size, row = torch_dtype(config.precision).itemsize, tokens * text + pooled.shape[1]
    on_disk = (
        f"on disk: {channels * side**2 * 4 / 1e6:.2f} MB an image ({channels} x {side} x {side} numbers of 4 bytes), "
        f"{row * size / 1e6:.2f} MB a prompt ({tokens} x {text} + {pooled.shape[1]} of {size}); "
        "the VAE and the text encoders write these before the training and are freed"
    )
    return Counted(numbers, kept, microbatch, on_disk)


def _pooled_width(said: Mapping[str, Any]) -> int:
    """Of the pooled embedding; 0 where there is none."""
    if said.get("addition_embed_type") == "text_time":
        return int(said["projection_class_embeddings_input_dim"] - 6 * said["addition_time_embed_dim"])
    return int(said.get("pooled_projection_dim") or 0)


def count_reward(name: str, config: Any) -> Counted:
    """A reward model on the CLIP `name`, of train_reward's configuration."""
    from transformers import CLIPConfig

    from prefmill.families.reward.model import MultiHeadReward, MultiHeadRewardConfig
    from prefmill.families.reward.train import freeze

    said = CLIPConfig(**CLIP_L_14) if name in _CLIP else _clip_config(name, config.revision)
    pairs, side = config.per_device_train_batch_size, said.vision_config.image_size
    with torch.device("meta"):
        model = MultiHeadReward(MultiHeadRewardConfig(clip_config=said, hidden_size=config.hidden_size)).train()
        freeze(model, config.trainable)
        blocks = _Blocks()
        if config.activation_checkpointing:
            model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=blocks)
        words, prompt_of = torch.zeros(pairs, _TOKENS, dtype=torch.long), torch.zeros(2 * pairs, dtype=torch.long)
        # No mask: making one asks for its values, and it is no part of what is kept.
        pixels = torch.empty(2 * pairs, 3, side, side)
        numbers, kept = _count(model, config, blocks, lambda: model(pixels, words, None, prompt_of))
    return Counted(numbers, kept, f"{2 * pairs} images of {side} x {side} pixels and {pairs} prompts")


class _Blocks:
    """Stands for activation checkpointing: a block keeps its inputs, and one at a time all that autograd wants."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.largest = 0

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        self.inputs |= {_storage(item): item for item in args if isinstance(item, Tensor)}
        with _kept_by_autograd(set()) as kept:
            out = block(*args)
        self.largest = max(self.largest, _bytes(kept))
        return out


class _Autocast(TorchFunctionMode):
    """CUDA's autocast, which no other device has, and attention that keeps its inputs, output and a number a row."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self._low, self.copies = low, dict[int, Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            given = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in (kwargs or {}))][:3]
            return _FusedAttention.apply(*(self._cast(item, self._low) for item in given))  # type: ignore[no-untyped-call]
        wanted = self._low if func in _IN_LOW else torch.float32 if func in _IN_FP32 else None
        if wanted is not None and self._low != torch.float32:
            args = [self._cast(item, wanted) for item in args]
            kwargs = {key: self._cast(item, wanted) for key, item in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _cast(self, item: Any, dtype: torch.dtype) -> Any:
        if not isinstance(item, Tensor) or not item.is_floating_point() or item.dtype == dtype:
            return item
        if not isinstance(item, nn.Parameter) or not item.requires_grad:
            return item.to(dtype)
        # As autocast does with weights that are trained, once: the copy stays until the context ends.
        return self.copies.setdefault(id(item), item.to(dtype))


class _FusedAttention(torch.autograd.Function):
    """The shapes of flash attention (arXiv 2205.14135), without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _count(model: nn.Module, config: TrainingConfig, blocks: _Blocks, run: Callable[[], Any]) -> tuple[Numbers, int]:
    dtype = torch_dtype(config.precision)
    autocast, weights = _Autocast(dtype), {_storage(weight) for weight in model.parameters()}
    with autocast, _kept_by_autograd(weights) as kept:
        run()
    for copy in autocast.copies.values():
        kept.pop(_storage(copy), None)
    cast = sum(copy.numel() for copy in autocast.copies.values() if copy.dtype != torch.float32)
    weights_of = {kind: sum(w.numel() for w in model.parameters() if w.requires_grad >= kind) for kind in (False, True)}
    return Numbers(weights_of[False], weights_of[True], cast), _bytes(kept | blocks.inputs) + blocks.largest


@contextmanager
def _kept_by_autograd(but: set[int]) -> Iterator[dict[int, Tensor]]:
    """One tensor of each storage that autograd keeps for the backward pass, but those in `but`."""
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in but and not isinstance(tensor, nn.Parameter):
            kept[_storage(tensor)] = tensor  # held, or another storage could get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # on the meta device every data_ptr is 0


def _bytes(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _denoiser(name: str, revision: str | None) -> tuple[Backbone, Any, dict[str, Any]]:
    """What differs in this kind of pipeline, the class of its UNet or transformer, and that one's configuration."""
    import diffusers

    if name == _SDXL:
        return BACKBONES["StableDiffusionXLPipeline"], diffusers.UNet2DConditionModel, SDXL_UNET
    with readable(name):
        index = diffusers.DiffusionPipeline.load_config(name, revision=revision)
        backbone = backbone_of(index.get("_class_name"), name)
        make = getattr(diffusers, index[backbone.part][1])
        return backbone, make, dict(make.load_config(name, subfolder=backbone.part, revision=revision))


def _clip_config(name: str, revision: str | None) -> Any:
    from transformers import CLIPConfig

    from prefmill.families.reward.open_clip import CONFIG_FILE, clip_config, is_open_clip

    if is_open_clip(name):
        said = json.loads((Path(name) / CONFIG_FILE).read_bytes())
        return clip_config(said.get("model_cfg", said), Path(name))
    with readable(name):
        return CLIPConfig.from_pretrained(name, revision=revision)
