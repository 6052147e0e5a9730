"""What a model's configuration says already, held against tokenizer, rows and settings before weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from prefmill.core.errors import ConfigError
from prefmill.families.causal.loading import load_config
from prefmill.families.causal.positions import position_border
from prefmill.families.causal.quantized import require_trainable
from prefmill.families.causal.vision_parts import auto_class
from prefmill.families.causal.whole import require_embedded, require_writer, without_head
from prefmill.training.config import TrainingConfig

_log = logging.getLogger(__name__)


def check_start(name: str, config: TrainingConfig) -> None:
    """Raise InputError for a model that does not write, and for weights that are not trained.

    ConfigError for an attention that the model does not take.
    """
    found = load_config(name, config.revision, config.trust_remote_code)
    require_writer(name, found)
    for said in without_head(found):
        _log.warning("%s says that it is %s, without a head of its own: is it an embedding model?", name, said)
    require_trainable(name, found, config.quantization)
    if config.attn_implementation is not None:
        _try_attention(name, found, config)


def check_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, used: Iterable[Iterable[int]], config: TrainingConfig
) -> None:
    """Raise InputError for a token of rows, or the one that fills them up, that the model has no embedding for."""
    found = load_config(name, config.revision, config.trust_remote_code)
    require_embedded(chain(used, [[tokenizer.pad_token_id]]), tokenizer, found.get_text_config().vocab_size, name)


def check_positions(name: str, lengths: Iterable[int], config: TrainingConfig) -> None:
    """Raise ConfigError where a sequence has more tokens than the model has positions, or two sets of them are mixed.

    Beyond the positions training would end with an IndexError in the midst of it.
    """
    text = load_config(name, config.revision, config.trust_remote_code).get_text_config()
    limit, known = getattr(text, "max_position_embeddings", None), sorted(set(lengths))
    longest = max(known, default=0)
    if isinstance(limit, int) and longest > limit:
        raise ConfigError(
            "rows are longer than the model has positions", where=name, got=f"up to {longest} tokens",
            expected=f"at most {limit}", fix=f"set max_length={limit} and on_overlong=drop, or raise "
            "max_position_embeddings in the model's config.json where its positions can be stretched",
        )  # fmt: skip
    if (border := position_border(text)) is not None and known and known[0] <= border < longest:
        raise ConfigError(
            "this model has other positions for long sequences, and would read short ones by them where both stand in "
            "one batch", where=name, got=f"{known[0]} to {longest} tokens", expected=f"all up to {border}, or all over",
            fix=f"set max_length={border} and on_overlong=drop, or train on long and short rows apart",
        )  # fmt: skip


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
