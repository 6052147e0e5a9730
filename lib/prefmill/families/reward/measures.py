"""How well a reward model's heads predict held-out choices: F1, accuracy, calibration, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefmill.core.statistics import MIN_PAPERS, Array, Resampling, Statistic, f1, quotient, statistic, sums_by, within

DIGITS = 6
NUM_BINS = 10
# A grid in steps of 2 %: it needs no starting point, and gives the same on every machine.
_TEMPERATURES = np.geomspace(0.02, 50, 401)
_BANDS = np.linspace(0, 0.25, 51)


def fit_temperature(margins: Array, labels: Array) -> float:
    """The T > 0 for which s(margin / T) is the likeliest (Guo et al. 2017, arXiv 1706.04599); 1 without a label.

    `margins` and `labels` are [N], labels NaN where nobody said. It turns no prediction round. Labels are drawn a
    little towards 1/2, as Platt did (1999): of a few pairs all predicted rightly it does not follow that T is 0.
    """
    known = ~np.isnan(labels)
    if not known.any():
        return 1.0
    num = int(known.sum())
    smoothed = (labels[known] * num + 1) / (num + 2)
    losses = [_log_loss(margins[known] / temperature, smoothed) for temperature in _TEMPERATURES]
    return round(float(_TEMPERATURES[int(np.argmin(losses))]), 4)


def fit_tie_band(margins: Array, labels: Array) -> float:
    """The band b in [0, 0.25] within which |s(margin) - 1/2| is best called a tie; the smallest of the best."""
    known = ~np.isnan(labels)
    if not known.any():
        return 0.0
    scores = [float(tie_aware(margins[known], labels[known], band).mean()) for band in _BANDS]
    return round(float(_BANDS[int(np.argmax(scores))]), 4)


def tie_aware(margins: Array, labels: Array, band: float) -> Array:
    """[N]: 1 for a prediction that is right, 1/2 where either side says tie alone, 0 for the wrong side.

    As Pick-a-Pic counts (Kirstain et al. 2023, arXiv 2305.01569): a prediction within `band` of 1/2 is a tie.
    """
    said = np.where(np.abs(_probability(margins) - 0.5) <= band, 0.0, np.sign(margins))
    # Rounded first: a share of votes that is 1/2 may differ from it in its last bit, and is a tie.
    scores: Array = 1 - np.abs(said - np.sign(np.round(labels - 0.5, 9))) / 2
    return scores


def calibration_error(margins: Array, labels: Array) -> float:
    """The expected calibration error over 10 equal bins of s(margin) in [1/2, 1], against the labels; [N] each.

    A prediction below 1/2 counts as that of the other side, so that turning a pair round changes nothing.
    """
    turned = margins < 0
    p = np.where(turned, 1 - _probability(margins), _probability(margins))
    y = np.where(turned, 1 - labels, labels)
    bins = np.minimum(((p - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs((p[bins == index] - y[bins == index]).sum()) for index in range(NUM_BINS)]
    return float(sum(gaps) / len(p))


def measure_head(
    margins: Array,
    labels: Array,
    flipped: NDArray[np.bool_],
    prompts: Sequence[str],
    temperature: float,
    band: float,
    resampling: Resampling,
) -> dict[str, Any] | None:
    """What metrics.json says of one head on one split; None where no pair has a label.

    `margins` [N] are r(preferred) - r(rejected). `flipped` is a coin a pair: which of its images counts as the first,
    so that F1 of "the first is better" is 1/2 for a guess and not the 2/3 of a list whose winners stand in front.
    Ties (a label of 1/2) are left out of F1 and accuracy, and count in the tie-aware accuracy.
    """
    known = ~np.isnan(labels)
    if not known.any():
        return None
    turn = np.where(flipped, -1.0, 1.0)[known]
    d, y = margins[known] * turn, np.where(turn < 0, 1 - labels[known], labels[known])
    held = [prompt for prompt, keep in zip(prompts, known, strict=True) if keep]
    decided, first = y != 0.5, y > 0.5
    says = np.where(d == 0, 0.5, (d > 0).astype(float))  # a reward that cannot tell guesses
    counts = {
        "correct": np.where(decided, np.where(first, says, 1 - says), 0.0),
        "decided": decided.astype(float),
        "hit": np.where(decided & first, says, 0.0),
        "false_alarm": np.where(decided & ~first, says, 0.0),
        "miss": np.where(decided & first, 1 - says, 0.0),
        "tie_aware": tie_aware(d / temperature, y, band),
        "pairs": np.ones(len(d)),
    }
    sums = dict(zip(counts, sums_by(np.asarray(held), np.stack(list(counts.values()), axis=1)).T, strict=True))
    return {
        "num_pairs": len(d),
        "num_decided": int(decided.sum()),
        "num_prompts": len(set(held)),
        "f1": _estimate(sums, ("hit", "false_alarm", "miss"), partial(f1, otherwise=0.5), resampling),
        "accuracy": _estimate(sums, ("correct", "decided"), _ratio, resampling),
        "tie_aware_accuracy": _estimate(sums, ("tie_aware", "pairs"), _ratio, resampling),
        "log_loss": round(_log_loss(d / temperature, y), DIGITS),
        "calibration_error": round(calibration_error(d / temperature, y), DIGITS),
        "calibration_error_uncalibrated": round(calibration_error(d, y), DIGITS),
    }


def _estimate(
    sums: dict[str, Array], names: Sequence[str], function: Statistic, resampling: Resampling
) -> dict[str, float | None]:
    """A quotient of sums with its interval over prompts; None where it is not defined, or for a single prompt."""
    values = np.stack([sums[name] for name in names], axis=1)
    whole = float(function(values.mean(axis=0, keepdims=True))[0])
    if not values.any():
        return {"value": None, "low": None, "high": None}
    if len(values) < MIN_PAPERS:
        return {"value": round(whole, DIGITS), "low": None, "high": None}
    told = int(values.any(axis=1).sum())  # a prompt of ties alone says nothing of accuracy
    found = within(replace(statistic(values, resampling, function), num_papers=told), resampling)
    return {"value": round(whole, DIGITS), "low": round(found.low, DIGITS), "high": round(found.high, DIGITS)}


def _ratio(drawn: Array) -> Array:
    """The first column over the second, [R]; 1/2 where the second is 0."""
    return quotient(drawn[:, 0], drawn[:, 1], 0.5)


def _probability(margins: Array) -> Array:
    # tanh and not exp, which overflows for large margins.
    halves: Array = 0.5 * (1 + np.tanh(margins / 2))
    return halves


def _log_loss(margins: Array, labels: Array) -> float:
    """The mean of -p log s(d) - (1 - p) log s(-d), in nats."""
    return float((labels * np.logaddexp(0, -margins) + (1 - labels) * np.logaddexp(0, margins)).mean())
