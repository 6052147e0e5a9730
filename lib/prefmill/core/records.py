"""The rows that stages exchange, one JSON object a line, and how they are read and written."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # what pydantic can check rows against before Python 3.12

Split = Literal["train", "val", "dev", "test"]
Modality = Literal["clean", "clean_images", "vision"]
Decision = Literal["accepted", "rejected", "withdrawn", "desk_rejected"]

Standing = Decision | Literal["unknown"]  # unknown: the corpus does not say


class Paper(TypedDict):
    """A paper; image paths are relative to the artifact that holds the row, `scale` is the one its prompt names."""

    paper_id: str
    title: str
    abstract: str
    text: str
    decision: Decision | None
    venue: str
    split: Split
    pages: list[str]
    figures: list[str]
    scale: NotRequired[list[float]]


class Review(TypedDict):
    """A review; `rating` on `scale`, its venue's bounds (1 to 10 where none are given), `confidence` 1 to 5 or None."""

    review_id: str
    paper_id: str
    text: str
    rating: float
    confidence: float | None
    venue: str
    sub_scores: dict[str, float]
    scale: NotRequired[list[float]]


class Answer(TypedDict):
    """A checklist item's answer for one review; `p_yes` in [0, 1].

    `mass` is the model's P(yes) + P(no) over its whole vocabulary, in [0, 1]; `p_yes_stderr` the standard error of a
    `p_yes` that was counted from sampled answers. Each is there where the engine knows it.
    """

    yes: bool
    p_yes: float
    mass: NotRequired[float]
    p_yes_stderr: NotRequired[float]
    evidence: NotRequired[str]


class ReviewIds(TypedDict):
    """Which review a row is about."""

    review_id: str
    paper_id: str


class EvaluationScores(ReviewIds):
    """What a review's answers come to: `checkmark_score` is the weighted number of yes, `mean_p_yes` their mean."""

    checkmark_score: float
    mean_p_yes: float


class ReviewEvaluation(EvaluationScores):
    """A review's answers by item id, and what they come to."""

    answers: dict[str, Answer]
    engine: str


# LLaMA-Factory's, which datasets with images have in their texts already.
IMAGE_MARKER = "<image>"
