"""Puts all numbers together."""

from __future__ import annotations

from prefmill.core.config import StrictConfig
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.store.jsonl import read_jsonl, write_jsonl


class JoinConfig(StrictConfig):
    """Nothing to choose."""


def run(config: JoinConfig, task: Task) -> Metrics:
    """Write all numbers in order."""
    rows = [row for artifact in task.inputs["numbers"] for row in read_jsonl(artifact.file("numbers.jsonl"))]
    write_jsonl(task.output / "all.jsonl", sorted(rows, key=lambda row: row["n"]))
    return {"rows": len(rows)}


STAGE = Stage("join", JoinConfig, run, "data", "report", {"numbers": Reads("review_corpus", "use")})
