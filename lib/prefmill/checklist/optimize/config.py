"""The configuration of each step of optimize_checklist."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from prefmill.checklist.engine import EngineConfig, LexicalConfig
from prefmill.checklist.items import ChecklistFile
from prefmill.checklist.judge_gate import JudgeGate
from prefmill.checklist.optimize.targets import Target
from prefmill.core.config import ExternalPath, StrictConfig, runtime

StepName = Literal["propose", "score", "select", "refit", "export"]


class ProposeConfig(StrictConfig):
    """Where candidate items come from."""

    unread_with = {"engine=none": ("num_proposals", "num_examples", "max_new_tokens")}
    shipped: bool = Field(True, description="the shipped 24 items are candidates")
    candidates: ChecklistFile = Field(None, description="a checklist of yours with more items")
    engine: EngineConfig | None = Field(None, description="a model that proposes items, configured as in score_reviews")
    num_proposals: int = Field(20, ge=1, description="items to ask the model for")
    num_examples: int = Field(4, ge=0, description="dev reviews the model is shown")
    max_new_tokens: int = Field(1024, ge=16, description="length of the model's answer")


class ScoreConfig(StrictConfig):
    """How the candidates are answered for the dev reviews."""

    unread_with = {"engine.engine=lexical": ("max_paraphrases", "judge")}
    engine: EngineConfig = Field(LexicalConfig(), description="as in score_reviews; optimise with the one you score by")
    max_reviews: int | None = Field(5000, ge=1, description="dev reviews used at most, whole papers; none: all")
    max_paraphrases: int = Field(1, ge=0, description="of each item, asked to see whether answers stay the same")
    max_failed_share: float = runtime(0.0, ge=0, le=1, description="fail when more of the reviews cannot be scored")
    judge: JudgeGate = runtime(JudgeGate(), description="when a model's answers are not believed; as in score_reviews")


class SelectConfig(StrictConfig):
    """What items are chosen to predict, which are dropped beforehand, and how strict the choice is."""

    unread_with = {"shrink=false": ("l1_ratio",)} | {
        f"target={target}": ("accept_rating",) for target in ("confidence", "rating", "labels")
    }
    target: Target = Field("confidence", description="confidence, rating, decision_agreement or labels")
    labels: ExternalPath | None = Field(None, description="CSV with review_id and label, for the target labels")
    # In points of 1 to 10, to which every venue's ratings are mapped.
    accept_rating: float = Field(6.0, description="a rating from here on recommends acceptance")
    min_labels: int = Field(100, ge=20, description="dev reviews that must have the target")
    min_answer_share: float = Field(0.02, ge=0, lt=0.5, description="constant: the rarer answer is rarer than this")
    min_paraphrase_kappa: float = Field(0.4, ge=-1, le=1, description="unreliable: paraphrases agree less")
    min_seed_kappa: float = Field(0.1, ge=0, le=1, description="unreliable: answers drawn with two seeds agree less")
    max_correlation: float = Field(0.9, gt=0, le=1, description="redundant: two items correlate more, either way")
    max_mutual_information: float = Field(0.8, gt=0, le=1, description="redundant: two items share more of an entropy")
    inner_folds: int = Field(5, ge=2, description="of papers, to choose the penalty")
    num_penalties: int = Field(20, ge=2, description="on the regularisation path")
    num_bootstrap: int = Field(50, ge=10, description="samples of papers, to see which items are chosen again")
    shrink: bool = Field(True, description="also try weights for all items, shrunk by a ridge or elastic net")
    signed: bool = Field(False, description="of shrunk weights: also below zero, a yes that speaks against a review")
    l1_ratio: float = Field(0.0, ge=0, le=1, description="of shrunk weights: 0 ridge, between an elastic net, 1 lasso")
    min_stability: float = Field(0.9, gt=0, le=1, description="share of the samples that must choose an item")

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        if (self.target == "labels") != (self.labels is not None):
            raise ValueError("target labels and the file `labels` go together: give both or neither")
        if self.signed and not self.shrink:
            raise ValueError("signed is of shrunk weights: set shrink=true, or leave signed out")
        return self


class RefitConfig(StrictConfig):
    """How the chosen items are weighted, and how their worth on unseen papers is measured."""

    weights: Literal["fitted", "equal"] = Field("fitted", description="by least squares, or every kept item 1")
    outer_folds: int = Field(5, ge=2, description="of papers; each is held out from the whole choice once")
    # With the true target there are 200 values, so that p comes in steps of 0.005.
    num_permutations: int = Field(199, ge=19, description="of the target, for the test of any signal")
    alpha: float = Field(0.05, ge=0.001, lt=0.5, description="a signal is reported when the test's p is at most this")
    num_resamples: int = Field(10_000, ge=1000, le=1_000_000, description="bootstrap samples of papers, for intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of every interval")

    @model_validator(mode="after")
    def _can_be_small(self) -> Self:
        if 1 / (self.num_permutations + 1) > self.alpha:
            raise ValueError("with so few permutations p can never be as small as alpha: raise num_permutations")
        return self


class ExportConfig(StrictConfig):
    """The checklist that comes out."""

    name: str = Field("prefmill-optimal", min_length=1, description="of the checklist")
    on_no_signal: Literal["equal", "fail"] = Field(
        "equal", description="equal: export what passed the screen, every weight 1, and say so; fail: stop"
    )
    on_worse: Literal["equal", "keep"] = Field(
        "equal", description="the same where all items equal is shown to be better on held-out papers"
    )
