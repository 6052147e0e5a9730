"""Scores with known answers, people's labels of them, and judge_quality run on both, for tests of that stage."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from review_artifacts import Rows, make_artifact, make_rows, make_task

import stages.judge_quality as stage
import stages.score_reviews as score_reviews
from prefmill.checklist.items import Checklist, save_checklist
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl, write_jsonl

ANY_JUDGE = {"min_answer_mass": 0, "max_same_answer": 1}  # a tiny model judges nothing
QUICK = {"num_probed": 0, "num_resamples": 1000, "judge": ANY_JUDGE}
NUM_PAPERS = 40
Answers = Mapping[str, Sequence[float]]


def make_split_rows() -> tuple[Rows, Rows]:
    """Papers that are of train and of dev in turn, and their reviews."""
    papers, reviews = make_rows(NUM_PAPERS)
    for index, paper in enumerate(papers):
        paper["split"] = "dev" if index % 2 else "train"
    return papers, reviews


def scored(
    folder: Path, corpus: Artifact, engine: dict[str, Any], calibration: Artifact | None = None, **settings: Any
) -> Artifact:
    """The scores that score_reviews gives, as an artifact."""
    inputs = {"corpus": [corpus], **({"calibration": [calibration]} if calibration else {})}
    task = make_task(folder, "score_reviews", inputs)
    config = validate(score_reviews.ScoreReviewsConfig, {"engine": engine, "judge": ANY_JUDGE, **settings})
    score_reviews.run(config, task)
    return make_artifact(task.output, "review_scores", config.model_dump(mode="json"), corpus=corpus)


def judged(
    folder: Path,
    corpus: Artifact,
    answers: Mapping[str, Answers],
    engine: str = "vllm",
    checklist: Checklist | None = None,
) -> Artifact:
    """Scores as a model would have left them: P(yes) by item for each review of the corpus that is named."""
    checklist = checklist or two_items()
    folder.mkdir(parents=True, exist_ok=True)
    evaluations = [
        {
            "review_id": row["review_id"],
            "paper_id": row["paper_id"],
            "answers": {name: {"yes": p > 0.5, "p_yes": p} for name, p in answers[row["review_id"]].items()},
            "checkmark_score": float(sum(p > 0.5 for p in answers[row["review_id"]].values())),
            "mean_p_yes": float(np.mean(list(answers[row["review_id"]].values()))),
            "engine": engine,
        }
        for row in read_jsonl(corpus.file("reviews.jsonl"))
        if row["review_id"] in answers
    ]
    write_jsonl(folder / "review_evaluations.jsonl", evaluations)
    save_checklist(checklist, folder / "checklist.json")
    (folder / "summary.json").write_text("{}")
    config = {"engine": {"engine": engine, "model_name_or_path": "a/judge"}}
    return make_artifact(folder, "review_scores", config, corpus=corpus)


def two_items(**questions: str) -> Checklist:
    """A checklist of two items, whose questions may be given."""
    items = [
        {"id": name, "question": questions.get(name, f"Is it {name}?"), "source": "us"} for name in ("kind", "clear")
    ]
    return Checklist.model_validate_json(json.dumps({"name": "two", "items": items}))


def write_labels(
    path: Path, labels: Iterable[Sequence[Any]], columns: Sequence[str] = ("review_id", "item_id", "label")
) -> Path:
    """A file of people's labels."""
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *labels])
    return path


def measure(folder: Path, inputs: Mapping[str, Artifact], **settings: Any) -> tuple[dict[str, Any], Task]:
    """What judge_quality finds, without probes unless asked for, and its task."""
    task = make_task(folder, "judge_quality", {name: [item] for name, item in inputs.items()})
    stage.run(validate(stage.JudgeQualityConfig, {**QUICK, **settings}), task)
    return json.loads((task.output / "quality.json").read_text()), task


def draw(
    ids: Sequence[str], seed: int, temperature: float = 1.0
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, bool]]]:
    """P(yes) of a judge that is over-confident by `temperature`, and labels drawn from the true probabilities."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0.3, 1.5, (len(ids), 2))
    labels = rng.random(odds.shape) < 1 / (1 + np.exp(-odds))
    p_yes = np.round(1 / (1 + np.exp(-odds * temperature)), 6)
    names = ("kind", "clear")
    answers = {key: dict(zip(names, row, strict=True)) for key, row in zip(ids, p_yes.tolist(), strict=True)}
    return answers, {key: dict(zip(names, row, strict=True)) for key, row in zip(ids, labels.tolist(), strict=True)}


def as_rows(labels: Mapping[str, Mapping[str, bool]]) -> Rows:
    """Labels as rows of their file."""
    return [[key, name, "yes" if yes else "no"] for key, row in labels.items() for name, yes in row.items()]  # type: ignore[misc]
