"""What the tests of build_datasets build from, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from review_artifacts import evaluate, make_corpus, make_scores, make_task

from prefmill.core.artifact import Artifact
from prefmill.core.config import load
from prefmill.core.stage import Task
from stages.build_datasets import BuildDatasetsConfig, run

TEXT = {"modalities": ["clean"]}
Inputs = dict[str, tuple[Artifact, ...]]


def make_inputs(folder: Path, papers: list[Any], reviews: list[Any], **scores: Any) -> Inputs:
    corpus = make_corpus(folder / "corpus", papers, reviews)
    return {"corpus": (corpus,), "scores": make_scores(folder / "scores", corpus, map(evaluate, reviews), **scores)}


def build(folder: Path, inputs: Inputs, run_name: str = "r", **config: Any) -> Task:
    task = make_task(folder, "build_datasets", inputs, run_name)
    run(load(BuildDatasetsConfig, {**TEXT, **config}), task)
    return task


def summary_of(task: Task) -> dict[str, Any]:
    return json.loads((task.output / "summary.json").read_text())
