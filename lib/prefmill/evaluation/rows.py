"""What an evaluation is made of: generated reviews, what people said of the papers, and the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from prefmill.core.records import Decision, ReviewEvaluation

HUMAN = "human"  # the label of the reviews that people wrote


class Generation(TypedDict):
    """A review by the evaluated model: `text` without its rating line, `rating` on the common scale (1 to 10).

    `truncated` says that it ran into the token limit.
    """

    paper_id: str
    sample: int
    text: str
    rating: float | None
    decision: Decision | None
    truncated: bool
    num_tokens: NotRequired[int]


@dataclass(frozen=True)
class PaperFacts:
    """What people said of a paper: their decision, their ratings, and from which rating on one recommends it."""

    decision: Decision | None
    ratings: tuple[float, ...]
    accept_rating: float


@dataclass(frozen=True)
class EvaluatedReview:
    """One review with its checklist answers and, on a generated corpus, its quality factors."""

    generation: Generation
    evaluation: ReviewEvaluation
    factors: Mapping[str, bool] | None
    # A person's rating is part of the paper's mean, and has to be taken out before the two are compared.
    is_human: bool = False
