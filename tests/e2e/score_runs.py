"""score_reviews on a small corpus, for tests of that stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from review_artifacts import Rows, make_task

import stages.score_reviews as stage
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl

FILES = ["checklist.json", "failures.jsonl", "review_evaluations.jsonl", "summary.json", "truncated.jsonl"]
NUM_PAPERS = 24


def score(task: Task, **settings: Any) -> dict[str, Any]:
    """Run the stage."""
    return stage.run(validate(stage.ScoreReviewsConfig, settings), task)


def task_of(folder: Path, corpus: Artifact, shard: int = 0, num_shards: int = 1, **inputs: Artifact) -> Task:
    """A task of the stage, or one of its shards."""
    task = make_task(folder, "score_reviews", {"corpus": [corpus], **{key: [item] for key, item in inputs.items()}})
    return dataclasses.replace(task, values={"shard": shard}, sizes={"shard": num_shards})


def evaluations(task: Task) -> Rows:
    """The rows of the scored reviews."""
    return list(read_jsonl(task.output / "review_evaluations.jsonl"))
