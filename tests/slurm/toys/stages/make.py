"""Writes numbers."""

from __future__ import annotations

from prefmill.core.config import ExternalPath, StrictConfig, later, runtime
from prefmill.core.stage import Metrics, Stage, Task
from prefmill.store.jsonl import write_jsonl


class MakeConfig(StrictConfig):
    """`text`, or what stands in `file`, is written; `seconds`, `fail` and `fail_first` (a shard) make trouble."""

    rows: int = 6
    text: str = ""
    file: ExternalPath | None = later(None)
    seconds: float = runtime(0.0)
    fail: bool = runtime(False)
    fail_first: int = runtime(-1)


def run(config: MakeConfig, task: Task) -> Metrics:
    """Write this shard's numbers."""
    import os
    import sys
    import time

    time.sleep(config.seconds)
    tried = task.work / "tried"
    if task.shard.index == config.fail_first and not tried.exists():
        tried.touch()
        raise ValueError("told to fail once")
    if config.fail:
        raise ValueError("told to fail")
    print("python", sys.executable, "secret", bool(os.environ.get("TOY_SECRET")), flush=True)
    text = config.text if config.file is None else config.file.read_text()
    rows = [{"n": n, "text": text} for n in range(config.rows) if task.shard.holds(str(n))]
    write_jsonl(task.output / "numbers.jsonl", rows)
    return {"rows": len(rows)}


STAGE = Stage("make", MakeConfig, run, "data", "review_corpus")
