"""Statistics over papers: the bootstrap, intervals, p-values, folds and ranks; the reviews of one paper are alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefmill.core.errors import InputError

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
MIN_PAPERS = 2
_NORMAL = NormalDist()
_NO_WIDTH = 1e-9  # what rounding leaves of the spread of equal draws
_CHUNK_CELLS = 4_000_000  # drawn at a time: 32 MB
_KEPT_CELLS = 128_000_000  # draws up to 128 MB are kept: a comparison asks for the same ones a hundred times


@dataclass(frozen=True)
class Resampling:
    """How to resample: the same seed gives the same papers, so quantities stay comparable; `confidence` in (0, 1)."""

    num_resamples: int = 10_000
    seed: int = 0
    confidence: float = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, and the two-sided p-value of its being zero."""

    value: float
    low: float
    high: float
    p_value: float
    num_papers: int


def means(values: Array, resampling: Resampling) -> list[Estimate]:
    """The mean over papers of each column of `values` [P, K], one row a paper.

    A paper is drawn with all its reviews (cluster bootstrap, Davison and Hinkley 1997, section 3.8). Percentile
    intervals are too short for few papers, so they are stretched by the t-quantile and the small-sample factor
    (Hesterberg 2015, "expanded percentile"); the p-value inverts these intervals. Raises InputError below 2 papers.
    """
    return _estimates(values, resampling, lambda drawn: drawn)


def statistic(values: Array, resampling: Resampling, function: Statistic) -> Estimate:
    """A function of column means: `function` takes means [R, K] and gives a number for each of the R rows, [R]."""
    (estimate,) = _estimates(values, resampling, lambda drawn: function(drawn)[:, None])
    return estimate


def within(estimate: Estimate, resampling: Resampling, lowest: float = 0.0, highest: float = 1.0) -> Estimate:
    """An estimate of a quantity in [lowest, highest]: its interval cut there, and never without a width.

    Where all n papers agree on one value c, every draw is c. None of n differs, so at most u = z^2 / (n + z^2) of all
    papers do (Wilson's upper bound of 0 of n, 1927), and those may lie at either end; at 0 and 1 this is Wilson's
    interval of a share. The p-value of zero inverts the same interval.
    """
    low, high = max(lowest, estimate.low), min(highest, estimate.high)
    if high - low > _NO_WIDTH:
        return replace(estimate, low=low, high=high)
    value, others = estimate.value, wilson(0.0, estimate.num_papers, resampling.confidence)[1]
    end = lowest if value > 0 else highest
    needed = value / (value - end) if value else 0.0  # the share of others that takes the mean to zero
    p_value = 2 * (1 - _NORMAL.cdf(math.sqrt(estimate.num_papers * needed / (1 - needed)))) if needed < 1 else 0.0
    low, high = value - others * (value - lowest), value + others * (highest - value)
    return replace(estimate, low=low, high=high, p_value=max(p_value, 2 / (resampling.num_resamples + 1)))


