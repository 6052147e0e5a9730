"""A masked-diffusion "model" of any length whose likelihoods are known: a Markov chain's own conditionals.

A masked token depends on the nearest tokens that are not masked, left and right; as every conditional is that of one
joint, the bound B(y) is log p(y) itself, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    tables: dict[bytes, Floats] = field(default_factory=dict, compare=False)

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
        rows, columns = masked.nonzero()
        found = np.zeros(masked.shape)
        found[rows, columns] = self._conditionals(words)[columns, left[rows, columns], right[rows, columns]]
        return found

    def _conditionals(self, words: NDArray[np.int64]) -> Floats:
        """log p of the word at each place between its nearest known places, [L, L + 2, L + 2]; 0 and L + 1 are none."""
        key = words.tobytes()
        if key not in self.tables:  # asked millions of times for a few responses
            table = np.zeros((self.length, self.length + 2, self.length + 2))
            for place in range(1, self.length + 1):
                before = np.array([self._before(words, place, left) for left in range(place)])
                after = np.array([self._after(words, place, right) for right in range(place + 1, self.length + 2)])
                word = words[place - 1]
                shares = before[:, None, word] * after[None, :, word] / (before @ after.T)
                table[place - 1, :place, place + 1 :] = np.log(shares)
            self.tables[key] = table
        return self.tables[key]

    def _before(self, words: NDArray[np.int64], place: int, left: int) -> Floats:
        return self.start @ self.steps[place - 1] if left == 0 else self.steps[place - left][words[left - 1]]

    def _after(self, words: NDArray[np.int64], place: int, right: int) -> Floats:
        return np.ones(len(self.start)) if right > self.length else self.steps[right - place][:, words[right - 1]]


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
