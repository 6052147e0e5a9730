"""A small pipeline's artifacts, laid out as a workspace, for tests of the stages at its end.

Reviews are composed by the generator with a known number of quality factors, so that what must come out is known.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefmill.checklist.engine import LexicalConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import Checklist, load_checklist, save_checklist
from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.stage import Task
from prefmill.evaluation.held_out import AcceptRule, HeldOut, human_generations, read_held_out, score_generations
from prefmill.evaluation.record import write_evaluation
from prefmill.evaluation.rows import HUMAN, Generation
from prefmill.reviews import synthetic_text as phrases
from prefmill.reviews.generated import compose, generate
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import read_jsonl, write_jsonl
from stages import build_datasets, validate_datasets

WORDS = {slot: choices[0] for slot, choices in phrases.TITLE_SLOTS.items()} | {
    "bench": "Basalt", "base": "Harrow", "other": "Quill", "gain": "4", "seeds": "three seeds", "code": "public",
}  # fmt: skip
SPLITS = ("test", "train", "val", "test", "train", "train")


def make_task(stage: str, output: Path, inputs: Mapping[str, Sequence[Artifact]]) -> Task:
    """A task by hand; its logs lie where the layout <workspace>/<root>/<run>/<stage>/<task> puts them."""
    workspace, run, name = output.parents[3], output.parents[1].name, output.name
    logs = workspace / "logs" / run / stage / name
    logs.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    given = {key: tuple(items) for key, items in inputs.items()}
    return Task(run=run, stage=stage, name=name, values={}, sizes={}, inputs=given, output=output, logs=logs)


def publish_as(
    folder: Path, kind: str, config: Mapping[str, Any] | None = None, **inputs: Artifact | Sequence[Artifact]
) -> Artifact:
    """Make `folder` an artifact of the stage and task that its path names."""
    stage, name = folder.parent.name, folder.name
    lists = {key: [item] if isinstance(item, Artifact) else list(item) for key, item in inputs.items()}
    digests = {key: [item.manifest.content_digest for item in items] for key, items in lists.items()}
    identity = {"config": dict(config or {}), "inputs": digests}
    return publish(folder, kind, Provenance(stage, name, "f", identity, dict(config or {}), "0", digests), {})


def make_corpus(
    workspace: Path, num_papers: int = 30, generated: bool = True, title: str | None = None, seed: int = 1
) -> Artifact:
    """A corpus in which every third paper is a test paper; `title` replaces the titles."""
    folder = workspace / "data" / "run" / "ingest_reviews" / "all"
    papers, reviews = [], []
    for index, (key, rows) in enumerate(itertools.groupby(generate(seed, num_papers), lambda row: row["paper_id"])):
        group = list(rows)
        first = group[0]
        papers.append(
            {
                **{name: first[name] for name in ("paper_id", "title", "abstract", "text", "decision", "venue")},
                **({"title": title} if title else {}),
                "split": SPLITS[index % len(SPLITS)],
                "pages": [],
                "figures": [],
            }
        )
        reviews += [
            {
                "review_id": row["review_id"],
                "paper_id": key,
                "text": row["review_text"],
                "rating": float(row["rating"]),
                "confidence": float(row["confidence"]),
                "venue": row["venue"],
                "sub_scores": {},
            }
            for row in group
        ]
    write_jsonl(folder / "papers.jsonl", papers)
    write_jsonl(folder / "reviews.jsonl", reviews)
    split_of = {paper["paper_id"]: paper["split"] for paper in papers}
    splits = {
        name: {
            "papers": list(split_of.values()).count(name),
            "reviews": sum(split_of[row["paper_id"]] == name for row in reviews),
        }
        for name in ("train", "val", "dev", "test")
    }
    sources = [{"format": "generated" if generated else "jsonl", "rows": len(reviews)}]
    summary = {
        "papers": len(papers),
        "reviews": len(reviews),
        "splits": splits,
        "sources": sources,
        "quarantined_rows": 0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return publish_as(folder, "review_corpus")


def write_review(rng: random.Random, num_factors: int, num_vague: int, rating: int) -> str:
    """A review with this many quality factors."""
    factors = rng.sample(list(phrases.FACTORS), num_factors)
    return compose(rng, WORDS, factors, num_vague, rating)


def make_evaluation(
    workspace: Path, corpus: Artifact, model: str, factors: tuple[int, int], hostile: str = ""
) -> Artifact:
    """An evaluation whose reviews have `factors[0]` to `factors[1]` quality factors; `hostile` is put before each."""
    folder = workspace / "data" / "run" / "evaluate" / f"{model}-clean"
    folder.mkdir(parents=True)
    held_out = read_held_out(corpus, None, 0)
    generations = human_generations(held_out) if model == HUMAN else _generations(held_out, model, factors, hostile)
    checklist = load_checklist()
    engine = open_engine(LexicalConfig(), checklist)
    evaluations = score_generations(generations, held_out.papers, engine, checklist.ids, folder / "work")
    heading = {"model": model, "modality": "clean", "engine": engine.name, "training": None, "num_papers_left_out": 0}
    write_evaluation(folder, heading, generations, evaluations, held_out, checklist, AcceptRule(6.0))
    return publish_as(folder, "evaluation", {"model": model, "modality": "clean"}, corpus=corpus)


def make_training(workspace: Path, corpus: Artifact, checklist: Checklist | None = None) -> dict[str, list[Artifact]]:
    """Scores, datasets and their validation by the stages themselves, and checkpoints with the logs of a training."""
    run = workspace / "data" / "run"
    papers = {row["paper_id"]: row for row in read_jsonl(corpus.file("papers.jsonl"))}
    reviews = itertools.groupby(read_jsonl(corpus.file("reviews.jsonl")), key=lambda row: row["paper_id"])
    checklist = checklist or load_checklist()
    engine = open_engine(LexicalConfig(), checklist)
    scores = run / "score_reviews" / "all"
    write_jsonl(
        scores / "review_evaluations.jsonl", engine.evaluate((papers[key], list(rows)) for key, rows in reviews)
    )
    save_checklist(checklist, scores / "checklist.json")
    scored = publish_as(scores, "review_scores", corpus=corpus)
    built = make_task("build_datasets", run / "build_datasets" / "all", {"corpus": [corpus], "scores": [scored]})
    build_datasets.run(build_datasets.BuildDatasetsConfig(modalities=["clean"]), built)
    datasets = publish_as(built.output, "preference_datasets", corpus=corpus, scores=scored)
    checked = make_task("validate_datasets", run / "validate_datasets" / "all", {"datasets": [datasets]})
    validate_datasets.run(validate_datasets.ValidateDatasetsConfig(), checked)
    validation = publish_as(checked.output, "validation", datasets=datasets)
    sft = make_checkpoint(workspace, "sft", datasets=datasets, validation=validation)
    dpo = make_checkpoint(workspace, "dpo", policy=sft, datasets=datasets, validation=validation)
    return {"datasets": [datasets], "validation": [validation], "sft": [sft], "dpo": [dpo]}


def make_checkpoint(workspace: Path, stage: str, **inputs: Artifact) -> Artifact:
    """A checkpoint without weights worth the name, and the curves of its training in the logs."""
    folder = workspace / "checkpoints" / "run" / stage / "clean"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"stage": stage}))
    logs = workspace / "logs" / "run" / stage / "clean"
    rng = random.Random(stage)
    is_dpo = stage == "dpo"
    curve = [
        {"step": step, "epoch": step / 30, "loss": (0.69 if is_dpo else 4.0) * 0.98**step + rng.random() * 0.03}
        | ({"margin": 0.2 * step, "accuracy": 1 - 0.5 * 0.95**step} if is_dpo else {})
        for step in range(1, 61)
    ]
    write_jsonl(logs / "steps.jsonl", [*curve[:40], *curve[35:]])  # as after a kill: steps 36 to 40 were taken twice
    if is_dpo:
        rows = [
            {"step": step, "epoch": step // 31, "pair_id": f"p{pair}", "margin": rng.gauss(step / 20, 2)}
            for step in range(1, 61)
            for pair in range(4)
        ]
        write_jsonl(logs / "margins" / "margins_log.jsonl", rows)
    return publish_as(folder, "checkpoint", {"learning_rate": 1e-5, "loss_type": ["sigmoid"]}, **inputs)


def _generations(held_out: HeldOut, model: str, factors: tuple[int, int], hostile: str) -> list[Generation]:
    rng = random.Random(model)
    rows: list[Generation] = []
    for key, paper in held_out.papers.items():
        for sample in range(2):
            rating = rng.randint(3, 8)
            text = hostile + write_review(rng, rng.randint(*factors), rng.randint(0, 3), rating)
            row: Generation = {
                "paper_id": key,
                "sample": sample,
                "text": text,
                "rating": float(rating),
                "decision": paper["decision"],
                "truncated": False,
            }
            rows.append(row)
    return rows
