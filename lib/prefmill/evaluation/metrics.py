"""What is measured on a model's reviews: a number for each review, its mean for each paper, and for the whole set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from prefmill.core.figures import figure
from prefmill.core.statistics import correlation, ranks
from prefmill.evaluation.rows import EvaluatedReview, PaperFacts
from prefmill.reviews.text_statistics import distinct_share, repeated_share, words

DIGITS = 6  # below this, the order of additions shows
Values = dict[str, float]


@dataclass(frozen=True)
class Measure:
    """A number that every review has, or lacks: `better` says which way is good, None where neither is.

    A share lies in [0, 1] and is shown in percent; `decimals` are those shown.
    """

    name: str
    label: str
    better: Literal["higher", "lower"] | None
    decimals: int
    definition: str
    is_share: bool = False

    def show(self, value: float) -> str:
        """A value as one reads it, with a true minus."""
        return figure(value, f".{self.decimals}{'%' if self.is_share else 'f'}")

    def show_difference(self, value: float) -> str:
        """A difference with its sign; of shares in percentage points."""
        return figure(value * (100 if self.is_share else 1), f"+.{self.decimals}f")


CHECKMARK_SCORE = Measure(
    "checkmark_score", "Checklist score", "higher", 2, "weighted number of checklist items answered yes"
)
MEASURES = (
    CHECKMARK_SCORE,
    Measure("num_factors", "Known quality factors", "higher", 2, "quality factors of the generator found in the text"),
    Measure(
        "recommendation_correct", "Recommendation accuracy", "higher", 1,
        "rating at or above the threshold exactly when the paper was accepted; a review without a rating is wrong",
        is_share=True,
    ),
    Measure(
        "rating_error", "Rating error", "lower", 2,
        "distance of the rating from the mean human rating of the paper, in points; only reviews with a rating",
    ),
    Measure("has_rating", "Rating given", "higher", 1, "reviews that end in a rating line", True),
    Measure("num_words", "Words", None, 1, "length of the review"),
    Measure("distinct_2", "Distinct word pairs", "higher", 1, "different word pairs over all pairs of a review", True),
    Measure("repeated_4grams", "Repeated 4-grams", "lower", 1, "4-word runs that recur within the review", True),
    Measure("truncated", "Cut off", "lower", 1, "reviews that ran into the token limit", True),
    Measure("empty", "Empty", "lower", 1, "reviews without a word; they score 0", True),
)  # fmt: skip


def measure_review(review: EvaluatedReview, paper: PaperFacts) -> Values:
    """Every measure of MEASURES that this review has."""
    generation = review.generation
    rating, tokens = generation["rating"], words(generation["text"])
    values = {
        "checkmark_score": review.evaluation["checkmark_score"],
        "has_rating": float(rating is not None),
        "num_words": float(len(tokens)),
        "repeated_4grams": repeated_share(tokens, 4),
        "truncated": float(generation["truncated"]),
        "empty": float(not tokens),
    }
    if (distinct := distinct_share(tokens, 2)) is not None:
        values["distinct_2"] = distinct
    if review.factors is not None:
        values["num_factors"] = float(sum(review.factors.values()))
    if paper.decision is not None:
        recommends = rating is not None and rating >= paper.accept_rating
        # A review without a rating is wrong either way, or a model could gain by giving none.
        values["recommendation_correct"] = float(rating is not None and recommends == (paper.decision == "accepted"))
    if rating is not None and (human := _human_rating(review, paper)) is not None:
        values["rating_error"] = abs(rating - human)
    return values


def measure(
    reviews: Sequence[EvaluatedReview], papers: Mapping[str, PaperFacts], questions: Mapping[str, str]
) -> dict[str, Any]:
    """The content of metrics.json but for its heading: `overall`, `items`, `factors` and `papers`.

    `reviews` come sorted by paper, `questions` are the checklist's by item id. Every paper counts the same in the
    means, however many reviews it has.
    """
    rows = [
        _measure_paper(paper_id, list(group), papers[paper_id])
        for paper_id, group in groupby(reviews, key=lambda review: review.generation["paper_id"])
    ]
    overall = {item.name: average(row["measures"].get(item.name) for row in rows) for item in MEASURES}
    return {
        "overall": {
            **overall,
            **_recommendation(rows),
            # People's mean rating against itself would be 1.
            "rating_rank_correlation": None if reviews[0].is_human else rating_rank_correlation(rows),
            "repeated_reviews": _repeated_reviews(reviews),
            "num_empty": sum(not words(review.generation["text"]) for review in reviews),
        },
        "items": [
            {"id": key, "question": question, "yes_share": average(row["items"].get(key) for row in rows)}
            for key, question in questions.items()
        ],
        "factors": _factor_shares(rows),
        "papers": rows,
    }


def average(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there, None where there is none."""
    present = [value for value in values if value is not None]
    return round(float(np.mean(present)), DIGITS) if present else None


