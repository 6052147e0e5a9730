"""The temperature of a judge: one number that makes its probabilities of yes as sure as people's labels bear out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefmill.core.artifact import Artifact
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.files import write_json
from prefmill.core.records import Answer
from prefmill.core.statistics import Array, assign_folds

CALIBRATION = "calibration.json"
NUM_BINS = 10
_EDGE = 5e-7  # half of the last decimal of a stored probability: 0 and 1 stand for what rounds to them
_LOWEST, _HIGHEST = 0.02, 50.0
_TOLERANCE = 1e-6  # of the logarithm of the temperature
_JUDGE_KEYS = ("model_name_or_path", "revision", "include_paper")


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature, the judge it belongs to, and what it does on papers it was not fitted on."""

    temperature: float
    judge: Mapping[str, Any]
    num_labels: int
    num_papers: int
    num_folds: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float


def tempered(p_yes: Array, temperature: float) -> Array:
    """Probabilities whose log-odds are divided by `temperature` (> 0); above 0.5 stays above, below stays below."""
    # The logistic function by tanh, which cannot overflow.
    result: Array = (1 + np.tanh(_log_odds(p_yes) / temperature / 2)) / 2
    return result


def temper(answers: Mapping[str, Answer], temperature: float) -> dict[str, Answer]:
    """`answers` with every p_yes tempered, to 6 decimals; yes and no are those of the judge, untouched."""
    copies = {name: answer.copy() for name, answer in answers.items()}
    for answer in copies.values():
        answer["p_yes"] = round(float(tempered(np.array(answer["p_yes"]), temperature)), 6)
    return copies


def negative_log_likelihood(p_yes: Array, labels: Array) -> float:
    """The mean of -log P(label), [N] each, labels 0 or 1; in nats."""
    p = np.clip(p_yes, _EDGE, 1 - _EDGE)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


def calibration_error(p_yes: Array, labels: Array) -> float:
    """How far P(yes) is from the share of yes labels, averaged over ten bins of equal width by their answers.

    The expected calibration error (Naeini et al. 2015) of P(yes) itself, [N] each, in [0, 1].
    """
    # p = 1 belongs to the last bin, not to an eleventh.
    bins = np.minimum((p_yes * NUM_BINS).astype(int), NUM_BINS - 1)
    # A bin's gap times its count is its sum of p - label: nothing is divided, so an empty bin needs no care.
    gaps = np.bincount(bins, weights=p_yes - labels, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(p_yes))


def fit_temperature(p_yes: Array, labels: Array, min_labels: int) -> float:
    """The temperature under which `labels` [N], 0 or 1, are likeliest given `p_yes` [N] (Guo et al. 2017).

    Raises InputError below `min_labels`, where every probability is 0 or 1, or where the likelihood has no maximum
    between 0.02 and 50: the judge is then never wrong, or no better than chance.
    """
    if len(labels) < min_labels:
        raise InputError(
            "too few labels of dev reviews to fit a temperature", got=len(labels),
            expected=f"at least {min_labels} (min_labels)",
            fix="label more answers for reviews of split dev, or set calibrate=false",
        )  # fmt: skip
    if np.isin(p_yes, (0.0, 1.0)).all():
        raise InputError(
            "this judge gives no probabilities to calibrate", got="P(yes) of 0 and 1 only",
            expected="probabilities of a model", fix="set calibrate=false; rules have none",
        )  # fmt: skip
    temperature = _likeliest(p_yes, labels)
    # The search ends close to a bound but never on it.
    if not _LOWEST * 1.01 < temperature < _HIGHEST / 1.01:
        meaning = "never wrong" if temperature < 1 else "no better than chance"
        raise InputError(
            "the labels determine no temperature", got=f"the judge is {meaning} on them",
            expected=f"a likelihood with its maximum between {_LOWEST:g} and {_HIGHEST:g}",
            fix="label more answers, and see their agreement with calibrate=false",
        )  # fmt: skip
    return temperature


