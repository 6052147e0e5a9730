"""Token ids of texts that write their special tokens out, where many texts begin alike.

A pair of reviews is two chats about one paper, and each chat is tokenised whole and up to its answer. A fast tokenizer
cuts a text at its special tokens before it does anything else, so that the ids of the pieces are those of the text:
the paper is tokenised once.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECES = 64  # kept; enough for chats that share a paper and stand together
_NUMBERS: dict[int, int] = {}  # each once: a tokenizer makes one anew for every token, 28 of 36 bytes in memory


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of `text` as `tokenizer` gives them without a special token of its own in front."""
    size = len(tokenizer)
    special = _special_tokens(tokenizer, size)
    starts = [found.start() for found in special.finditer(text)] if special else []
    pieces = [text[start:end] for start, end in pairwise([0, *starts, len(text)])]
    return [token for piece in pieces for token in _ids(tokenizer, size, piece)]


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str] | None:
    """The tokens that the tokenizer looks for first, the longest first as it does; None where it is not sure to cut.

    Its `size` is a part of the key: a token may be added.
    """
    if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
        return None
    # Normalized ones are looked for between these.
    first = [token for token in tokenizer.added_tokens_decoder.values() if not token.normalized]
    # A token that looks at what stands before it cannot begin a piece.
    if not first or any(token.lstrip or token.single_word for token in first):
        return None
    longest_first = sorted((token.content for token in first), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


@lru_cache(maxsize=_PIECES)
def _ids(tokenizer: PreTrainedTokenizerBase, size: int, piece: str) -> tuple[int, ...]:
    # A chat template writes special tokens itself: the tokenizer would put a second BOS in front.
    return tuple(_NUMBERS.setdefault(token, token) for token in tokenizer(piece, add_special_tokens=False)["input_ids"])