def f1_score(true_positive: float, false_positive: float, false_negative: float) -> float | None:
    """F1 of "accepted" from the three counts; None when nothing was accepted and nothing recommended."""
    denominator = 2 * true_positive + false_positive + false_negative
    return round(2 * true_positive / denominator, DIGITS) if denominator else None


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None below 3 values or where one side is constant."""
    # Two points always lie on a line.
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return round(correlation(ranks(first), ranks(second)), DIGITS)


def rating_rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Between the mean rating a paper got from the model and from people, over papers with both."""
    both = [row for row in rows if row["rating"] is not None and row["human_rating"] is not None]
    return rank_correlation([row["rating"] for row in both], [row["human_rating"] for row in both])


def _measure_paper(paper_id: str, reviews: list[EvaluatedReview], paper: PaperFacts) -> dict[str, Any]:
    measured = [measure_review(review, paper) for review in reviews]
    ratings = [review.generation["rating"] for review in reviews]
    answers = [review.evaluation["answers"] for review in reviews]
    factors = [review.factors for review in reviews if review.factors is not None]
    return {
        "paper_id": paper_id,
        "decision": paper.decision,
        "human_rating": average(paper.ratings),
        "rating": average(ratings),
        "measures": _averages(measured),
        "items": _averages([{key: float(answer["yes"]) for key, answer in by_item.items()} for by_item in answers]),
        "factors": _averages([{key: float(held) for key, held in by_name.items()} for by_name in factors]),
        "confusion": _confusion(ratings, paper),
        "scores": [values["checkmark_score"] for values in measured],
        "words": [int(values["num_words"]) for values in measured],
    }


def _averages(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every key over the rows that have it, in the order in which keys first appear."""
    # No set: its order differs between processes, and files made again must have the same bytes.
    keys = dict.fromkeys(key for row in rows for key in row)
    means = {key: average(row.get(key) for row in rows) for key in keys}
    return {key: value for key, value in means.items() if value is not None}


def _confusion(ratings: Sequence[float | None], paper: PaperFacts) -> list[int] | None:
    """True positives, false positives and false negatives for "accepted"; no rating recommends nothing."""
    if paper.decision is None:
        return None
    accepted = paper.decision == "accepted"
    recommended = sum(rating is not None and rating >= paper.accept_rating for rating in ratings)
    return [recommended, 0, len(ratings) - recommended] if accepted else [0, recommended, 0]


def _recommendation(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counted = [row["confusion"] for row in rows if row["confusion"] is not None]
    sums = [sum(counts[index] for counts in counted) for index in range(3)]
    return {"recommendation_f1": f1_score(*sums), "num_decided_papers": len(counted)}


def _repeated_reviews(reviews: Sequence[EvaluatedReview]) -> float:
    """The share of exact duplicate reviews: a model that has collapsed shows here."""
    # By words: case, punctuation and white space make no other review.
    texts = [" ".join(words(review.generation["text"])) for review in reviews]
    counts = Counter(texts)
    return round(sum(counts[text] > 1 for text in texts) / len(texts), DIGITS)


def _factor_shares(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    names = dict.fromkeys(name for row in rows for name in row["factors"])
    return [{"name": name, "share": average(row["factors"].get(name) for row in rows)} for name in names] or None


def _human_rating(review: EvaluatedReview, paper: PaperFacts) -> float | None:
    """The mean human rating of the paper; for a human review, that of the others."""
    ratings = list(paper.ratings)
    if review.is_human:
        rating = review.generation["rating"]
        assert rating is not None
        # With its own rating in the mean, a person would be nearer to it than any model could be.
        ratings.remove(rating)
    return float(np.mean(ratings)) if ratings else None
