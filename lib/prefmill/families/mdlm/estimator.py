"""Which tokens are masked in which draw, and what a draw weighs: unbiased estimators of a response's likelihood bound.

B(y|x) = E_l [ (L/l) sum_{i masked} log p(y_i | y with l tokens masked, x) ], l uniform on {1..L}, the l tokens drawn
without replacement (LLaDA, arXiv 2502.09992, eq. 14). A draw is one masking; an estimate is the mean of n draws.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from prefmill.families.mdlm.config import Sampling


@dataclass(frozen=True)
class Draws:
    """n maskings of L tokens: `masked` [n, L] bool, `weights` [n] float64, at least 1.

    The estimate is the mean over draws of weight x (sum of the masked tokens' log-probabilities).
    """

    masked: NDArray[np.bool_]
    weights: NDArray[np.float64]


def draws_of(
    tokens: Sequence[int],
    length: int,
    num_draws: int,
    sampling: Sampling,
    seed: int,
    epoch: int,
    nested: bool = False,
) -> Draws:
    """The draws of a row in an epoch: its last `length` tokens are the response.

    They follow from (seed, the row's tokens, epoch) alone, so policy and reference have the same ones wherever and
    whenever they are scored.
    """
    content = np.asarray(tokens, dtype=np.int64).tobytes()
    digest = hashlib.sha256(f"{seed}:{epoch}:{length}:".encode() + content).digest()
    return draw(length, num_draws, sampling, np.random.default_rng(list(digest)), nested)


def draw(
    length: int, num_draws: int, sampling: Sampling, generator: np.random.Generator, nested: bool = False
) -> Draws:
    """`num_draws` maskings of `length` tokens; all but `inverse_t` mask l tokens without replacement.

    `systematic`: mask counts l = floor((u + jL/n) mod L) + 1 with one u ~ U[0, L): each is uniform, and together they
    spread evenly. `balanced`: systematic, and masks that give every token about the same weight in all. `iid`:
    independent uniform counts and masks (VRPO, arXiv 2505.19223). `inverse_t`: t ~ U(0, 1), every token masked with
    probability t, weight 1/t (its variance has no bound). `nested`: the first 2, 4, 8, ... are such draws themselves.
    """
    if sampling == "inverse_t":
        t = 1.0 - generator.random(num_draws)  # in (0, 1]
        return Draws(generator.random((num_draws, length)) < t[:, None], 1.0 / t)
    if sampling == "iid":
        counts = generator.integers(1, length + 1, num_draws)
    else:
        counts = systematic_counts(generator.random() * length, length, num_draws)
    if sampling == "balanced":
        counts = ascending(counts, nested)
        return Draws(balanced_masks(generator.permutation(length), counts), length / counts)
    ranks = generator.permuted(np.tile(np.arange(length), (num_draws, 1)), axis=1)
    return Draws(ranks < counts[:, None], length / counts)


def balanced_masks(order: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Masks [n, L] of `counts` [n] tokens: one after another takes the tokens that have the least weight so far.

    Ties go by `order` [L]. What a mask takes is, up to the naming of the tokens, settled by the counts; under a random
    order every mask is therefore a uniformly random subset, and estimates stay unbiased. A sum over tokens, each with
    a value of its own whatever else is masked, is estimated nearly without error.
    """
    length = len(order)
    load = np.zeros(length)
    masked = np.zeros((len(counts), length), dtype=np.bool_)
    for index, count in enumerate(counts):
        lightest = order[np.argsort(load[order].round(9), kind="stable")[:count]]
        masked[index, lightest] = True
        load[lightest] += length / count
    return masked


def ascending(counts: NDArray[np.int64], nested: bool) -> NDArray[np.int64]:
    """Mask counts from the smallest, which weigh most, so that later masks make up for them; [n].

    `nested`: in runs that end at 2, 4, 8, ... each.
    """
    if not nested:
        return np.sort(counts)
    ends = [0, *(2**power for power in range(1, len(counts).bit_length()))]
    runs = [np.sort(counts[start:end]) for start, end in pairwise([*ends, len(counts)])]
    return np.concatenate(runs)


def systematic_counts(offset: float, length: int, num_draws: int) -> NDArray[np.int64]:
    """Mask counts l_j = floor((offset + jL/n) mod L) + 1, [n] in [1, L], for `offset` in [0, L).

    Each is uniform on {1..L} when the offset is, for every L and n. Where n is a power of two they come in
    bit-reversed order of j, so that the first n/2, n/4, ... are systematic too.
    """
    steps = np.array(_spread_order(num_draws), dtype=np.float64) * length / num_draws
    counts = np.floor(np.mod(offset + steps, length)).astype(np.int64) + 1
    kept: NDArray[np.int64] = np.minimum(counts, length)  # the sum may round up to L
    return kept


def recommend_draws(variance_of_one: float, beta: float, tolerance: float, most: int) -> int:
    """The smallest power of two of draws, at most `most`, with beta^2 x variance / n <= `tolerance`.

    `variance_of_one` is that of one draw's margin, in squared nats. A zero-mean error e of beta x margin moves the
    sigmoid loss by about s(1 - s) Var(e) / 2 <= Var(e) / 8 in the mean, s the logistic function.
    """
    needed = beta**2 * variance_of_one / tolerance
    power = max(0, math.ceil(math.log2(needed))) if needed > 1 else 0
    return int(min(2**power, most))


def _spread_order(num_draws: int) -> list[int]:
    if num_draws & (num_draws - 1):
        return list(range(num_draws))
    bits = num_draws.bit_length() - 1
    return [int(f"{index:0{bits}b}"[::-1], 2) if bits else 0 for index in range(num_draws)]