def wilson(share: float, count: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` (1927)."""
    z = _NORMAL.inv_cdf((1 + confidence) / 2)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number by Holm's step-down method (1979), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        # A larger p-value may not come out below a smaller one.
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _estimates(values: Array, resampling: Resampling, function: Callable[[Array], Array]) -> list[Estimate]:
    num_papers = len(values)
    if num_papers < MIN_PAPERS:
        raise InputError(
            "too few papers to compare", got=num_papers, expected=f"at least {MIN_PAPERS} papers with this measure",
            fix="evaluate more papers: raise num_papers, or give the test split a larger share in ingest_reviews",
        )  # fmt: skip
    value = function(values.mean(axis=0, keepdims=True))[0]
    drawn = np.concatenate([function(weights @ values) for weights in _weights(num_papers, resampling)])
    drawn = np.where(np.isnan(drawn), value, drawn)  # a draw without a measure, as kappa of one answer, tells nothing
    draws = value + (drawn - value) * _stretch(num_papers, resampling.confidence)
    tail = (1 - resampling.confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    columns = np.stack([value, low, high, _two_sided(value, drawn, num_papers)], axis=1)
    return [Estimate(mean, lower, upper, p_value, num_papers) for mean, lower, upper, p_value in columns.tolist()]


def _two_sided(value: Array, drawn: Array, num_papers: int) -> Array:
    """[K] p-values of zero: the level whose interval just reaches it, each level's being stretched by its own quantile.

    One is added to the counts, as the sample itself is one of the possible draws. Of papers that all agree nobody
    knows the spread: there it is the sign test's.
    """
    towards_zero = np.sort((drawn - value) * np.sign(value), axis=0)[: len(drawn) // 2]
    below = (np.abs(value) + towards_zero * _stretches(num_papers, len(drawn))[:, None] <= 0).sum(axis=0)
    p_values: Array = np.minimum(1.0, 2 * (below + 1) / (len(drawn) + 1))
    agree = (np.ptp(drawn, axis=0) <= _NO_WIDTH) & (value != 0)
    return np.where(agree, np.maximum(p_values, 2.0 ** (1 - num_papers)), p_values)


@lru_cache(maxsize=8)
def _stretches(num_papers: int, num_draws: int) -> Array:
    """The stretch [num_draws // 2] of the interval that begins at each draw, from the lowest one on."""
    stretches: Array = _stretch(num_papers, 1 - 2 * np.arange(1, num_draws // 2 + 1) / (num_draws + 1))
    return stretches


def _stretch(num_papers: int, confidence: Any) -> Any:
    """For a confidence, or an array of them."""
    from scipy.special import ndtri, stdtrit  # a second, for what `prefmill --help` does not need

    probability = (1 + confidence) / 2
    return stdtrit(num_papers - 1, probability) / ndtri(probability) * math.sqrt(num_papers / (num_papers - 1))


def _weights(num_papers: int, resampling: Resampling) -> Iterator[Array]:
    """How often each paper is drawn, as shares [r, P], a chunk at a time."""
    fits = num_papers * resampling.num_resamples <= _KEPT_CELLS
    for counts in (_kept_counts if fits else _draw_counts)(num_papers, resampling):
        yield counts / num_papers


@lru_cache(maxsize=2)
def _kept_counts(num_papers: int, resampling: Resampling) -> tuple[NDArray[np.uint8], ...]:
    return tuple(_draw_counts(num_papers, resampling))


def _draw_counts(num_papers: int, resampling: Resampling) -> Iterator[NDArray[np.uint8]]:
    """Each paper is drawn once on average, so that a count never comes near the 255 that a byte holds."""
    generator = np.random.default_rng(resampling.seed)
    chunk = max(1, _CHUNK_CELLS // num_papers)
    for start in range(0, resampling.num_resamples, chunk):
        rows = min(chunk, resampling.num_resamples - start)
        yield generator.multinomial(num_papers, np.full(num_papers, 1 / num_papers), size=rows).astype(np.uint8)


def sums_by(papers: NDArray[Any], values: Array) -> Array:
    """The sums over each paper's rows of `values` [N, K], in order of the papers: [P, K]."""
    names, index = np.unique(papers, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    # Not sums[index] += values, which adds one row alone where an index is repeated.
    np.add.at(sums, index, values)
    return sums


def second_moments(a: Array, b: Array) -> Array:
    """What `correlations` needs of two values [N] each: 1, a, b, a², b² and ab, [N, 6]."""
    return np.stack([np.ones(len(a)), a, b, a * a, b * b, a * b], axis=1)


def correlations(means: Array) -> Array:
    """Correlations [R] from means [R, 6] of `second_moments`; zero where either side does not vary."""
    a, b, squares, other_squares, both = (means[:, 1:] / means[:, :1]).T
    spread = np.sqrt(np.maximum(squares - a**2, 0) * np.maximum(other_squares - b**2, 0))
    return np.where(spread > 1e-12, (both - a * b) / np.maximum(spread, 1e-12), 0.0)


def quotient(part: Array, whole: Array, otherwise: float) -> Array:
    """`part` / `whole`, both [N]; `otherwise` where the whole is 0 but for rounding."""
    result: Array = np.divide(part, whole, out=np.full_like(whole, otherwise), where=whole > 1e-12)
    return result


def f1(counts: Array, otherwise: float) -> Array:
    """2 TP / (2 TP + FP + FN) of rows whose first columns these are; `otherwise` where there was nothing to find."""
    return quotient(2 * counts[:, 0], 2 * counts[:, 0] + counts[:, 1] + counts[:, 2], otherwise)


def correlation(left: Sequence[float] | Array, right: Sequence[float] | Array) -> float:
    """Pearson's correlation, 0 where either side is constant."""
    # NumPy would divide by a deviation of 0 and give NaN.
    if len(set(left)) < 2 or len(set(right)) < 2:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Ranks from 0, [N], equal values at the mean of their ranks."""
    from scipy.stats import rankdata

    result: Array = rankdata(values) - 1
    return result


def assign_folds(papers: NDArray[np.int64], num_folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for every review [N]; the reviews of a paper share one, and folds differ by at most one paper."""
    unique, index = np.unique(papers, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(unique))
    folds: NDArray[np.int64] = (order % num_folds)[index]
    return folds
