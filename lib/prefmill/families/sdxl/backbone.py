"""What differs between the pipelines that can be tuned; a folder's model_index.json says which of them it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prefmill.core.errors import InputError

Conditions = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Backbone:
    """The denoiser's name in the pipeline, and what it is called with from embeddings, pooled embeddings and time ids.

    `prompts` are the names under which `encode_prompt` insists on the prompt.
    `options` go to diffusers' from_pretrained. `kohya` says whether tools read its adapters by kohya's key names, and
    `original_names` whether those come from the original code and not from diffusers. T5 reads `t5_tokens`.
    """

    part: str
    prompts: tuple[str, ...]
    conditions: Conditions
    options: dict[str, Any] = field(default_factory=dict)
    kohya: bool = True
    original_names: bool = False
    t5_tokens: int | None = None


def sdxl_conditions(embeddings: Tensor, pooled: Tensor, time_ids: Tensor) -> dict[str, Any]:
    """SDXL's UNet: the six numbers of size and crop stay in fp32, bf16 cannot tell 1345 pixels from 1344."""
    return {"encoder_hidden_states": embeddings, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def _sd_conditions(embeddings: Tensor, pooled: Tensor, time_ids: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": embeddings}


def _sd3_conditions(embeddings: Tensor, pooled: Tensor, time_ids: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


BACKBONES: dict[str, Backbone] = {
    # The watermark is off: diffusers adds one to the pixels wherever invisible-watermark is installed.
    "StableDiffusionXLPipeline": Backbone(
        "unet", ("prompt",), sdxl_conditions, {"add_watermarker": False}, original_names=True,
    ),
    # Without the checker, which would replace some images by black ones that people then rate.
    "StableDiffusionPipeline": Backbone(
        "unet", ("prompt",), _sd_conditions,
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    # No kohya form: its names join q, k and v in one matrix, and ComfyUI reads diffusers' own.
    "StableDiffusion3Pipeline": Backbone(
        "transformer", ("prompt", "prompt_2", "prompt_3"), _sd3_conditions, kohya=False, t5_tokens=256
    ),
}  # fmt: skip


def backbone_of(pipeline: Any, where: object) -> Backbone:
    """The backbone of a pipeline's class name; raises InputError for one that there is none of."""
    if str(pipeline) not in BACKBONES:  # of code on the hub it is a list
        raise InputError(
            "no backbone for this kind of pipeline", where=where, got=pipeline, expected=", ".join(BACKBONES),
            fix="give a diffusers folder of SDXL, SD 1.5 or SD 3, or a hub name such as "
            "stabilityai/stable-diffusion-xl-base-1.0",
        )  # fmt: skip
    return BACKBONES[pipeline]


def prompt_arguments(kept: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A pipeline's arguments for kept embeddings; SD 1.5 has no pooled ones."""
    names = {"embeddings": f"{prefix}prompt_embeds", "pooled": f"{prefix}pooled_prompt_embeds"}
    return {name: kept[key] for key, name in names.items() if kept[key].numel()}


def denoiser(pipeline: Any) -> Any:
    """The UNet or transformer of a loaded pipeline."""
    return getattr(pipeline, BACKBONES[type(pipeline).__name__].part)