def calibrate(
    judge: Mapping[str, Any],
    papers: Sequence[str],
    p_yes: Array,
    labels: Array,
    min_labels: int,
    num_folds: int,
    seed: int,
) -> Calibration:
    """The temperature fitted on all labels [N], and its worth by cross-fitting over folds of papers.

    Each paper's answers are tempered with what was fitted on the other folds. Raises InputError as fit_temperature
    does, and where there are fewer papers than folds.
    """
    temperature = fit_temperature(p_yes, labels, min_labels)
    num_papers = len(set(papers))
    if num_papers < num_folds:
        raise InputError(
            "too few labelled dev papers to try a temperature out", got=num_papers,
            expected=f"at least {num_folds} (folds)", fix="label reviews of more papers, or lower folds",
        )  # fmt: skip
    _, index = np.unique(np.asarray(papers, dtype=str), return_inverse=True)
    folds = assign_folds(index.astype(np.int64), num_folds, seed)
    after = p_yes.copy()
    for fold in range(num_folds):
        inside = folds != fold
        after[~inside] = tempered(p_yes[~inside], _likeliest(p_yes[inside], labels[inside]))
    measured = [
        negative_log_likelihood(p_yes, labels),
        negative_log_likelihood(after, labels),
        calibration_error(p_yes, labels),
        calibration_error(after, labels),
    ]
    return Calibration(
        round(temperature, 6), dict(judge), len(labels), num_papers, num_folds, *(round(value, 6) for value in measured)
    )


def judge_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a judge the same in an engine's settings: its model and what it reads. Engines agree within 1e-4."""
    found = {key: settings[key] for key in _JUDGE_KEYS if settings.get(key) is not None}
    return found or {"engine": settings["engine"]}


def write_calibration(calibration: Calibration, folder: Path) -> None:
    """Write `calibration.json`."""
    write_json(folder / CALIBRATION, asdict(calibration), allow_nan=False)


def read_temperature(artifact: Artifact | None, settings: Mapping[str, Any]) -> float | None:
    """The temperature in a `judge_quality`, None where none is given; `settings` are those of the engine to temper.

    Raises ConfigError where none was fitted, or for another judge.
    """
    if artifact is None:
        return None
    if not any(entry.path == CALIBRATION for entry in artifact.manifest.files):
        raise ConfigError(
            "no temperature was fitted there", where=artifact.path, expected=CALIBRATION,
            fix="run judge_quality with `labels` and calibrate=true, or leave out the input calibration",
        )  # fmt: skip
    found = artifact.json(CALIBRATION)
    if found["judge"] != judge_of(settings):
        raise ConfigError(
            "the temperature was fitted for another judge", where=artifact.path, got=judge_of(settings),
            expected=found["judge"], fix="fit one on scores of this engine, or leave out the input calibration",
        )  # fmt: skip
    return float(found["temperature"])


def _likeliest(p_yes: Array, labels: Array) -> float:
    from scipy.optimize import minimize_scalar  # a second, for what scoring does not need

    odds = _log_odds(p_yes)
    signed = np.where(labels > 0.5, -odds, odds)

    def loss(log_temperature: float) -> float:
        # -log P(label) is log(1 + exp(x)): logaddexp does not overflow where the judge is sure and wrong.
        return float(np.logaddexp(0.0, signed * math.exp(-log_temperature)).mean())

    # The likelihood is concave in 1/T, hence has one maximum in any monotone function of T.
    bounds = math.log(_LOWEST), math.log(_HIGHEST)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": _TOLERANCE})
    return math.exp(float(found.x))


def _log_odds(p_yes: Array) -> Array:
    p = np.clip(p_yes, _EDGE, 1 - _EDGE)
    # log1p keeps the digits that 1 - p loses for a small p.
    result: Array = np.log(p) - np.log1p(-p)
    return result
