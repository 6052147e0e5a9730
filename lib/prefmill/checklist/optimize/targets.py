"""What items are chosen to predict: confidence, the rating, agreement with the decision, or people's labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from prefmill.checklist.label_files import LabelFile
from prefmill.core.errors import InputError

Target = Literal["confidence", "rating", "decision_agreement", "labels"]
COLUMNS = ("review_id", "label")


def target_values(
    target: Target, reviews: Sequence[Mapping[str, Any]], accept_rating: float, labels: Mapping[str, float]
) -> dict[str, float]:
    """The target of every review that has one, by review id; higher is better. `rating` is in points of 1 to 10.

    `decision_agreement` is 1 where the rating is at or above `accept_rating` exactly when the paper was accepted;
    papers without a decision and withdrawn ones, on which nobody decided, have none.
    """
    if target == "labels":
        return {row["review_id"]: labels[row["review_id"]] for row in reviews if row["review_id"] in labels}
    if target == "rating":
        return {row["review_id"]: float(row["rating"]) for row in reviews}
    if target == "confidence":
        return {row["review_id"]: float(row["confidence"]) for row in reviews if row["confidence"] is not None}
    decided = [row for row in reviews if row["decision"] not in (None, "withdrawn")]
    return {
        row["review_id"]: float((row["rating"] >= accept_rating) == (row["decision"] == "accepted")) for row in decided
    }


def read_labels(path: Path) -> dict[str, float]:
    """People's labels from a table with the columns review_id and label (a number, higher is better).

    Where a column `rater`, or what else tables call it, says whose they are, a review has the mean of its labels.
    Raises InputError naming the line of a missing column, a label that is no finite number, or a repeated review.
    """
    file = LabelFile(path, "unusable labels", COLUMNS)
    labels: dict[str, dict[str, float]] = {}
    for where, row in file.rows():
        review_id, label = row["review_id"], _number(row["label"])
        if label is None:
            raise file.unusable(where, f"label {row['label']!r}", "write a number, or delete the line")
        given = labels.setdefault(review_id, {})
        if row["rater"] in given:
            fix = "keep one label a review, or say in a column `rater` who gave it"
            raise file.unusable(where, f"review {review_id} again", fix)
        given[row["rater"]] = label
    return {review_id: fmean(given.values()) for review_id, given in labels.items()}


def require_learnable(
    target: Target, values: Mapping[str, float], num_papers: int, min_labels: int, num_folds: int
) -> None:
    """Raises InputError where there are too few targets or papers to choose items by, or all targets are the same."""
    if len(values) < min_labels:
        raise InputError(
            f"too few dev reviews have the target '{target}'", got=len(values),
            expected=f"at least {min_labels} (min_labels)",
            fix="give dev a larger share in ingest_reviews, label more of its reviews, or name another target",
        )  # fmt: skip
    if len(set(values.values())) < 2:
        raise InputError(
            f"the target '{target}' is the same for every dev review: there is nothing to choose items by",
            got=next(iter(values.values())), expected="at least two different values",
            fix="name another target; decision_agreement needs papers with decisions and a fitting accept_rating",
        )  # fmt: skip
    if num_papers < 2 * num_folds:
        raise InputError(
            "too few dev papers for the cross-validation", got=num_papers, expected=f"at least {2 * num_folds}",
            fix="give dev a larger share in ingest_reviews, or lower outer_folds and inner_folds",
        )  # fmt: skip


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    # float() reads "nan" and "inf", and one of them would spoil every mean.
    return value if math.isfinite(value) else None
