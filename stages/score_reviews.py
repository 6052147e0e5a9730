"""Scores every review of a corpus with a checklist: the answer, P(yes) and evidence of each item, and their sum."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from prefmill.checklist.engine import EngineConfig, LexicalConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import ChecklistFile
from prefmill.checklist.judge_gate import JudgeGate
from prefmill.core.config import StrictConfig, runtime
from prefmill.core.stage import Metrics, Reads, Stage, Task

DEBUG_REVIEWS = 3  # of each shard, where no limit is given


class ScoreReviewsConfig(StrictConfig):
    """Which checklist to score with, by which engine."""

    unread_with = {"engine.engine=lexical": ("judge",), "debug": ("judge",)}
    engine: EngineConfig = Field(LexicalConfig(), description="how items are answered: lexical, or by a model")
    checklist: ChecklistFile = Field(None, description="a checklist of yours; none: the shipped 24 items")
    limit: int | None = Field(None, ge=1, description="score the first so many reviews of each shard only")
    debug: bool = Field(False, description=f"print prompts and answers; without a limit, of {DEBUG_REVIEWS} reviews")
    judge: JudgeGate = runtime(JudgeGate(), description="when a model's answers are not believed")
    max_failed_share: float = runtime(0.0, ge=0, le=1, description="fail when more of the reviews cannot be scored")


def run(config: ScoreReviewsConfig, task: Task) -> Metrics:
    """Write `review_evaluations.jsonl`, `checklist.json`, `summary.json` and the lists of failed and cut reviews."""
    from prefmill.checklist.calibration import read_temperature
    from prefmill.checklist.score import Scoring, choose_checklist, score_shard

    checklist = choose_checklist(config.checklist, task.optional_input("checklist"))
    settings = config.engine.model_dump(mode="json")
    temperature = read_temperature(task.optional_input("calibration"), settings)
    scoring = Scoring(
        checklist=checklist,
        open_engine=partial(open_engine, config.engine, checklist, temperature),
        limit=DEBUG_REVIEWS if config.debug and config.limit is None else config.limit,
        debug=config.debug,
        max_failed_share=config.max_failed_share,
        temperature=temperature,
        gate=None if config.debug or isinstance(config.engine, LexicalConfig) else config.judge,
    )
    return score_shard(task.input("corpus"), scoring, task)


STAGE = Stage(
    name="score_reviews",
    config=ScoreReviewsConfig,
    run=run,
    root="data",
    writes="review_scores",
    reads={
        "corpus": Reads("review_corpus", "ingest_reviews"),
        "checklist": Reads("checklist", "optimize_checklist", optional=True),
        # Made from scores of this stage: it is given as a folder, since a pipeline has no stage twice.
        "calibration": Reads("judge_quality", optional=True),
    },
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
