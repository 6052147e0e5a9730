"""What a model's configuration says already, held against tokenizer, rows and settings before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.vision_parts import auto_class
from prefmill.training.config import TrainingConfig


def check_start(name: str, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig) -> None:
    """Raise InputError for a token without an embedding, ConfigError for an attention that the model does not take."""
    found = _config(name, config)
    rows, largest = found.get_text_config().vocab_size, max(tokenizer.get_vocab().values(), default=-1)
    # A GPU would stop with an assertion that names no token.
    if largest >= rows:
        raise InputError(
            "the tokenizer has tokens that the model has no embedding for", where=name, got=f"{rows} embeddings",
            expected=f"at least {largest + 1}", fix="give the tokenizer that the model was trained with, or resize "
            "the model's embeddings and save it",
        )  # fmt: skip
    if config.attn_implementation is not None:
        _try_attention(name, found, config)


def check_positions(name: str, lengths: Iterable[int], config: TrainingConfig) -> None:
    """Raise ConfigError where a row has more tokens than the model has positions: an IndexError in the midst of it."""
    limit = getattr(_config(name, config).get_text_config(), "max_position_embeddings", None)
    longest = max(lengths, default=0)
    if isinstance(limit, int) and longest > limit:
        raise ConfigError(
            "rows are longer than the model has positions", where=name, got=f"up to {longest} tokens",
            expected=f"at most {limit}", fix=f"set max_length={limit} and on_overlong=drop, or raise "
            "max_position_embeddings in the model's config.json where its positions can be stretched",
        )  # fmt: skip


def _config(name: str, config: TrainingConfig) -> Any:
    return AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)


def _try_attention(name: str, found: Any, config: TrainingConfig) -> None:
    try:
        with torch.device("meta"):  # no memory, no weights: the constructor alone decides
            auto_class(found).from_config(
                found, attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise ConfigError(
            "this attention cannot be used with this model here", where=name, got=str(error).splitlines()[0],
            expected="one that the model takes and that is installed", fix="leave attn_implementation out, or sdpa",
        ) from None  # fmt: skip
