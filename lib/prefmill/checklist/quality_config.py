"""The configuration of judge_quality."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from prefmill.checklist.judge_gate import JudgeGate
from prefmill.core.config import ExternalPath, StrictConfig, runtime


class JudgeQualityConfig(StrictConfig):
    """What the judge is held against, and how many reviews are changed and asked about again."""

    unread_with = {
        "calibrate=false": ("min_labels", "folds"),
        "num_probed=0": ("probe_other", "max_paraphrases", "judge"),
    }
    labels: ExternalPath | None = Field(None, description="table of people's answers: review_id, item_id, label, rater")
    calibrate: bool = Field(False, description="fit a temperature to the labels of dev reviews")
    min_labels: int = Field(50, ge=10, description="of dev reviews, for a temperature")
    folds: int = Field(5, ge=2, description="of labelled dev papers, to see what a temperature is worth")
    num_probed: int = Field(50, ge=0, description="reviews that are changed and asked about again; 0: none")
    probe_other: bool = Field(True, description="the judge of other_scores as well: its engine is opened too")
    max_paraphrases: int = Field(1, ge=0, description="of each item, asked about the probed reviews")
    num_resamples: int = Field(10_000, ge=1000, le=1_000_000, description="bootstrap samples of papers, for intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of every interval")
    seed: int = Field(0, ge=0, description="of the sample of reviews, the folds and the bootstrap")
    judge: JudgeGate = runtime(JudgeGate(), description="when a model is not asked again; as in score_reviews")

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        if self.calibrate and self.labels is None:
            raise ValueError("a temperature is fitted to labels: give the file `labels`, or set calibrate=false")
        return self
