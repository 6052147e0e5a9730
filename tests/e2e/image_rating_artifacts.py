"""Ratings of pictures with known answers, and build_image_pairs run on them, for tests of that stage."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from image_artifacts import draw, publish_as, task_for

import stages.build_image_pairs as stage
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl, write_jsonl

Rows = list[dict[str, Any]]
FIELDS = ["prompt_id", "left", "right", "rater", "dimension", "choice"]
NUM_PROMPTS = 12


def rating(left: str, right: str, choice: str, rater: str = "ann", dimension: str = "overall") -> dict[str, str]:
    """A row of ratings, of two images by their ids."""
    prompt_id = left.split("/")[0]
    return dict(zip(FIELDS, (prompt_id, left, right, rater, dimension, choice), strict=True))


def sure(prompts: Iterable[int] = range(NUM_PROMPTS)) -> Rows:
    """The first image of every prompt is better, whichever side it stands on."""
    pairs = [(f"p{n:02}/0", f"p{n:02}/1") for n in prompts]
    return [rating(a, b, "left") if n % 2 else rating(b, a, "right") for n, (a, b) in enumerate(pairs)]


def make_ratings(folder: Path, ratings: Rows, num_prompts: int = NUM_PROMPTS, num_seeds: int = 2) -> Artifact:
    """An image_ratings artifact."""
    rows = []
    for index, seed in itertools.product(range(num_prompts), range(num_seeds)):
        prompt_id, name = f"p{index:02}", f"images/p{index:02}/{seed}.png"
        draw(folder / name, 100 * index + seed)
        ids = {"image_id": f"{prompt_id}/{seed}", "prompt_id": prompt_id, "seed": seed}
        rows.append({**ids, "prompt": f"bars {index}", "file": name})
    write_jsonl(folder / "images.jsonl", rows)
    write_ratings(folder / "ratings.csv", ratings)
    return publish_as(folder, "image_ratings")


def write_ratings(path: Path, ratings: Rows) -> Path:
    """A file of ratings."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(ratings)
    return path


def build(folder: Path, ratings: Rows, num_seeds: int = 2, **settings: Any) -> Task:
    """The stage's task, finished, on an artifact of these ratings."""
    artifact = make_ratings(folder / "ratings", ratings, num_seeds=num_seeds)
    task = task_for(folder, "build_image_pairs", ratings=artifact)
    stage.run(validate(stage.BuildImagePairsConfig, settings), task)
    return task


def build_from(folder: Path, source: dict[str, Any], **settings: Any) -> Task:
    """The same on a source of people's own."""
    task = task_for(folder, "build_image_pairs")
    stage.run(validate(stage.BuildImagePairsConfig, {"sources": [source], **settings}), task)
    return task


def pairs(task: Task) -> Rows:
    """The pairs that were built."""
    return list(read_jsonl(task.output / "pairs.jsonl"))


def quarantine(task: Task) -> list[tuple[str, str]]:
    """What was set aside, and why."""
    return [(row["what"], row["reason"]) for row in read_jsonl(task.output / "quarantine.jsonl")]


def summary(task: Task) -> dict[str, Any]:
    """What the stage counted."""
    found: dict[str, Any] = json.loads((task.output / "summary.json").read_text())
    return found
