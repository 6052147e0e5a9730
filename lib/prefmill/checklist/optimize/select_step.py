"""The step `select`: what the screen drops, and what the lasso keeps on all dev reviews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prefmill.checklist.items import Checklist
from prefmill.checklist.optimize.config import SelectConfig
from prefmill.checklist.optimize.lasso import Array, path, weighted_moments
from prefmill.checklist.optimize.selection import MODELS, Selection, answers, design_of, select, with_target
from prefmill.core.errors import InputError
from prefmill.core.files import write_json
from prefmill.store.jsonl import write_jsonl

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


ITEMS, PATH, SUMMARY = "items.jsonl", "path.jsonl", "summary.json"
Row = Mapping[str, Any]


def write_selection(
    config: SelectConfig,
    candidates: Checklist,
    restated: Mapping[str, Sequence[str]],
    scored: Sequence[Row],
    outer_folds: int,
    seed: int,
    folder: Path,
) -> None:
    """Write `items.jsonl` (the verdict on each candidate), `path.jsonl` and `summary.json`.

    Raises InputError for a target that cannot be learned, or when the screen leaves fewer than two items.
    """
    reviews, target, num_other_labels = with_target(scored, config, outer_folds)
    screened = _screen(config, candidates, restated, reviews)
    ids = [item.id for item in screened if item.status == "passed"]
    if len(ids) < 2:
        raise InputError(
            "the screen leaves too few items to choose from",
            got=", ".join(f"{item.id}: {item.status}" for item in screened), expected="at least 2 that pass",
            fix="propose other items, use another engine, or loosen the thresholds of `select`",
        )  # fmt: skip
    design = design_of(reviews, target, ids)
    # What is exported is chosen on all dev reviews; the step refit measures the procedure on held-out ones.
    everything = np.ones((1, len(reviews)))
    selection = select(design, target[None], everything, config, seed)
    # Back from units of spread to what one yes is worth.
    weights = dict(zip(ids, (selection.coefficients[0, 0] / design.spread).tolist(), strict=True))
    write_jsonl(folder / ITEMS, _item_rows(candidates, screened, weights, selection, reviews, target))
    found = weighted_moments(design.answers, target[None], everything)
    solutions = path(found.gram, found.cross, selection.penalties)[:, 0, 0] / design.spread
    write_jsonl(folder / PATH, _path_rows(ids, solutions, selection))
    summary = {
        "target": config.target, "num_reviews": len(reviews), "num_papers": len(np.unique(design.papers)),
        "num_labels_outside_dev": num_other_labels, "num_candidates": len(screened), "num_passed": len(ids),
        "model": MODELS[int(selection.model[0, 0])], "num_kept": int((selection.coefficients != 0).sum()),
    }  # fmt: skip
    write_json(folder / SUMMARY, summary)


def _screen(
    config: SelectConfig, candidates: Checklist, restated: Mapping[str, Sequence[str]], reviews: Sequence[Row]
) -> list[Screened]:
    yes, p_yes = answers(reviews, candidates.ids)
    paraphrases = {name: answers(reviews, ids)[0].T for name, ids in restated.items() if ids}
    return screen(candidates.ids, yes, p_yes, paraphrases, config)


def _item_rows(
    candidates: Checklist,
    screened: Sequence[Screened],
    weights: Mapping[str, float],
    selection: Selection,
    reviews: Sequence[Row],
    target: Array,
) -> list[dict[str, Any]]:
    stability = dict(zip(weights, selection.stability[0, 0], strict=True))
    yes, _ = answers(reviews, candidates.ids)
    rows = []
    for k, (item, found) in enumerate(zip(candidates.items, screened, strict=True)):
        status = found.status if found.status != "passed" else "kept" if weights[item.id] else "not_chosen"
        rows.append(
            {
                **asdict(found),
                "status": status,
                "question": item.question,
                "source": item.source,
                "stability": round(float(stability[item.id]), 6) if item.id in stability else None,
                "weight": round(weights.get(item.id, 0.0), 9),
                "target_correlation": _correlation(yes[:, k], target),
            }
        )
    return rows


def _path_rows(ids: Sequence[str], solutions: Array, selection: Selection) -> list[dict[str, Any]]:
    """The path on all dev reviews: what each penalty costs, and the weight of each item it keeps, per yes."""
    return [
        {
            "penalty": round(float(selection.penalties[step, 0, 0]), 9),
            "error": round(float(selection.errors[step, 0, 0]), 9),
            "error_se": round(float(selection.error_ses[step, 0, 0]), 9),
            "chosen": bool(step == selection.chosen[0, 0]),
            "weights": {
                name: round(float(weight), 6) for name, weight in zip(ids, solutions[step], strict=True) if weight > 0
            },
        }
        for step in range(len(selection.penalties))
    ]


def _correlation(yes: Array, target: Array) -> float | None:
    # The correlation of a constant is NaN, which JSON does not have.
    return round(float(np.corrcoef(yes, target)[0, 1]), 6) if yes.std() > 0 else None
