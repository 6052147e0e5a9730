"""Multiplies numbers."""

from __future__ import annotations

from prefmill.core.config import StrictConfig, runtime
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.store.jsonl import read_jsonl, write_jsonl


class UseConfig(StrictConfig):
    """`seconds` of sleep before the work."""

    factor: int = 2
    seconds: float = runtime(0.0)


def run(config: UseConfig, task: Task) -> Metrics:
    """Write the product of every number read."""
    import time

    time.sleep(config.seconds)
    rows = [row for artifact in task.inputs["numbers"] for row in read_jsonl(artifact.file("numbers.jsonl"))]
    write_jsonl(task.output / "numbers.jsonl", [{"n": row["n"] * config.factor} for row in rows])
    return {}


READS = {"numbers": Reads("review_corpus", "make", match="elementwise")}
STAGE = Stage("use", UseConfig, run, "data", "review_corpus", READS)
