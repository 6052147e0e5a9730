"""Pretends to train: steps that take time, checkpoints, a stop on request, ranks that meet."""

from __future__ import annotations

from prefmill.config import StrictConfig, runtime
from prefmill.stage import Metrics, Stage, Task


class TrainConfig(StrictConfig):
    """`steps` of `step_seconds` each; `meet` has all ranks add up their numbers over gloo."""

    steps: int = 10
    step_seconds: float = runtime(0.0)
    meet: bool = False
    ignore_warning: bool = runtime(False)


def run(config: TrainConfig, task: Task) -> Metrics:
    """Take the steps that are left, saving when asked to stop; write where every rank was."""
    import json
    import os
    import time

    from prefmill.artifacts import write_atomic
    from prefmill.stopping import Stopped, StopWatch
    from prefmill.training import EXECUTED, append_row

    saved = task.work / "step"
    first = int(saved.read_text()) if saved.exists() else 0
    watch = StopWatch(task.logs)
    for step in range(first + 1, config.steps + 1):
        time.sleep(config.step_seconds)
        if os.environ.get("RANK", "0") == "0":
            append_row(task.logs / EXECUTED, {"step": step})
        if watch.due(step, 1) and step < config.steps and not config.ignore_warning:
            write_atomic(saved, str(step))
            raise Stopped(f"saved at step {step}")
    total = _meet() if config.meet else 1
    if os.environ.get("RANK", "0") == "0":
        (task.output / "weights.txt").write_text(json.dumps({"steps": config.steps, "ranks": total}))
    return {"ranks": total}


def _meet() -> int:
    """How many ranks there are, by adding one for each."""
    import os
    import socket

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}", flush=True)
    dist.destroy_process_group()
    return int(ones.item())


STAGE = Stage("train", TrainConfig, run, "checkpoints", "checkpoint", trains=True)
