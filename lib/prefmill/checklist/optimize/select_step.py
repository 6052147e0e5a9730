"""The step `select`: what the screen drops, and what the lasso keeps on all dev reviews."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prefmill.checklist.items import Checklist
from prefmill.checklist.optimize.config import SelectConfig
from prefmill.checklist.optimize.dev_data import answers, design_of, with_target
from prefmill.checklist.optimize.lasso import path
from prefmill.checklist.optimize.moments import Array, weighted_moments
from prefmill.checklist.optimize.screening import Screened, screen
from prefmill.checklist.optimize.selection import MODELS, Selection, select
from prefmill.core.errors import InputError
from prefmill.core.files import write_atomic
from prefmill.store.jsonl import write_jsonl

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
        "target": config.target,
        "num_reviews": len(reviews),
        "num_papers": len(np.unique(design.papers)),
        "num_labels_outside_dev": num_other_labels,
        "num_candidates": len(screened),
        "num_passed": len(ids),
        "model": MODELS[int(selection.model[0, 0])],
        "num_kept": int((selection.coefficients != 0).sum()),
    }
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


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
