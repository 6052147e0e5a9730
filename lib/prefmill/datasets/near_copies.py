"""Texts that say nearly the same in two splits, as after a resubmission or an edit: exact keys do not find them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from prefmill.datasets.occurrences import FileLine, Files, Occurrences

_WINDOW = 48  # bytes, some eight words
_KEPT = 8
_SHARED = 5  # of those kept: with 0.7 of all windows in common 93 % of the copies are found, with 0.3 one in ten
_WEIGHTS = np.array([3, 5, 7, 11, 13, 17], np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # odd; products wrap
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SPACE = ord(" ")


class NearCopies:
    """Where near copies of texts occur in other splits; each text of a split is looked at once."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._known: dict[str, set[int]] = {}
        self._found: dict[str, Occurrences] = {}

    def add(self, split: str, text: str, key: int, file: str, line: int) -> None:
        """Note a text of `split`; `key` is its fingerprint."""
        known = self._known.setdefault(split, set())
        if key in known:
            return
        known.add(key)
        found = self._found.setdefault(split, Occurrences(self._files))
        for value in sketch(text):
            found.add(value, file, line)

    def shared(self, split: str, other: str) -> Iterator[tuple[FileLine, FileLine]]:
        """The places of near copies in both splits, exact ones among them, in the order of the first."""
        if split in self._found and other in self._found:
            pairs = Counter(self._found[split].shared_with(self._found[other]))
            yield from (pair for pair, count in pairs.items() if count >= _SHARED)


def sketch(text: str) -> list[int]:
    """The least hashes of all windows that begin at a word: of two texts they share what the windows do (Broder 1997).

    Empty for a text of fewer windows; case and the amount of white space make no difference.
    """
    data = np.frombuffer(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"), np.uint8)
    if len(data) < _WINDOW:
        return []
    starts = np.flatnonzero(data[: len(data) - _WINDOW] == _SPACE) + 1
    if len(starts) <= _KEPT:
        return []
    # Not sliding_window_view, which takes as long as all the rest.
    windows = np.lib.stride_tricks.as_strided(data, (len(data) - _WINDOW + 1, _WINDOW), (1, 1))[starts]
    hashes: NDArray[np.uint64] = windows.view("<u8") @ _WEIGHTS
    for shift in (np.uint64(31), np.uint64(29)):  # a product's low bits depend on low bits alone
        hashes = (hashes ^ (hashes >> shift)) * _MIX
    return sorted(set(np.partition(hashes, _KEPT)[:_KEPT].tolist()))
