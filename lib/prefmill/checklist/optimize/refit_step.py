"""The step `refit`: weights of the kept items, and what a checklist made this way is worth on unseen papers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefmill.checklist.items import Checklist
from prefmill.checklist.optimize.config import RefitConfig, SelectConfig
from prefmill.checklist.optimize.held_out import (
    Progress,
    checklist_scores,
    compare_with_baselines,
    correlation,
    fitted_scores,
    fixed_scores,
    outer_training,
    permutation_test,
    rounded,
)
from prefmill.checklist.optimize.selection import Design, answers, baseline_features, design_of, with_target
from prefmill.core.files import write_json
from prefmill.core.statistics import Resampling

WEIGHTS, HELD_OUT = "weights.json", "held_out.json"
_SMALLEST_WEIGHT = 0.001
Row = Mapping[str, Any]


def write_refit(
    config: RefitConfig,
    select_config: SelectConfig,
    candidates: Checklist,
    items: Sequence[Row],
    model: str,
    scored: Sequence[Row],
    seed: int,
    folder: Path,
    progress: Progress,
) -> None:
    """Write `weights.json` (by item id, their mean 1) and `held_out.json` (correlations, baselines, the test).

    `model` is what the step select found best: chosen items, all equal, or all with shrunk weights.
    """
    reviews, target, _ = with_target(scored, select_config, config.outer_folds)
    # Not the kept ones alone: every outer fold chooses anew among all that passed.
    passed = [item["id"] for item in items if item["status"] in ("kept", "not_chosen")]
    write_json(folder / WEIGHTS, _weights(config, items))
    design = design_of(reviews, target, passed)
    held_out = _held_out(config, select_config, design, reviews, candidates.ids, seed, progress)
    held_out["model"] = model
    held_out["signal"] = held_out["p_value"] <= config.alpha
    write_json(folder / HELD_OUT, held_out)


def _weights(config: RefitConfig, items: Sequence[Row]) -> dict[str, float]:
    """The weights of a yes, by item id; the mean of their sizes is 1."""
    kept = {item["id"]: float(item["weight"]) for item in items if item["status"] == "kept"}
    if config.weights == "equal":
        kept = {name: math.copysign(1.0, weight) for name, weight in kept.items()}
    mean = sum(map(abs, kept.values())) / max(1, len(kept))
    scaled = {name: round(weight / mean, 3) for name, weight in kept.items()}
    # A checklist refuses a weight of 0, which rounding may make of a small one.
    return {name: weight or math.copysign(_SMALLEST_WEIGHT, weight) for name, weight in scaled.items()}


def _held_out(
    config: RefitConfig,
    select_config: SelectConfig,
    design: Design,
    reviews: Sequence[Row],
    all_ids: Sequence[str],
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Everything the held-out folds tell; `design` holds the items that passed the screen, which saw no target."""
    training = outer_training(design.papers, config.outer_folds, seed)
    resampling = Resampling(config.num_resamples, seed, config.confidence)
    scores = checklist_scores(design, training, select_config, seed, equal=config.weights == "equal")
    features = baseline_features(reviews, select_config.target)
    baselines = {name: fitted_scores(values, design.target, training) for name, values in features.items()}
    # All candidates, those screened out included: the checklist that one has without any choice.
    baselines["all_items_equal"] = fixed_scores(answers(reviews, all_ids)[0].sum(axis=1), training)
    _, p_value = permutation_test(design, training, select_config, seed, config.num_permutations, progress)
    return {
        "target": select_config.target,
        "num_reviews": len(reviews),
        "num_papers": len(np.unique(design.papers)),
        "confidence": config.confidence,
        "outer_folds": config.outer_folds,
        "correlation": rounded(correlation(scores, design, training, resampling)),
        "baselines": compare_with_baselines(scores, baselines, design, training, resampling),
        "num_permutations": config.num_permutations,
        "p_value": round(p_value, 6),
        "alpha": config.alpha,
    }
