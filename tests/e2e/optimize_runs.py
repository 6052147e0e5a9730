"""optimize_checklist on a small corpus of which half is dev, for tests of that stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from review_artifacts import Rows, make_rows, make_task

import stages.optimize_checklist as stage
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.stage import Task

QUICK = {
    "select": {"min_labels": 40, "num_bootstrap": 10, "num_penalties": 8, "inner_folds": 3},
    "refit": {"num_permutations": 19, "num_resamples": 1000, "outer_folds": 3},
}


def make_half_dev_rows() -> tuple[Rows, Rows]:
    """Papers of which every second one is dev, and their reviews."""
    papers, reviews = make_rows(80)
    for index, paper in enumerate(papers):
        paper["split"] = "dev" if index % 2 else ("train", "val", "test")[index % 3]
    return papers, reviews


def task_of(folder: Path, corpus: Artifact) -> Task:
    """A task of the stage."""
    return make_task(folder, "optimize_checklist", {"corpus": [corpus]})


def optimize(task: Task, **blocks: Any) -> dict[str, Any]:
    """Run the stage, quickly where `blocks` do not say otherwise."""
    values = {**QUICK, **blocks}
    for name in ("select", "refit"):
        values[name] = {**QUICK[name], **blocks.get(name, {})}
    return stage.run(validate(stage.OptimizeChecklistConfig, values), task)


def dev_ids(rows: tuple[Rows, Rows]) -> list[str]:
    """The reviews of dev papers."""
    dev = {paper["paper_id"] for paper in rows[0] if paper["split"] == "dev"}
    return [review["review_id"] for review in rows[1] if review["paper_id"] in dev]
