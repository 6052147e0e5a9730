"""The report's table on two scoring engines: how far they agree on the models' reviews, and whether it matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefmill.core.figures import with_interval
from prefmill.evaluation.metrics import CHECKMARK_SCORE
from prefmill.report.story import Compared, main_pair

Metrics = Mapping[str, Any]


def agreement_rows(evaluations: Sequence[Metrics]) -> list[dict[str, Any]]:
    """A row for each model that a second engine has scored; `evaluations` are their metrics.json."""
    return [
        {
            "model": metrics["model"],
            "engines": (metrics["engine"], found["engine"]),
            "num_reviews": found["num_reviews"],
            "kappa": with_interval(found["kappa"]),
            "accuracy": with_interval(found["accuracy"]),
            "scores": (metrics["overall"][CHECKMARK_SCORE.name], found["mean_score"]),
            "distance": with_interval(found["distance"]),
            "rank_correlation": with_interval(found["rank_correlation"]),
        }
        for metrics in evaluations
        if (found := metrics.get("agreement"))
    ]


def agreement_doubts(compared: Compared, evaluations: Sequence[Metrics]) -> list[str]:
    """What the second engine gives reason to doubt: that the models' order is the first one's opinion."""
    pair = main_pair(compared)
    second = {metrics["model"]: metrics["agreement"] for metrics in evaluations if metrics.get("agreement")}
    if pair is None or pair["baseline"] not in second or pair["candidate"] not in second:
        return []
    before, after = second[pair["baseline"]], second[pair["candidate"]]
    gain = after["mean_score"] - before["mean_score"]
    # The direction alone is asked for: the table shows how far the engines agree.
    if gain * pair["measures"][CHECKMARK_SCORE.name]["value"] > 0:
        return []
    return [
        f"The second engine, {after['engine']}, does not see this difference: its mean score goes from "
        f"{before['mean_score']:.2f} ({pair['baseline']}) to {after['mean_score']:.2f} ({pair['candidate']})."
    ]
