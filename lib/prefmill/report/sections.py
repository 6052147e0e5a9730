"""The report's sections on the comparison: its tables and charts, ready for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prefmill.core.figures import bounds, figure
from prefmill.evaluation.metrics import CHECKMARK_SCORE, MEASURES, Measure
from prefmill.evaluation.rows import HUMAN
from prefmill.report.charts import ChartInterval, Line, interval_chart, scatter_chart, share_strip
from prefmill.report.story import Compared, main_pair, p_text, trained_models

MAX_CLOUD = 150  # points of a model in a scatter chart: enough to see a trend, few enough for a small file
EXTRA_MEASURES = (
    Measure("recommendation_f1", "Recommendation F1", "higher", 3, "F1 of accepted, over all reviews"),
    Measure(
        "rating_rank_correlation", "Rating rank correlation", "higher", 3,
        "Spearman, between the mean ratings per paper got from the model and from people",
    ),
    Measure("repeated_reviews", "Repeated reviews", "lower", 1, "exact duplicate reviews", True),
)  # fmt: skip
Row = dict[str, Any]


def score_chart(compared: Compared) -> Markup:
    """Every model's mean checklist score."""
    scores = [(item["model"], item["measures"][CHECKMARK_SCORE.name]) for item in compared["models"]]
    rows = [ChartInterval.of(model, model, found) for model, found in scores]
    people = next((row.value for row in rows if row.series == HUMAN), None)
    dashed = "; dashed: people" if people is not None else ""
    axis = f"of at most {compared['max_score']:g}{dashed}"
    return interval_chart(rows, "Mean checklist score of each model", axis, level=people)


def difference_chart(compared: Compared) -> Markup | None:
    """The difference in checklist score of every two models; None where there is only one."""
    rows = [
        ChartInterval.of(
            f"{pair['candidate']} − {pair['baseline']}",
            pair["candidate"],
            pair["measures"][CHECKMARK_SCORE.name],
            "+.2f",
        )
        for pair in compared["pairs"]
    ]
    return interval_chart(rows, "Differences in checklist score", "difference in points", level=0.0) if rows else None


def measure_table(compared: Compared) -> list[Row]:
    """Measures down, models across; a measure that no model has is left out."""
    rows = []
    for measure in (*MEASURES, *EXTRA_MEASURES):
        cells = [_cell(_value(item, measure), measure) for item in compared["models"]]
        if any(cells):
            rows.append({"measure": measure, "cells": cells})
    return rows


def pair_table(compared: Compared, confidence: float) -> list[Row]:
    """Every pair with each of its measures, as differences."""
    labels = {item.name: item for item in MEASURES}
    return [
        {
            "baseline": pair["baseline"],
            "candidate": pair["candidate"],
            "win_rate": pair["win_rate"],
            "at_equal_length": pair["at_equal_length"],
            "differences": [
                {
                    "measure": labels[name],
                    "difference": labels[name].show_difference(found["value"]),
                    "interval": bounds(found, labels[name].show_difference),
                    "p": p_text(found["p_value"]),
                    "p_holm": p_text(found["p_holm"]),
                    "good": _is_good(found, labels[name], confidence),
                }
                for name, found in pair["measures"].items()
            ],
        }
        for pair in compared["pairs"]
    ]


def item_rows(compared: Compared, questions: Mapping[str, str], confidence: float) -> list[Row]:
    """Every checklist item with each model's share of yes, the largest gain from first to last model on top."""
    pair = main_pair(compared)
    tested = {item["id"]: item for item in pair["items"]} if pair else {}
    rows = [_share_row(compared, "items", key, questions[key], tested.get(key), confidence) for key in questions]
    return sorted(rows, key=lambda row: -row["change"])


def factor_rows(compared: Compared, confidence: float) -> list[Row]:
    """The generator's quality factors in the same form; empty on a corpus it did not make."""
    names = [factor["id"] for factor in compared["models"][0]["factors"]]
    rows = [
        _share_row(compared, "factors", name, name.replace("_", " ").capitalize(), None, confidence) for name in names
    ]
    return sorted(rows, key=lambda row: -row["change"])


def length_chart(evaluations: Sequence[Mapping[str, Any]]) -> Markup:
    """Words against checklist score, a point for every review, thinned evenly where there are many."""
    clouds = []
    for evaluated in evaluations:
        points = [
            (float(words), float(score))
            for row in evaluated["papers"]
            for words, score in zip(row["words"], row["scores"], strict=True)
        ]
        stride = -(-len(points) // MAX_CLOUD)
        # Every n-th and not a random draw, so that the page comes out the same.
        clouds.append(Line(evaluated["model"], evaluated["model"], points[::stride]))
    return scatter_chart(clouds, "Length and checklist score of each review", "words", "checklist score")


def _value(model: Mapping[str, Any], measure: Measure) -> Any:
    return model["measures"].get(measure.name, model.get(measure.name))


def _cell(found: Any, measure: Measure) -> Row | None:
    if found is None:
        return None
    if not isinstance(found, Mapping):
        return {"value": measure.show(found), "interval": None}
    # Without their sign: the value above has it, and four columns must fit a phone.
    interval = bounds(found, lambda end: measure.show(end).removesuffix("%"))
    low, _, high = interval.partition(" to ")
    # Rounded to no width, an interval would read as certainty.
    return {"value": measure.show(found["value"]), "interval": interval if low != high else None}


def _is_good(found: Mapping[str, Any], measure: Measure, confidence: float) -> bool | None:
    """Whether a difference that holds after correction is to the good; None where it does not hold or matter."""
    if found["p_holm"] >= 1 - confidence or measure.better is None:
        return None
    return bool((found["value"] > 0) == (measure.better == "higher"))


def _share_row(
    compared: Compared, column: str, key: str, name: str, tested: Mapping[str, Any] | None, confidence: float
) -> Row:
    found = {item["model"]: {entry["id"]: entry for entry in item[column]} for item in compared["models"]}
    shares = [(model, entries[key]["value"]) for model, entries in found.items() if key in entries]
    # People's reviews are a point of reference and no step of the training.
    trained = [share for model, share in shares if model in trained_models(compared)]
    change = trained[-1] - trained[0] if len(trained) > 1 else 0.0
    described = ", ".join(f"{model} {share:.0%}" for model, share in shares)
    return {
        "key": key,
        "name": name,
        "shares": shares,
        "strip": share_strip(shares, f"{name}: {described}"),
        "change": change,
        "change_text": figure(change * 100, "+.0f"),
        "holds": tested is not None and tested["p_holm"] < 1 - confidence,
    }
