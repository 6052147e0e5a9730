"""A masked-diffusion "model" of any length whose likelihoods are known: a Markov chain's own conditionals.

A masked token depends on the nearest tokens that are not masked, left and right; as every conditional is that of one
joint, the bound B(y) is log p(y) itself, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MarkovChain:
    """Tokens of V words, L at most: `transitions` [V, V], each row sums to 1; the first is drawn from `start` [V]."""

    transitions: Floats
    start: Floats
    length: int

    @cached_property
    def steps(self) -> Floats:
        """The probabilities of going from one word to another in 0, 1, ..., L steps: [L + 1, V, V]."""
        powers = [np.eye(len(self.start))]
        for _ in range(self.length):
            powers.append(powers[-1] @ self.transitions)
        return np.array(powers)

    def sample(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """A sequence [L]."""
        words = [generator.choice(len(self.start), p=self.start)]
        for _ in range(self.length - 1):
            words.append(generator.choice(len(self.start), p=self.transitions[words[-1]]))
        return np.array(words)

    def log_probability(self, words: NDArray[np.int64]) -> float:
        """log p(words), in nats."""
        return float(np.log(self.start[words[0]]) + np.log(self.transitions[words[:-1], words[1:]]).sum())

    def masked_logps(self, words: NDArray[np.int64], masked: NDArray[np.bool_]) -> Floats:
        """log p of each masked word given those that are not, [n, L], 0 elsewhere; `masked` [n, L]."""
        known = np.concatenate([np.zeros((len(masked), 1), bool), ~masked, np.zeros((len(masked), 1), bool)], axis=1)
        places = np.arange(self.length + 2)
        left = np.maximum.accumulate(np.where(known, places, 0), axis=1)[:, :-2]
        right = np.minimum.accumulate(np.where(known, places, self.length + 1)[:, ::-1], axis=1)[:, ::-1][:, 2:]
        found = np.zeros(masked.shape)
        for row, place in zip(*masked.nonzero(), strict=True):
            found[row, place] = self._conditional(words, place + 1, int(left[row, place]), int(right[row, place]))
        return found

    def _conditional(self, words: NDArray[np.int64], place: int, left: int, right: int) -> float:
        """log p of the word at `place` (from 1) between the known places `left` and `right`; 0 and L + 1 are none."""
        before = self.start @ self.steps[place - 1] if left == 0 else self.steps[place - left][words[left - 1]]
        after = np.ones(len(self.start)) if right > self.length else self.steps[right - place][:, words[right - 1]]
        weights = before * after
        return float(np.log(weights[words[place - 1]] / weights.sum()))


def random_chain(num_words: int, length: int, seed: int) -> MarkovChain:
    """A chain with clear preferences: logits with a standard deviation of 1.5; every word is as likely to be first."""
    logits = 1.5 * np.random.default_rng(seed).normal(size=(num_words, num_words))
    return _chain(logits, length)


def near(chain: MarkovChain, distance: float, seed: int) -> MarkovChain:
    """Another chain whose logits differ by `distance` in standard deviation."""
    noise = np.random.default_rng(seed).normal(size=chain.transitions.shape)
    return _chain(np.log(chain.transitions) + distance * noise, chain.length)


def _chain(logits: Floats, length: int) -> MarkovChain:
    weights = np.exp(logits)
    num_words = len(logits)
    return MarkovChain(weights / weights.sum(1, keepdims=True), np.full(num_words, 1 / num_words), length)
