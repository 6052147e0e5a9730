"""What differs between the pipelines that can be tuned; a folder's model_index.json says which of them it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from prefmill.core.errors import ConfigError, InputError

# From the model, noised latents [S, C, H, W], times [S], embeddings, pooled embeddings and time ids: the prediction.
Call = Callable[[Any, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Backbone:
    """The denoiser's name in the pipeline, and how it is called.

    `prompts` are the names under which `encode_prompt` insists on the prompt; the pooled embedding is its result number
    `pooled`. `options` go to diffusers' from_pretrained. `prefix` begins the key names by which ComfyUI reads its
    adapters with their alpha, and `original_names` says whether those come from the original code and not from
    diffusers. `t5` is T5's tokenizer and how many tokens it reads; `clip_states` says whether CLIP's are embeddings
    too. A patch is `patch` latents wide; `packed` ones come as tokens. `guidance` is its pipeline's default; without
    `free_guidance` there is no second prediction to lead away from, and it is an input of the model, where it has that.
    `sample_size` is the side of the latents that a model is made for, where its own settings do not say. `spare` parts
    may be left out of a folder.
    """

    part: str
    prompts: tuple[str, ...]
    call: Callable[..., Tensor]
    guidance: float
    pooled: int | None = 2
    options: dict[str, Any] = field(default_factory=dict)
    prefix: str = "lora_unet_"
    original_names: bool = False
    t5: tuple[str, int] | None = None
    clip_states: bool = True
    patch: int = 1
    packed: bool = False
    free_guidance: bool = True
    sample_size: int | None = None
    spare: frozenset[str] = frozenset()

    def told(self, settings: Mapping[str, Any], guidance: float | None) -> float | None:
        """The guidance that a denoiser of these settings is told; raises ConfigError for one to a model without."""
        if settings.get("guidance_embeds"):
            return self.guidance if guidance is None else guidance
        if guidance is not None:
            raise ConfigError(
                "this model is told no guidance", where="guidance_scale", got=guidance,
                expected="a model with guidance_embeds: true, such as FLUX.1-dev", fix="leave out guidance_scale",
            )  # fmt: skip
        return None

    def calling(self, settings: Mapping[str, Any], guidance: float | None = None) -> Call:
        """`call` for a denoiser of these settings."""
        told = self.told(settings, guidance)
        return self.call if told is None else partial(self.call, guidance=told)

    def reads(self, settings: Mapping[str, Any]) -> dict[str, int]:
        """The pipeline's argument for how many tokens T5 reads; FLUX.1-schnell, told no guidance, was made with 256."""
        if self.t5 is None:
            return {}
        is_schnell = not (self.free_guidance or settings.get("guidance_embeds"))
        return {"max_sequence_length": 256 if is_schnell else self.t5[1]}

    def side(self, settings: Mapping[str, Any]) -> int:
        """The side, in latents, of the pictures that a denoiser of these settings is made for."""
        return int(settings.get("sample_size") or self.sample_size or 0)


def call_sdxl(
    model: Any, latents: Tensor, times: Tensor, embeddings: Tensor, pooled: Tensor, time_ids: Tensor
) -> Tensor:
    """SDXL's UNet: the six numbers of size and crop stay in fp32, bf16 cannot tell 1345 pixels from 1344."""
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return _first(
        model(latents, timestep=times, encoder_hidden_states=embeddings, added_cond_kwargs=added, return_dict=False)
    )


def _call_sd(model: Any, latents: Tensor, times: Tensor, embeddings: Tensor, *_: Tensor) -> Tensor:
    return _first(model(latents, timestep=times, encoder_hidden_states=embeddings, return_dict=False))


def _call_sd3(model: Any, latents: Tensor, times: Tensor, embeddings: Tensor, pooled: Tensor, _: Tensor) -> Tensor:
    given = {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
    return _first(model(latents, timestep=times, **given, return_dict=False))


def _call_flux(
    model: Any, latents: Tensor, times: Tensor, embeddings: Tensor, pooled: Tensor, _: Tensor,
    guidance: float | None = None,
) -> Tensor:  # fmt: skip
    """FLUX's transformer: tokens of 2 x 2 latents, each with its row and column; words have no place."""
    rows, columns = (side // 2 for side in latents.shape[2:])
    # In fp32, like the places of words: bf16 cannot tell 257 from 256.
    places = torch.cartesian_prod(*(torch.arange(n, device=latents.device).float() for n in (1, rows, columns)))
    packed = _first(
        model(
            pack(latents), timestep=times / 1000, encoder_hidden_states=embeddings, pooled_projections=pooled,
            img_ids=places, txt_ids=places.new_zeros(embeddings.shape[1], 3),
            guidance=None if guidance is None else torch.full_like(times, guidance), return_dict=False,
        )
    )  # fmt: skip
    return unpack(packed, rows, columns)


def pack(latents: Tensor) -> Tensor:
    """Latents [S, C, H, W] as tokens of 2 x 2, [S, H/2 x W/2, 4 C]."""
    return pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens [S, rows x columns, 4 C] as latents again, [S, C, 2 rows, 2 columns]."""
    return pixel_shuffle(tokens.mT.reshape(len(tokens), -1, rows, columns), 2)


def _first(results: tuple[Tensor, ...]) -> Tensor:
    return results[0]


BACKBONES: dict[str, Backbone] = {
    # The watermark is off: diffusers adds one to the pixels wherever invisible-watermark is installed.
    "StableDiffusionXLPipeline": Backbone(
        "unet", ("prompt",), call_sdxl, 5.0, options={"add_watermarker": False}, original_names=True,
    ),
    # Without the checker, which would replace some images by black ones that people then rate.
    "StableDiffusionPipeline": Backbone(
        "unet", ("prompt",), _call_sd, 7.5, pooled=None,
        options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    # kohya's names for the next two join q, k and v in one matrix; OneTrainer's, which ComfyUI reads too, do not.
    "StableDiffusion3Pipeline": Backbone(
        "transformer", ("prompt", "prompt_2", "prompt_3"), _call_sd3, 7.0, prefix="lora_transformer_",
        t5=("tokenizer_3", 256), patch=2, spare=frozenset({"text_encoder_3", "tokenizer_3"}),
    ),
    "FluxPipeline": Backbone(
        "transformer", ("prompt",), _call_flux, 3.5, pooled=1, prefix="lora_transformer_", t5=("tokenizer_2", 512),
        clip_states=False, patch=2, packed=True, free_guidance=False, sample_size=128,
    ),
}  # fmt: skip


def backbone_of(pipeline: Any, where: object) -> Backbone:
    """The backbone of a pipeline's class name; raises InputError for one that there is none of."""
    if str(pipeline) not in BACKBONES:  # of code on the hub it is a list
        raise InputError(
            "no backbone for this kind of pipeline", where=where, got=pipeline, expected=", ".join(BACKBONES),
            fix="give a diffusers folder of SDXL, SD 1.5, SD 3 or FLUX.1, or a hub name such as "
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
