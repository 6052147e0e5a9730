"""Items dropped without a look at the target: constant, unreliable or redundant ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prefmill.checklist.optimize.config import SelectConfig
from prefmill.checklist.optimize.moments import Array

Status = Literal["passed", "constant", "unreliable", "redundant"]


@dataclass(frozen=True)
class Screened:
    """What the screen found of one item; a kappa that was not measured is None."""

    id: str
    status: Status
    yes_share: float
    paraphrase_kappa: float | None
    seed_kappa: float | None
    redundant_with: str | None = None
    correlation: float | None = None
    mutual_information: float | None = None


def screen(
    ids: Sequence[str], yes: Array, p_yes: Array, paraphrases: Mapping[str, Array], rules: SelectConfig
) -> list[Screened]:
    """The verdict on each item, in order; `yes` and `p_yes` [N, K], `paraphrases` by id the yes of each, [M, N].

    Of two redundant items the one on whose paraphrases the engine agrees more is kept, otherwise the earlier.
    """
    found = [
        _alone(name, yes[:, k], p_yes[:, k], paraphrases.get(name, np.zeros((0, len(yes)))), rules)
        for k, name in enumerate(ids)
    ]
    passed = [k for k, item in enumerate(found) if item.status == "passed"]
    kept: list[int] = []
    # Compared with kept items alone: of two that repeat each other only one can be dropped.
    for k in sorted(passed, key=lambda k: (-(found[k].paraphrase_kappa or 0.0), k)):
        found[k] = _beside(found[k], yes[:, k], [(ids[other], yes[:, other]) for other in kept], rules)
        kept += [k] if found[k].status == "passed" else []
    return found


def kappa(first: Array, second: Array) -> float:
    """Cohen's kappa (1960) of two raters' yes or no, [N] each; 1 where both always say the same one thing."""
    agreement = float((first == second).mean())
    a, b = float(first.mean()), float(second.mean())
    chance = a * b + (1 - a) * (1 - b)
    return 1.0 if chance >= 1 else (agreement - chance) / (1 - chance)


def seed_kappa(p_yes: Array) -> float:
    """The agreement beyond chance, 0 to 1, of two answers drawn with different seeds from `p_yes` [N].

    Two draws for a review differ with probability 2p(1-p); for reviews drawn apart, with that of the mean p. So it
    needs no second run of the engine: answers are drawn with the very probabilities that the engine gives.
    """
    mean = float(p_yes.mean())
    chance = 2 * mean * (1 - mean)
    return 1.0 if chance <= 0 else 1 - float((2 * p_yes * (1 - p_yes)).mean()) / chance


def mutual_information(first: Array, second: Array) -> float:
    """Mutual information of two items' yes [N], as a share, 0 to 1, of the smaller of their entropies."""
    joint = np.array([[((first == a) & (second == b)).mean() for b in (0, 1)] for a in (0, 1)])
    entropies = [_entropy(joint.sum(axis=axis)) for axis in (0, 1)]
    shared = sum(entropies) - _entropy(joint.ravel())
    # Rounding may leave the share a little outside.
    return float(np.clip(shared / min(entropies), 0, 1)) if min(entropies) > 0 else 0.0


def _alone(name: str, yes: Array, p_yes: Array, paraphrases: Array, rules: SelectConfig) -> Screened:
    share = float(yes.mean())
    paraphrase = float(np.mean([kappa(yes, other) for other in paraphrases])) if len(paraphrases) else None
    # Rules give 0 or 1, from which every seed draws the same.
    seeds = None if np.isin(p_yes, (0.0, 1.0)).all() else seed_kappa(p_yes)
    status: Status = "passed"
    if share in (0, 1) or min(share, 1 - share) < rules.min_answer_share:
        status = "constant"
    elif _below(paraphrase, rules.min_paraphrase_kappa) or _below(seeds, rules.min_seed_kappa):
        status = "unreliable"
    return Screened(name, status, round(share, 6), _rounded(paraphrase), _rounded(seeds))


def _beside(item: Screened, yes: Array, kept: Sequence[tuple[str, Array]], rules: SelectConfig) -> Screened:
    """`item` with the kept one it shares most with, and whether that is too much."""
    if not kept:
        return item
    correlations = [abs(float(np.corrcoef(yes, other)[0, 1])) for _, other in kept]
    shared = [mutual_information(yes, other) for _, other in kept]
    nearest = int(np.argmax(correlations))
    if max(correlations) <= rules.max_correlation:
        nearest = int(np.argmax(shared))
    too_much = correlations[nearest] > rules.max_correlation or shared[nearest] > rules.max_mutual_information
    return Screened(
        item.id, "redundant" if too_much else "passed", item.yes_share, item.paraphrase_kappa, item.seed_kappa,
        redundant_with=kept[nearest][0] if too_much else None,
        correlation=_rounded(correlations[nearest]), mutual_information=_rounded(shared[nearest]),
    )  # fmt: skip


def _below(value: float | None, bound: float) -> bool:
    return value is not None and value < bound


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _entropy(shares: Array) -> float:
    # 0 log 0 is 0 in the limit, and NaN in numpy.
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
