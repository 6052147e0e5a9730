"""Review files, and ingest_reviews run on them by the worker, for tests of that stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact
from prefmill.core.config import load
from prefmill.core.stage import load_stage
from prefmill.pipeline.plan import PlannedTask
from prefmill.pipeline.worker import execute
from prefmill.store.artifacts import read, read_manifest
from prefmill.store.jsonl import read_jsonl


def planned(folder: Path, **config: Any) -> PlannedTask:
    stage = load_stage("ingest_reviews")
    checked = load(stage.config, json.loads(json.dumps(config, default=str)))
    return PlannedTask("r", stage, "all", {}, {}, checked, {}, folder / "out", folder / "logs")


def ingest(folder: Path, **config: Any) -> Artifact:
    task = planned(folder, **config)
    execute(task)
    return read(task.output, "review_corpus")


def rows(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return list(read_jsonl(artifact.file(name)))


def summary(artifact: Artifact) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(artifact.file("summary.json").read_text())
    return content


def jsonl(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def row(number: int, **change: Any) -> dict[str, Any]:
    base = {
        "paper_id": f"p{number}",
        "title": f"Title {number}",
        "abstract": "About it.",
        "decision": "accepted",
        "review_id": f"r{number}",
        "review_text": "A review.",
        "rating": 6,
    }
    return {key: value for key, value in {**base, **change}.items() if value != "(absent)"}


def generated(num_papers: int, seed: int = 0) -> dict[str, Any]:
    return {"format": "generated", "num_papers": num_papers, "seed": seed}


def assert_nothing_done(task: PlannedTask) -> None:
    assert read_manifest(task.output) is None
    left = {path.name for path in task.output.glob("*") if path.is_file()} if task.output.is_dir() else set()
    assert left == set()
