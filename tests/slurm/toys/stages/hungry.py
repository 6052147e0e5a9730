"""Pretends to train on a GPU that holds one row at a time, and that only with activation checkpointing."""

from __future__ import annotations

from pydantic import Field

from prefmill.core.stage import Metrics, Stage, Task
from prefmill.training.config import TrainingConfig


class HungryConfig(TrainingConfig):
    """`fits` says what does."""

    learning_rate: float = Field(1.0, gt=0)
    num_train_epochs: int = 1
    fits: int = 1


def run(config: HungryConfig, task: Task) -> Metrics:
    """Save a checkpoint, then run out of memory as torch does, until it is small enough."""
    from prefmill.core.files import append_row
    from prefmill.pipeline.attempts import EXECUTED
    from prefmill.training.checkpoints import mark_complete, newest_checkpoint

    first = 1 if newest_checkpoint(task.output) is None else 2
    for step in range(first, 3):
        append_row(task.logs / EXECUTED, {"step": step, "rows": config.per_device_train_batch_size})
        if step == 1:
            checkpoint = task.output / "checkpoint-1"
            checkpoint.mkdir()
            (checkpoint / "weights.txt").write_text("1")
            mark_complete(checkpoint)
        elif config.per_device_train_batch_size > config.fits or not config.activation_checkpointing:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    (task.output / "weights.txt").write_text("2")
    return {"final_loss": 0.5}


STAGE = Stage("hungry", HungryConfig, run, "checkpoints", "checkpoint", trains=True)
