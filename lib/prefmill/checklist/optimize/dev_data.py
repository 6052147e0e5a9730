"""What the earlier steps wrote, as arrays: answers, target and papers of the dev reviews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefmill.checklist.optimize.config import SelectConfig
from prefmill.checklist.optimize.moments import Array
from prefmill.checklist.optimize.selection import Design
from prefmill.checklist.optimize.targets import read_labels, require_learnable, target_values

Row = Mapping[str, Any]


def answers(reviews: Sequence[Row], ids: Sequence[str]) -> tuple[Array, Array]:
    """Yes as 0 or 1, and P(yes), [N, K] each."""
    values = np.array([[row["answers"][name][:2] for name in ids] for row in reviews], dtype=np.float64)
    # Without ids numpy gives [N, 0] and no last axis.
    values = values.reshape(len(reviews), len(ids), 2)
    return values[..., 0], values[..., 1]


def with_target(reviews: Sequence[Row], config: SelectConfig, outer_folds: int) -> tuple[list[Row], Array, int]:
    """The reviews that have a target, their targets [N], and how many labels were of no dev review.

    Raises InputError where there are too few, or nothing varies.
    """
    labels = read_labels(config.labels) if config.labels else {}
    values = target_values(config.target, reviews, config.accept_rating, labels)
    chosen = [row for row in reviews if row["review_id"] in values]
    papers = {row["paper_id"] for row in chosen}
    require_learnable(config.target, values, len(papers), config.min_labels, max(outer_folds, config.inner_folds))
    target = np.array([values[row["review_id"]] for row in chosen])
    return chosen, target, len(set(labels) - {row["review_id"] for row in reviews})


def design_of(reviews: Sequence[Row], target: Array, ids: Sequence[str]) -> Design:
    """The data for the choice among `ids`.

    The spread of the answers says nothing of the target, so that it may be taken from all reviews.
    """
    yes, _ = answers(reviews, ids)
    spread = yes.std(axis=0)
    assert (spread > 0).all(), "constant items are dropped before"
    _, papers = np.unique([row["paper_id"] for row in reviews], return_inverse=True)
    # In units of their spread one penalty is as strict with rare answers as with frequent ones.
    return Design(yes / spread, spread, target, papers.astype(np.int64))


def baseline_features(reviews: Sequence[Row]) -> dict[str, Array]:
    """What the baselines are fitted on: length or rating, each with its square, as extremes may differ from both."""
    words = np.log1p([row["num_words"] for row in reviews])
    ratings = np.array([row["rating"] for row in reviews], dtype=np.float64)
    return {
        "length_only": np.column_stack([words, words**2]),
        "rating_only": np.column_stack([ratings, ratings**2]),
    }
