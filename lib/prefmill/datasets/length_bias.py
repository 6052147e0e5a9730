"""How far length alone predicts which review is preferred, with an interval that knows pairs of a paper are alike."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

_CONFIDENCE = 0.95


class ShareInterval(NamedTuple):
    """An estimate in [0, 1] and its 95 % interval."""

    value: float
    low: float
    high: float


class LengthBias:
    """Takes pairs in, paper by paper; memory grows with the number of distinct lengths and papers' sums only."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self._group: str | None = None
        self._wins, self._size = 0.0, 0  # of the current paper
        self._papers: Counter[tuple[float, int]] = Counter()  # by wins and size
        self._chosen: Counter[int] = Counter()
        self._rejected: Counter[int] = Counter()

    def add(self, group: str, chosen_length: int, rejected_length: int) -> None:
        """Take in a pair of the paper `group`; the pairs of a paper come one after another."""
        if group != self._group:
            self._close_group()
            self._group = group
        self.num_pairs += 1
        self._wins += 1.0 if chosen_length > rejected_length else 0.5 if chosen_length == rejected_length else 0.0
        self._size += 1
        self._chosen[chosen_length] += 1
        self._rejected[rejected_length] += 1

    def accuracy(self) -> ShareInterval:
        """How often "the longer one wins" is right, ties counting half, with a cluster-robust interval.

        The variance of a ratio of sums over papers (Cochran 1977, section 6.3), or where it vanishes because all
        papers agree, Wilson's interval over papers. There must be pairs.
        """
        assert self.num_pairs, "no pairs"
        self._close_group()
        count, groups = self.num_pairs, self._papers.total()
        mean = sum(wins * times for (wins, _), times in self._papers.items()) / count
        squares = sum((wins - mean * size) ** 2 * times for (wins, size), times in self._papers.items())
        if groups < 2 or squares <= 1e-9 * count:
            from prefmill.core.statistics import wilson  # numpy, which no stage imports while it is only listed

            return ShareInterval(mean, *wilson(mean, groups, _CONFIDENCE))
        from scipy.special import stdtrit

        # t and groups / (groups - 1), as mean and spread were estimated from the same few papers (Cameron and Miller
        # 2015, section VI): with 1.96 the interval of 4 papers covers 83 %.
        quantile = stdtrit(groups - 1, (1 + _CONFIDENCE) / 2)
        error = float(quantile) * math.sqrt(squares * groups / (groups - 1)) / count
        return ShareInterval(mean, max(0.0, mean - error), min(1.0, mean + error))

    def auc(self) -> float:
        """The probability that a chosen review drawn at random is longer than a rejected one (Mann-Whitney U / nm)."""
        below = won = 0.0
        for length in sorted(self._chosen.keys() | self._rejected.keys()):
            won += self._chosen[length] * (below + self._rejected[length] / 2)
            below += self._rejected[length]
        return won / (self.num_pairs**2)

    def _close_group(self) -> None:
        if self._size:
            self._papers[self._wins, self._size] += 1
        self._wins, self._size = 0.0, 0
