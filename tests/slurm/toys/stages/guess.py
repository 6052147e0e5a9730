"""Pretends to train with a rate: the nearer to 3 the better, after a while; resumes where it was killed."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.config import StrictConfig, runtime
from prefmill.core.stage import Metrics, Stage, Task


class GuessConfig(StrictConfig):
    """`rate` is what is looked for; the steps take `step_seconds` each."""

    rate: float = Field(gt=0)
    steps: int = 4
    step_seconds: float = runtime(0.0)


def run(config: GuessConfig, task: Task) -> Metrics:
    """Take the steps that are left, each noted in the logs."""
    import time

    from prefmill.core.files import append_row

    done = task.work / "steps"
    first = int(done.read_text()) if done.is_file() else 0
    for step in range(first + 1, config.steps + 1):
        time.sleep(config.step_seconds)
        append_row(task.logs.parents[3] / "steps_taken.jsonl", {"step": step})
        done.write_text(str(step))
    (task.output / "weights.txt").write_text(str(config.rate))
    return {"accuracy": -abs(config.rate - 3), "final_loss": 0.1}


STAGE = Stage("guess", GuessConfig, run, "checkpoints", "checkpoint", trains=True)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
