"""The model types whose images are known, each with its reader and the way its text part is given them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from prefmill.families.causal.gemma_vision import Gemma3Reader, Gemma4Reader, read_gemma
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.loading import model_parts
from prefmill.families.causal.qwen_vision import QwenReader, read_qwen
from prefmill.families.causal.vision import ImageReader


@dataclass(frozen=True)
class VisionFamily:
    """`run(model, input_ids, mask, images, **given)` gives hidden states as the model's text part does."""

    reader: type[ImageReader]
    run: Callable[..., Any]


FAMILIES = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        VisionFamily(QwenReader, read_qwen),
    ),
    "gemma3": VisionFamily(Gemma3Reader, read_gemma),
    "gemma4": VisionFamily(Gemma4Reader, read_gemma),
}


def open_reader(
    name: str, tokenizer: PreTrainedTokenizerBase, limits: ImageLimits, **options: Any
) -> ImageReader | None:
    """The reader of the model `name`; None where its images are not known: it is shown text alone."""
    name, options["revision"], _ = model_parts(name, options.get("revision"))
    family = FAMILIES.get(AutoConfig.from_pretrained(name, **options).model_type)
    return None if family is None else family.reader(name, tokenizer, limits, **options)
