"""Datasets built from a generated corpus, and validate_datasets run on them, for tests of that stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from review_artifacts import Rows, add_images, evaluate, make_artifact, make_corpus, make_rows, make_scores, make_task

from prefmill.core.artifact import Artifact
from prefmill.core.config import load
from prefmill.core.errors import PrefmillError
from prefmill.core.stage import Task
from stages import build_datasets, validate_datasets

Inputs = dict[str, tuple[Artifact, ...]]
ALL = ["clean", "clean_images", "vision"]


def build(folder: Path, papers: Rows, reviews: Rows, modalities: list[str]) -> Inputs:
    """The inputs of validation: a corpus, its scores and the datasets made from them."""
    corpus = make_corpus(folder / "corpus", papers, reviews)
    inputs: Inputs = {"corpus": (corpus,), "scores": make_scores(folder / "scores", corpus, map(evaluate, reviews))}
    task = make_task(folder / "datasets", "build_datasets", inputs)
    build_datasets.run(load(build_datasets.BuildDatasetsConfig, {"modalities": modalities}), task)
    return {**inputs, "datasets": (make_artifact(task.output, "preference_datasets"),)}


def build_all(folder: Path) -> Inputs:
    """The same of 80 papers, half of them with images, in every modality."""
    papers, reviews = make_rows(80)
    add_images(folder / "corpus", papers)
    return build(folder, papers, reviews, ALL)


def validate(folder: Path, inputs: Inputs, **config: Any) -> tuple[Task, dict[str, Any]]:
    """The stage's task, finished, and its metrics."""
    task = make_task(folder / "validation", "validate_datasets", inputs)
    return task, validate_datasets.run(load(validate_datasets.ValidateDatasetsConfig, config), task)


def report_of(task_folder: Path) -> dict[str, Any]:
    """The report in the task's logs, there for a refusal too."""
    return json.loads((task_folder / "validation" / "logs" / "report.json").read_text())


def failures(folder: Path, inputs: Inputs, **config: Any) -> dict[str, str]:
    """The first error of each check, as `where: what`; the stage must have refused the datasets with that table."""
    with pytest.raises(PrefmillError) as caught:
        validate(folder, inputs, **config)
    report = report_of(folder)
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert report["errors"] >= len(errors) > 0
    for finding in errors:
        assert finding["where"] in str(caught.value)
        assert finding["what"] in str(caught.value)
    return {finding["check"]: f"{finding['where']}: {finding['what']}" for finding in reversed(errors)}
