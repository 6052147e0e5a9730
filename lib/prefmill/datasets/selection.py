"""Which reviews are good enough to imitate: the best fraction by checkmark score, with one cut for all splits."""

from __future__ import annotations

import hashlib
import math
from array import array
from typing import NamedTuple

from prefmill.core.records import EvaluationScores


class Rank(NamedTuple):
    """A review's place, best first: checkmark score, then mean P(yes), then 64 bits of sha256 of its id."""

    minus_checkmark_score: float
    minus_mean_p_yes: float
    id_hash: int


def rank(evaluation: EvaluationScores) -> Rank:
    """The place of a review; smaller is better, and no two reviews are equal."""
    # A hash and not the id itself: ids of a source often begin alike, and one source would win all ties.
    digest = hashlib.sha256(evaluation["review_id"].encode()).digest()
    return Rank(-evaluation["checkmark_score"], -evaluation["mean_p_yes"], int.from_bytes(digest[:8]))


class Ranking:
    """The ranks of many reviews in 24 bytes each, so that a million take 24 MB."""

    def __init__(self) -> None:
        self._scores, self._probabilities, self._hashes = array("d"), array("d"), array("Q")

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, item: Rank) -> None:
        """Take in one review."""
        self._scores.append(item.minus_checkmark_score)
        self._probabilities.append(item.minus_mean_p_yes)
        self._hashes.append(item.id_hash)

    def cut(self, fraction: float) -> Rank:
        """The last rank inside the best `fraction` (0, 1] of the reviews, at least one; there must be some."""
        import numpy as np

        assert len(self), "no reviews to rank"
        # lexsort takes its last argument first: the order of Rank, from behind.
        order = np.lexsort((self._hashes, self._probabilities, self._scores))
        last = int(order[num_selected(len(self), fraction) - 1])
        return Rank(self._scores[last], self._probabilities[last], self._hashes[last])

    def num_tied(self, cut: Rank) -> int:
        """How many reviews have the checkmark score at which the cut falls."""
        import numpy as np

        return int((np.asarray(self._scores) == cut.minus_checkmark_score).sum())


def num_selected(num_reviews: int, fraction: float) -> int:
    """`fraction` of `num_reviews`, rounded down, at least 1; 0.29 of 100 is 29 in spite of binary fractions."""
    return max(1, math.floor(fraction * num_reviews + 1e-9))
