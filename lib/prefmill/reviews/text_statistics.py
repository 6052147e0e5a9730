"""Length, diversity and repetition of a text, over lower-case words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Every run of `size` neighbours in `tokens`."""
    return [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]


def distinct_share(tokens: Sequence[str], size: int) -> float | None:
    """distinct-n: different n-grams over all n-grams, in (0, 1] (Li et al. 2016); None in a text without any.

    It falls with length by itself, so compare it between texts of similar length only.
    """
    grams = ngrams(tokens, size)
    return len(set(grams)) / len(grams) if grams else None


def repeated_share(tokens: Sequence[str], size: int) -> float:
    """The share of n-gram occurrences whose n-gram occurs more than once, in [0, 1]; 0 in a text without any."""
    counts = Counter(ngrams(tokens, size))
    total = counts.total()
    return sum(count for count in counts.values() if count > 1) / total if total else 0.0
