"""How far two raters' yes and no agree, and what moves a score, with intervals from a bootstrap over papers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from prefmill.core.statistics import (
    MIN_PAPERS,
    Array,
    Resampling,
    correlations,
    f1,
    quotient,
    ranks,
    second_moments,
    statistic,
    sums_by,
    within,
)

Found = dict[str, Any]
_DIGITS = 6


def agreement(papers: Sequence[str], judge: Array, other: Array, resampling: Resampling) -> Found:
    """How far `judge` and `other` agree, yes as 1 and no as 0, [N] each, pooled over the answers.

    Kappa (Cohen 1960) and alpha are None where both say one and the same thing throughout, F1 of yes where nobody says
    it; AC1 is Gwet's (2008). A paper, named by `papers` [N], is drawn with all its answers;
    intervals are None below 2 papers. N is at least 1.
    """
    # Every measure below follows from sums of these cells, so that a bootstrap draw is a product of matrices.
    cells = np.stack([judge * other, judge * (1 - other), (1 - judge) * other, (1 - judge) * (1 - other)], axis=1)
    sums = sums_by(np.asarray(papers), cells)
    num_yes = (judge + other).sum()
    return {
        "num_answers": len(judge),
        "num_papers": len(sums),
        "yes_share": round(float(judge.mean()), _DIGITS),
        "other_yes_share": round(float(other.mean()), _DIGITS),
        "kappa": _interval(sums, resampling, _kappa, -1.0) if 0 < num_yes < 2 * len(judge) else None,
        "alpha": reliability(papers, judge + other, np.full(len(judge), 2.0), resampling),
        "ac1": _interval(sums, resampling, _ac1, -1.0),
        "f1": _interval(sums, resampling, partial(f1, otherwise=np.nan), 0.0) if num_yes else None,
        "accuracy": _interval(sums, resampling, _accuracy, 0.0),
    }


def reliability(papers: Sequence[str], num_yes: Array, num_answers: Array, resampling: Resampling) -> Found | None:
    """Krippendorff's alpha (2011, nominal) of several people: to each of N questions `num_answers` [N], 2 or more.

    None where all of all answers are alike. As in `agreement`, a paper is drawn with all its questions.
    """
    num_no, total = num_answers - num_yes, num_answers.sum()
    if not 0 < num_yes.sum() < total:
        return None
    differ = 2 * num_yes * num_no / (num_answers - 1)

    def alpha(cells: Array) -> Array:
        differ, yes, _ = (cells / cells[:, 1:].sum(axis=1, keepdims=True)).T
        # Chance draws two of all the answers without putting the first back.
        found: Array = 1 - (1 - 1 / total) * quotient(differ, 2 * yes * (1 - yes), np.nan)
        return found

    return _interval(sums_by(np.asarray(papers), np.stack([differ, num_yes, num_no], axis=1)), resampling, alpha, -1.0)


def mean_shift(papers: Sequence[str], shifts: Array, resampling: Resampling) -> Found:
    """The mean of `shifts` [N] over papers, every paper counting the same, with its interval; N is at least 1."""
    sums = sums_by(np.asarray(papers), np.column_stack([shifts, np.ones(len(shifts))]))
    return _interval(sums[:, :1] / sums[:, 1:], resampling, lambda means: means[:, 0])


def rank_correlation(papers: Sequence[str], first: Array, second: Array, resampling: Resampling) -> Found | None:
    """Spearman's correlation of `first` and `second` [N], with an interval over papers; None where one is constant.

    The ranks are those in the whole sample: they are not ranked anew in each draw.
    """
    # Two points always correlate at 1 or -1.
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    a, b = (ranks(values.tolist()) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    return _interval(sums_by(np.asarray(papers), second_moments(a, b)), resampling, correlations, -1.0)


def _interval(sums: Array, resampling: Resampling, function: Any, lowest: float | None = None) -> Found:
    """`function` of the sums' means, its interval cut at `lowest` and 1 where that is given."""
    if len(sums) < MIN_PAPERS:
        (value,) = function(sums.mean(axis=0, keepdims=True))
        return {"value": round(float(value), _DIGITS), "low": None, "high": None}
    found = statistic(sums, resampling, function)
    found = found if lowest is None else within(found, resampling, lowest)
    # Adding 0 makes a zero of the rounding's minus zero.
    return {name: round(getattr(found, name), _DIGITS) + 0.0 for name in ("value", "low", "high")}


def _accuracy(cells: Array) -> Array:
    result: Array = (cells[:, 0] + cells[:, 3]) / cells.sum(axis=1)
    return result


def _kappa(cells: Array) -> Array:
    shares = cells / cells.sum(axis=1, keepdims=True)
    judge, other = shares[:, 0] + shares[:, 1], shares[:, 0] + shares[:, 2]
    chance = judge * other + (1 - judge) * (1 - other)
    observed = shares[:, 0] + shares[:, 3]
    return quotient(observed - chance, 1 - chance, np.nan)


def _ac1(cells: Array) -> Array:
    shares = cells / cells.sum(axis=1, keepdims=True)
    differ = shares[:, 1] + shares[:, 2]
    yes = shares[:, 0] + differ / 2
    # Gwet's chance is that of raters who guess where they do not know: seldom where most answers are alike, so that
    # AC1 stays high there where kappa falls to 0.
    result: Array = 1 - differ / (1 - 2 * yes * (1 - yes))
    return result
