"""Measures the judge: agreement with people and other judges, biases, injected instructions; calibrates it."""

from __future__ import annotations

from prefmill.checklist.quality_config import JudgeQualityConfig
from prefmill.core.stage import Metrics, Reads, Stage, Task


def run(config: JudgeQualityConfig, task: Task) -> Metrics:
    """Write `quality.json`, the rows behind it and, where one is fitted, `calibration.json`; print the conclusion."""
    from prefmill.checklist.quality import measure_quality
    from prefmill.report.judge_story import tell_quality

    return measure_quality(config, task, tell_quality)


STAGE = Stage(
    name="judge_quality",
    config=JudgeQualityConfig,
    run=run,
    root="data",
    writes="judge_quality",
    reads={
        "corpus": Reads("review_corpus", "ingest_reviews"),
        "scores": Reads("review_scores", "score_reviews", match="all"),
        "other_scores": Reads("review_scores", optional=True),
    },
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
