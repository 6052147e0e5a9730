"""Corpora and scores as artifacts, made from the generator, for tests of the stages that come after scoring."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.stage import Shard, Task
from prefmill.reviews.generated import generate, quality_factors
from prefmill.store.artifacts import payload, publish
from prefmill.store.jsonl import write_jsonl

Rows = list[dict[str, Any]]
SPLITS = ("train",) * 6 + ("val", "val", "dev", "test")


def make_artifact(folder: Path, kind: str, config: Mapping[str, Any] | None = None, **inputs: Artifact) -> Artifact:
    """Publish what is in `folder`."""
    digests = {name: [item.manifest.content_digest] for name, item in inputs.items()}
    return publish(folder, kind, Provenance("test", "all", "f", {}, config or {}, "0", digests), {})


def make_rows(num_papers: int, seed: int = 0) -> tuple[Rows, Rows]:
    """Papers (splits in turn) and reviews of a generated corpus, sorted."""
    papers, reviews = [], []
    for index, (paper_id, group) in enumerate(itertools.groupby(generate(seed, num_papers), lambda r: r["paper_id"])):
        rows = list(group)
        shared = {key: rows[0][key] for key in ("title", "abstract", "text", "decision", "venue")}
        split = SPLITS[index % len(SPLITS)]
        papers.append({"paper_id": paper_id, **shared, "split": split, "pages": [], "figures": []})
        reviews += [as_review(row) for row in rows]
    return papers, sorted(reviews, key=lambda row: (row["paper_id"], row["review_id"]))


def as_review(row: Mapping[str, Any]) -> dict[str, Any]:
    """A generated row as a Review."""
    review = {key: row[key] for key in ("review_id", "paper_id", "confidence", "venue", "sub_scores")}
    return {**review, "text": row["review_text"], "rating": float(row["rating"])}


def evaluate(review: Mapping[str, Any]) -> dict[str, Any]:
    """A ReviewEvaluation whose checkmark score is the number of the generator's quality factors."""
    answers = {
        name: {"yes": yes, "p_yes": 0.9 if yes else 0.1} for name, yes in quality_factors(review["text"]).items()
    }
    score = sum(answer["yes"] for answer in answers.values())
    mean = sum(answer["p_yes"] for answer in answers.values()) / len(answers)
    ids = {"review_id": review["review_id"], "paper_id": review["paper_id"]}
    return {**ids, "answers": answers, "checkmark_score": float(score), "mean_p_yes": mean, "engine": "test"}


def make_corpus(folder: Path, papers: Rows, reviews: Rows) -> Artifact:
    """A review_corpus of these rows; image files must be below `folder` already."""
    write_jsonl(folder / "papers.jsonl", papers)
    write_jsonl(folder / "reviews.jsonl", reviews)
    (folder / "quarantine.jsonl").touch()
    (folder / "summary.json").write_text("{}")
    return make_artifact(folder, "review_corpus")


def make_scores(
    folder: Path,
    corpus: Artifact,
    evaluations: Iterable[dict[str, Any]],
    num_shards: int = 2,
    config: Mapping[str, Any] | None = None,
    engines: Sequence[str] = (),
) -> tuple[Artifact, ...]:
    """The shards of review_scores; their summaries name `engines`, where given."""
    rows, shards = list(evaluations), []
    for index in range(num_shards):
        shard, part = Shard(index, num_shards), folder / f"shard{index}"
        write_jsonl(part / "review_evaluations.jsonl", [row for row in rows if shard.holds(row["paper_id"])])
        (part / "checklist.json").write_text("{}")
        if engines:
            (part / "summary.json").write_text(json.dumps({"engine": engines[index]}))
        shards.append(make_artifact(part, "review_scores", config, corpus=corpus))
    return tuple(shards)


def add_images(folder: Path, papers: Rows, num_pages: int = 2, every: int = 2) -> None:
    """Give every `every`-th paper page images and a figure, as files below `folder`."""
    from PIL import Image

    for index, paper in enumerate(papers[::every]):
        names = [f"pages/{paper['paper_id']}/{number:03}.png" for number in range(num_pages)]
        paper["pages"], paper["figures"] = names, [f"figures/{paper['paper_id']}/a.png"]
        for name in [*names, *paper["figures"]]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (index % 256, len(name) % 256, 0)).save(folder / name)


def make_task(folder: Path, stage: str, inputs: Mapping[str, Sequence[Artifact]], run: str = "r") -> Task:
    """A task by hand, as the worker would give it to `run`."""
    output, logs = folder / "output", folder / "logs"
    output.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    given = {name: tuple(items) for name, items in inputs.items()}
    return Task(run=run, stage=stage, name="all", values={}, sizes={}, inputs=given, output=output, logs=logs)


def contents(task: Task) -> dict[str, bytes]:
    """The payload's files."""
    return {path.relative_to(task.output).as_posix(): path.read_bytes() for path in payload(task.output)}


def read_rows(path: Path) -> Rows:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def edit_rows(path: Path, change: Callable[[Rows], Rows]) -> None:
    """Rewrite a .jsonl file with its rows changed."""
    write_jsonl(path, change(read_rows(path)))
