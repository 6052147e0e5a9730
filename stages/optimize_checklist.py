"""Chooses and weights checklist items by what they tell of a named target on the dev split, with held-out numbers."""

from __future__ import annotations

from pydantic import Field

from prefmill.checklist.optimize.config import (
    ExportConfig,
    ProposeConfig,
    RefitConfig,
    ScoreConfig,
    SelectConfig,
    StepName,
)
from prefmill.core.config import StrictConfig, runtime
from prefmill.core.stage import Metrics, Reads, Stage, Task


class OptimizeChecklistConfig(StrictConfig):
    """One block for each step. A step whose block and whose predecessors have not changed is not run again."""

    propose: ProposeConfig = Field(ProposeConfig(), description="step 0: where candidate items come from")
    score: ScoreConfig = Field(ScoreConfig(), description="step 1: the engine that answers them on the dev split")
    select: SelectConfig = Field(SelectConfig(), description="step 2: how items are chosen")
    refit: RefitConfig = Field(RefitConfig(), description="step 3: how their weights are estimated")
    export: ExportConfig = Field(ExportConfig(), description="step 4: what is written")
    seed: int = Field(0, ge=0, description="of folds, bootstrap samples, permutations and proposals")
    step: StepName | None = runtime(
        None, description="with --force: run this step again, and the others only where its output has changed"
    )


def run(config: OptimizeChecklistConfig, task: Task) -> Metrics:
    """Write `optimal_checklist.json`, `summary.json` and a folder for each step; print the conclusion."""
    from prefmill.checklist.optimize.run import Optimisation, optimize

    plan = Optimisation(config.propose, config.score, config.select, config.refit, config.export, config.seed)
    return optimize(plan, task, config.step)


STAGE = Stage(
    name="optimize_checklist",
    config=OptimizeChecklistConfig,
    run=run,
    root="data",
    writes="checklist",
    reads={"corpus": Reads("review_corpus", "ingest_reviews")},
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
