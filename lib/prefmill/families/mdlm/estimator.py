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

BLOCK = 8  # draws that balance each other; more would gain little and leave nothing to tell the error by


@dataclass(frozen=True)
class Draws:
    """n maskings of L tokens: `masked` [n, L] bool, `weights` [n] float64, or [n, L] where tokens differ in them.

    The estimate is the mean over draws of the sum of weight x log-probability over the masked tokens.
    """

    masked: NDArray[np.bool_]
    weights: NDArray[np.float64]


def draws_of(tokens: Sequence[int], length: int, num_draws: int, sampling: Sampling, seed: int, epoch: int) -> Draws:
    """The draws of a row in an epoch: its last `length` tokens are the response.

    They follow from (seed, the row's tokens, epoch) alone, so policy and reference have the same ones wherever and
    whenever they are scored.
    """
    content = np.asarray(tokens, dtype=np.int64).tobytes()
    digest = hashlib.sha256(f"{seed}:{epoch}:{length}:".encode() + content).digest()
    # NumPy seeds by whole numbers, not by bytes; as a list all 32 of them count.
    return draw(length, num_draws, sampling, np.random.default_rng(list(digest)))


def draw(length: int, num_draws: int, sampling: Sampling, generator: np.random.Generator) -> Draws:
    """`num_draws` maskings of `length` tokens; all but `inverse_t` mask l tokens without replacement.

    `balanced`: in independent blocks of at most BLOCK draws, each with mask counts drawn by `count_law`, spread evenly,
    and with masks that give every token about the same weight. `systematic`: the same blocks with uniform counts and
    independent masks. `iid`: independent uniform counts and masks (VRPO, arXiv 2505.19223). `inverse_t`: t ~ U(0, 1),
    every token masked with probability t, weight 1/t (its variance has no bound). The first 2, 4, 8, ... draws of the
    first two are such draws themselves.
    """
    if sampling == "inverse_t":
        t = 1.0 - generator.random(num_draws)  # in (0, 1]
        # The 1/t form of LLaDA's pretraining loss (arXiv 2502.09992, eq. 3).
        return Draws(generator.random((num_draws, length)) < t[:, None], 1.0 / t)
    if sampling == "iid":
        counts = generator.integers(1, length + 1, num_draws)
        return Draws(_independent_masks(counts, length, generator), length / counts)
    blocks = [_block(length, size, sampling, generator) for size in block_sizes(num_draws, sampling)]
    return Draws(*(np.concatenate(parts) for parts in zip(*((b.masked, b.weights) for b in blocks), strict=True)))


def block_sizes(num_draws: int, sampling: Sampling) -> list[int]:
    """Draws of each independent block, in their order: what an honest standard error is computed from."""
    if sampling in ("iid", "inverse_t"):
        return [1] * num_draws
    whole, rest = divmod(num_draws, BLOCK)
    return [BLOCK] * whole + [rest] * (rest > 0)


def count_law(length: int, sampling: Sampling) -> NDArray[np.float64]:
    """The probability of each mask count l in 1..L, [L]: uniform, or for `balanced` in proportion to 1 / sqrt(l).

    A draw of l tokens has a variance of about L^2/l under uniform counts. Few masked tokens weigh most, so they are
    drawn more often and weigh less: the product of probability and standard deviation is then even.
    """
    weights = np.arange(1, length + 1) ** (-0.5 if sampling == "balanced" else 0.0)
    return np.asarray(weights / weights.sum())


def balanced_masks(
    order: NDArray[np.int64], counts: NDArray[np.int64], weights: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Masks [n, L] of `counts` [n] tokens: one after another takes the tokens that have the least weight so far.

    Ties go by `order` [L]. What a mask takes is, up to the naming of the tokens, settled by the counts; under a random
    order every mask is therefore a uniformly random subset, and estimates stay unbiased. A sum over tokens, each with
    a value of its own whatever else is masked, is estimated nearly without error.
    """
    load = np.zeros(len(order))
    masked = np.zeros((len(counts), len(order)), dtype=np.bool_)
    for index, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        # Loads that are equal but for rounding have to tie, or sums would decide in place of the random order.
        lightest = order[np.argsort(load[order].round(9), kind="stable")[:count]]
        masked[index, lightest] = True
        load[lightest] += weight
    return masked


def ascending(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Mask counts from the smallest, which weigh most, so that later masks make up for them; [n].

    In runs that end at 2, 4, 8, ... each, so that these many draws are a sample by themselves.
    """
    ends = [0, *(2**power for power in range(1, len(counts).bit_length()))]
    runs = [np.sort(counts[start:end]) for start, end in pairwise([*ends, len(counts)])]
    return np.concatenate(runs)


def systematic_counts(offset: float, law: NDArray[np.float64], num_draws: int) -> NDArray[np.int64]:
    """Mask counts at the quantiles (offset + j/n) mod 1 of `law` [L]: [n] in [1, L], for `offset` in [0, 1).

    Each has the law's distribution when the offset is uniform, for every L and n. Where n is a power of two they come
    in bit-reversed order of j, so that the first n/2, n/4, ... are systematic too.
    """
    places = np.mod(offset + np.array(_spread_order(num_draws), dtype=np.float64) / num_draws, 1.0)
    counts = np.searchsorted(np.cumsum(law), places, side="right") + 1
    kept: NDArray[np.int64] = np.minimum(counts, len(law))  # the law's sum may round to below 1
    return kept


def recommend_draws(variance_of_one: float, beta: float, tolerance: float, most: int) -> int:
    """The smallest power of two of draws, at most `most`, with beta^2 x variance / n <= `tolerance`.

    `variance_of_one` is that of one draw's margin, in squared nats. A zero-mean error e of beta x margin moves the
    sigmoid loss by about s(1 - s) Var(e) / 2 <= Var(e) / 8 in the mean, s the logistic function.
    """
    needed = beta**2 * variance_of_one / tolerance
    power = max(0, math.ceil(math.log2(needed))) if needed > 1 else 0
    return int(min(2**power, most))


def _block(length: int, size: int, sampling: Sampling, generator: np.random.Generator) -> Draws:
    law = count_law(length, sampling)
    counts = systematic_counts(generator.random(), law, size)
    if sampling == "systematic":
        return Draws(_independent_masks(counts, length, generator), length / counts)
    counts = ascending(counts)
    weights = 1 / (counts * law[counts - 1])  # (1/L) / law(l), times L/l
    return Draws(balanced_masks(generator.permutation(length), counts, weights), weights)


def _independent_masks(counts: NDArray[np.int64], length: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    ranks = generator.permuted(np.tile(np.arange(length), (len(counts), 1)), axis=1)
    masked: NDArray[np.bool_] = ranks < counts[:, None]
    return masked


def _spread_order(num_draws: int) -> list[int]:
    if num_draws & (num_draws - 1):
        return list(range(num_draws))
    bits = num_draws.bit_length() - 1
    return [int(f"{index:0{bits}b}"[::-1], 2) if bits else 0 for index in range(num_draws)]
