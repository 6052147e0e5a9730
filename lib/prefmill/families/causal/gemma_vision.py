"""Images of Gemma 3 and 4, whose tokens see each other both ways, in the layers where the model says so."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size
from transformers.utils import ModelOutput

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.attention_pattern import MaskPattern
from prefmill.families.causal.varlen_attention import Segment
from prefmill.families.causal.vision import ImageReader
from prefmill.families.causal.vision_parts import decoder_of
from prefmill.store.pictures import image_size, open_image


class Gemma3Reader(ImageReader):
    """Every image has one size and as many tokens; pan-and-scan stays off, as is the processor's default."""

    types_name = "token_type_ids"
    placeholder_key = "boi_token_id"  # the template writes the begin of an image alone

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        if self._limits.min_pixels or self._limits.max_pixels:
            raise ConfigError(
                "this model's images have a size of their own", where=self._name, got="min_pixels or max_pixels",
                fix="leave min_pixels and max_pixels out for this model",
            )  # fmt: skip

    def written(self, path: str) -> str:
        """The image's tokens between begin, end and empty lines."""
        return f"\n\n{self._framed(self.config.mm_tokens_per_image)}\n\n"

    def pixels(self, paths: Sequence[str]) -> dict[str, Tensor]:
        """`pixel_values` [n, 3, H, W]."""
        images = [[open_image(path)] for path in paths]
        return {"pixel_values": self.processor(images, return_tensors="pt", do_pan_and_scan=False)["pixel_values"]}

    @property
    def vllm_options(self) -> dict[str, Any]:
        """Refused: vLLM is given prompts before their images are written out, in which other line breaks are joined."""
        raise ConfigError(
            "images of Gemma are not given to vLLM", where=self._name, fix="set generation.engine=transformers"
        )

    def _framed(self, count: int) -> str:
        begin, end = (self._token(key) for key in ("boi_token_id", "eoi_token_id"))
        return begin + self._token("image_token_id") * count + end


class Gemma4Reader(Gemma3Reader):
    """Images keep their aspect and fill a number of tokens."""

    types_name, placeholder_key = ImageReader.types_name, ImageReader.placeholder_key

    def written(self, path: str) -> str:
        """The image's tokens between begin and end."""
        processor = self.processor
        return self._framed(
            _num_tokens(path, processor.patch_size, processor.max_soft_tokens, processor.pooling_kernel_size)
        )

    def pixels(self, paths: Sequence[str]) -> dict[str, Tensor]:
        """`pixel_values` [n, patches, 3 x patch x patch] and `image_position_ids` [n, patches, 2]."""
        read = self.processor([open_image(path) for path in paths], return_tensors="pt")
        return {name: read[name] for name in ("pixel_values", "image_position_ids")}


def read_gemma(
    model: Any,
    input_ids: Tensor,
    mask: Tensor | None,
    images: dict[str, Tensor] | None,
    segments: Sequence[Segment] | None = None,
    **given: Any,
) -> Any:
    """Hidden states of rows with images, by the model's own forward around its text part.

    Without images the vision part still runs, on a blank one that counts for nothing: under ZeRO-3 and DDP every rank
    must run every part.
    """
    if segments is not None:
        given["segments"] = segments
    if images is None:
        output = decoder_of(model)(input_ids=input_ids, attention_mask=mask, use_cache=False, **given)
        return output if model.config.vision_config is None else _beside(output, _blank_features(model))
    masks = image_masks(model, input_ids, mask, segments)
    return model.base_model(input_ids=input_ids, attention_mask=masks, use_cache=False, **images, **given)


def image_masks(
    model: Any, input_ids: Tensor, mask: Tensor | None, segments: Sequence[Segment] | None
) -> dict[str, Any]:
    """The masks that the model makes for rows with images, by kind of layer; of packed rows, one for each segment."""
    is_image = (input_ids == model.config.image_token_id).int()
    if segments is None:
        return _own_masks(model, is_image, mask)
    longest = max(end - begin for segment in segments for begin, end in segment.responses)
    # Places in one sequence, as group attention asks for them: a prompt and the longest response to it.
    prompts = (F.pad(is_image[:, slice(*segment.prompt)], (0, longest)) for segment in segments)
    each = [_own_masks(model, prompt, None) for prompt in prompts]
    return {kind: _for_all([masks[kind] for masks in each]) for kind in each[0]}


def _for_all(patterns: Sequence[MaskPattern | None]) -> Any:
    # Where nothing looks ahead, all prompts have one pattern, which kernels know.
    return tuple(patterns) if any(pattern and pattern.ahead for pattern in patterns) else patterns[0]


def _own_masks(model: Any, is_image: Tensor, mask: Tensor | None) -> dict[str, Any]:
    make = type(model).create_masks_for_generate
    types_name = next(name for name in inspect.signature(make).parameters if name.endswith("token_type_ids"))
    shape = torch.empty(*is_image.shape, 1, dtype=model.dtype, device=is_image.device)
    masks: dict[str, Any] = make(
        model.config, shape, mask, past_key_values=None, position_ids=None, **{types_name: is_image}
    )
    return masks


def _blank_features(model: Any) -> Tensor:
    config, device = model.config.vision_config, model.device
    if model.config.model_type == "gemma3":
        images = {"pixel_values": torch.zeros(1, config.num_channels, *[config.image_size] * 2, device=device)}
    else:
        places = torch.arange(config.pooling_kernel_size, device=device)
        positions = torch.cartesian_prod(places, places)[None]
        pixels = torch.zeros(1, positions.shape[1], 3 * config.patch_size**2, device=device)
        images = {"pixel_values": pixels, "image_position_ids": positions}
    return torch.cat(tuple(model.base_model.get_image_features(**images, return_dict=True).pooler_output))


def _beside(output: ModelOutput, features: Tensor) -> ModelOutput:
    # Times 0, yet in the graph: gradients of 0 reach every weight of the vision part.
    output["last_hidden_state"] = output[0] + (features.sum() * 0.0).to(output[0].dtype)
    return output


@lru_cache(maxsize=65536)
def _num_tokens(path: str, patch: int, most: int, pooling: int) -> int:
    width, height = image_size(path)
    try:
        # The processor's own rule, so that a size gives the number of tokens and no pixel is decoded.
        sides = get_aspect_ratio_preserving_size(height, width, patch, most * pooling**2, pooling)
    except ValueError as error:
        raise InputError("this image cannot be used", where=path, got=error, fix="leave it out") from None
    return int(sides[0] * sides[1] // (patch * pooling) ** 2)
