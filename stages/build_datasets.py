"""Selects the best reviews for SFT and contrastive same-paper pairs for DPO, as text and image datasets."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from prefmill.core.config import ExternalPath, StrictConfig, later
from prefmill.core.records import Modality, Standing
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.datasets.build import BuildRules, build_datasets
from prefmill.datasets.pairs import PairRules, read_exclude
from prefmill.datasets.registry import DatasetSplit
from prefmill.reviews.scale import RatingUnit


class BuildDatasetsConfig(StrictConfig):
    """Which datasets to make and what is good enough for them."""

    modalities: list[Modality] = Field(
        ["clean", "clean_images", "vision"], min_length=1, description="text, text and figures, page images"
    )
    splits: list[DatasetSplit] = Field(["train", "val"], description="[train] where the corpus has no val papers")
    sft_top_fraction: float = Field(0.2, gt=0, le=1, description="best share of the train reviews by checkmark score")
    decisions: list[Standing] = Field(
        ["accepted"], min_length=1, description="papers that pairs are made of; unknown: those without a decision"
    )
    min_rating_diff: float = Field(2.0, gt=0, description="least rating advantage of the chosen, in the rating_unit")
    rating_unit: RatingUnit = later(
        "points", description="points of a scale of 1 to 10, or quantiles (0 to 1) of the venue's own ratings"
    )
    min_checkmark_diff: float = Field(2.0, ge=0, description="least checkmark advantage of the chosen; 0: ties too")
    max_pairs_per_paper: int | None = Field(None, ge=1, description="keep the clearest so many; none: all")
    exclude: ExternalPath | None = Field(None, description="text file of pair ids to leave out, one a line")
    allow_unscored: bool = Field(False, description="build on the scored reviews when some have no evaluation")

    @field_validator("splits")
    @classmethod
    def _includes_train(cls, splits: list[DatasetSplit]) -> list[DatasetSplit]:
        if "train" not in splits:
            raise ValueError("splits must include train: the SFT cut is taken there")
        return splits

    @model_validator(mode="after")
    def _fits_its_unit(self) -> Self:
        if self.rating_unit == "quantiles" and self.min_rating_diff >= 1:
            raise ValueError("with rating_unit: quantiles, min_rating_diff is below 1, such as min_rating_diff: 0.3")
        return self


def run(config: BuildDatasetsConfig, task: Task) -> Metrics:
    """Write the datasets and their registry; the metrics are the row counts and where the SFT cut fell."""
    rules = BuildRules(
        modalities=tuple(dict.fromkeys(config.modalities)),
        splits=tuple(dict.fromkeys(config.splits)),
        decisions=tuple(config.decisions),
        sft_top_fraction=config.sft_top_fraction,
        allow_unscored=config.allow_unscored,
        rating_unit=config.rating_unit,
        pairs=PairRules(
            min_rating_diff=config.min_rating_diff,
            min_checkmark_diff=config.min_checkmark_diff,
            max_pairs_per_paper=config.max_pairs_per_paper,
            exclude=read_exclude(config.exclude) if config.exclude else frozenset(),
        ),
    )
    summary = build_datasets(task.input("corpus"), task.inputs["scores"], task.output, rules, task.progress)
    rows = {name: counts["rows"] for name, counts in summary["datasets"].items()}
    told: Metrics = {key: summary[key] for key in ("unscored_reviews", "warnings") if key in summary}
    return {"rows": rows, "sft_cut": summary["sft"]["cut"], **told}


STAGE = Stage(
    name="build_datasets",
    config=BuildDatasetsConfig,
    run=run,
    root="data",
    writes="preference_datasets",
    reads={
        "corpus": Reads("review_corpus", "ingest_reviews"),
        "scores": Reads("review_scores", "score_reviews", match="all"),
    },
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
