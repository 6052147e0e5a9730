"""A tiny Qwen2.5-VL, for the image modalities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefmill.core.seeding import seeded
from prefmill.demo.text import Shape, generation_defaults, save, special_ids
from prefmill.demo.tokenizer import VISION_TOKENS, train_chat_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2_5_VLConfig

MIN_PIXELS, MAX_PIXELS = 28 * 28, 16 * 28 * 28  # one to sixteen image tokens
_PATCH, _WINDOW = 14, 112
_MROPE_SHARES = (2, 3, 3)  # of half a head, in eighths: time, height, width


def build_qwen2_5_vl(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Save a tiny Qwen2.5-VL, its tokenizer and its image processor to `folder`, laid out as on the hub."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = train_chat_tokenizer(texts, vocab_size=1024, extra_special_tokens=VISION_TOKENS)
    save(create_qwen2_5_vl(tokenizer, Shape(), seed), tokenizer, folder)
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(folder)


def create_qwen2_5_vl(tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int) -> PreTrainedModel:
    """A Qwen2.5-VL with random fp32 weights that follow from its arguments; `tokenizer` has VISION_TOKENS."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with seeded(seed):
        model = Qwen2_5_VLForConditionalGeneration(_config(tokenizer, shape))
    model.generation_config = generation_defaults(tokenizer)
    return model


def _config(tokenizer: PreTrainedTokenizerBase, shape: Shape) -> Qwen2_5_VLConfig:
    from transformers import Qwen2_5_VLConfig

    # They must sum to half a head, as rotary embeddings turn pairs of numbers.
    sections = [share * shape.hidden_size // shape.num_attention_heads // 16 for share in _MROPE_SHARES]
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    return Qwen2_5_VLConfig(
        text_config={
            **shape.model_dump(),
            **special_ids(tokenizer),
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": sections},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            # Image features take the places of text embeddings, so they are as wide.
            "out_hidden_size": shape.hidden_size,
            "patch_size": _PATCH,
            "window_size": _WINDOW,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )
