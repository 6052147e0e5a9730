"""Small causal, vision-language and masked-diffusion models with the architectures of Qwen2.5, Qwen2.5-VL and LLaDA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from prefmill.core.config import StrictConfig
from prefmill.core.seeding import seeded
from prefmill.demo.tokenizer import MASK, VISION_TOKENS, train_chat_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2_5_VLConfig
MIN_PIXELS, MAX_PIXELS = 28 * 28, 16 * 28 * 28  # one to sixteen image tokens
_PATCH, _WINDOW = 14, 112
_MROPE_SHARES = (2, 3, 3)  # of half a head, in eighths: time, height, width


class Shape(StrictConfig):
    """The size of a transformer; `num_key_value_heads` below `num_attention_heads` is grouped-query attention."""

    hidden_size: int = Field(64, ge=8)
    num_hidden_layers: int = Field(2, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    num_key_value_heads: int = Field(2, ge=1)
    intermediate_size: int = Field(128, ge=8)
    max_position_embeddings: int = Field(32_768, ge=2)  # as the real ones: a whole paper fits

    @model_validator(mode="after")
    def _heads_divide(self) -> Shape:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("hidden_size must be a multiple of 2 x num_attention_heads: rotary embeddings pair up")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self


def create_qwen2(
    tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int, initializer_range: float = 0.02
) -> PreTrainedModel:
    """A Qwen2 with random fp32 weights that follow from its arguments, embeddings tied as in Qwen2.5-3B.

    `initializer_range` is the standard deviation of the weights.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=initializer_range,
        **special_ids(tokenizer), **shape.model_dump(),
    )  # fmt: skip
    # The weights are drawn where the model is made, from torch's global generator.
    with seeded(seed):
        model = Qwen2ForCausalLM(config)
    model.generation_config = generation_defaults(tokenizer)
    return model


def build_qwen2(folder: Path, texts: Sequence[str], seed: int, hidden_size: int | None = None) -> None:
    """Save a tiny Qwen2 and its tokenizer to `folder`."""
    tokenizer = train_chat_tokenizer(texts, vocab_size=1024)
    shape = Shape() if hidden_size is None else Shape(hidden_size=hidden_size)
    save(create_qwen2(tokenizer, shape, seed), tokenizer, folder)


def create_masked_diffusion(tokenizer: PreTrainedTokenizerBase, shape: Shape, seed: int) -> PreTrainedModel:
    """A small LLaDA, in its published form, with random fp32 weights that follow from its arguments."""
    from transformers import AutoModelForCausalLM

    from prefmill.families.mdlm.native import LladaConfig

    config = LladaConfig.from_dict(
        {
            "model_type": LladaConfig.model_type,
            "architectures": ["LLaDAModelLM"],
            "d_model": shape.hidden_size,
            "n_layers": shape.num_hidden_layers,
            "n_heads": shape.num_attention_heads,
            "n_kv_heads": shape.num_key_value_heads,
            "mlp_hidden_size": shape.intermediate_size,
            "max_sequence_length": shape.max_position_embeddings,
            "vocab_size": len(tokenizer),
            "embedding_size": len(tokenizer),
            "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-6,
            "weight_tying": False,
            "mask_token_id": tokenizer.mask_token_id,
            **special_ids(tokenizer),
        }
    )
    with seeded(seed):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.generation_config = generation_defaults(tokenizer)
    return model


def build_masked_diffusion(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Save a tiny stand-in for LLaDA and a tokenizer with a mask token to `folder`."""
    tokenizer = train_chat_tokenizer(texts, vocab_size=1024, mask_token=MASK)
    save(create_masked_diffusion(tokenizer, Shape(), seed), tokenizer, folder)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The ids of the special tokens a model's configuration states."""
    # Qwen2's tokenizer has no token for the beginning.
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def generation_defaults(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation ends at the end of a turn or of a document."""
    from transformers import GenerationConfig

    # Both, as in Qwen2.5's generation_config.json: a base model ends with the second.
    return GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
