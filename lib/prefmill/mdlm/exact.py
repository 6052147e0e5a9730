"""Joint distributions small enough to know exactly: what estimators of a likelihood are checked against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from prefmill.mdlm.estimator import Draws

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Joint:
    """A distribution over all sequences of L tokens out of V: `table` [V, V, ..., V], L axes, sums to 1."""

    table: Floats

    @property
    def length(self) -> int:
        """L, the tokens of a sequence."""
        return self.table.ndim

    def log_probability(self, sequence: tuple[int, ...]) -> float:
        """log p of the whole sequence, in nats."""
        return float(np.log(self.table[sequence]))

    def masked_sums(self, sequence: tuple[int, ...]) -> Floats:
        """For every set of masked tokens, by its bits: sum over them of log p(token | the tokens not masked), [2^L].

        Brute force: each conditional is a ratio of sums of the table.
        """
        return np.array([self._masked_sum(sequence, bits) for bits in range(2**self.length)])

    def _masked_sum(self, sequence: tuple[int, ...], bits: int) -> float:
        masked = [place for place in range(self.length) if bits >> place & 1]
        known = self.table[tuple(slice(None) if bits >> n & 1 else token for n, token in enumerate(sequence))]
        total = 0.0
        for axis, place in enumerate(masked):
            others = tuple(other for other in range(len(masked)) if other != axis)
            marginal = known.sum(axis=others)
            total += float(np.log(marginal[sequence[place]] / marginal.sum()))
        return total


def random_joint(vocabulary: int, length: int, seed: int, tilt: float = 1.0) -> Joint:
    """A joint of random log-probabilities with a standard deviation of `tilt`, neighbours tied to one another."""
    generator = np.random.default_rng(seed)
    logits = tilt * generator.normal(size=(vocabulary,) * length)
    pull = tilt * generator.normal(size=(vocabulary, vocabulary))
    for place in range(length - 1):
        shape = [1] * length
        shape[place] = shape[place + 1] = vocabulary
        logits = logits + pull.reshape(shape)
    table = np.exp(logits - logits.max())
    return Joint(table / table.sum())


def near(joint: Joint, seed: int, distance: float) -> Joint:
    """Another joint whose log-probabilities differ from those of `joint` by `distance` in standard deviation."""
    noise = np.random.default_rng(seed).normal(size=joint.table.shape)
    table = joint.table * np.exp(distance * noise)
    return Joint(table / table.sum())


def estimate(draws: Draws, sums: Floats) -> float:
    """The mean over the draws of weight x masked sum, `sums` [2^L] as `Joint.masked_sums` gives them."""
    places = draws.masked @ (1 << np.arange(draws.masked.shape[1]))
    return float(np.mean(draws.weights * sums[places]))


def moments_by_count(sums: Floats, length: int) -> tuple[Floats, Floats]:
    """Mean and variance of one draw with exactly l masked tokens, over all masks, for l = 1..L; [L] each."""
    means, variances = np.empty(length), np.empty(length)
    for count in range(1, length + 1):
        values = np.array([length / count * sums[bits] for bits in subsets(length, count)])
        assert len(values) == comb(length, count)
        means[count - 1], variances[count - 1] = values.mean(), values.var()
    return means, variances


def subsets(length: int, count: int) -> Iterator[int]:
    """Every set of `count` out of `length` tokens, as bits."""
    for places in combinations(range(length), count):
        yield sum(1 << place for place in places)
