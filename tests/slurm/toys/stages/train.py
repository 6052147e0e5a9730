"""Pretends to train: steps that take time, checkpoints, a stop on request, ranks that meet."""

from __future__ import annotations

from prefmill.core.config import StrictConfig, runtime
from prefmill.core.stage import Metrics, Stage, Task


class TrainConfig(StrictConfig):
    """`steps` of `step_seconds` each; `meet` has all ranks add up their numbers over gloo.

    Saved every `save_steps`, through `disk` where one is given; `eat_gb` of memory are held all the while.
    The GPU of one rank breaks once, where `break_gpu_of_rank` says which. Before the first step `groups` are scored
    as a reference's are, of `step_seconds` each.
    """

    steps: int = 10
    step_seconds: float = runtime(0.0)
    meet: bool = False
    ignore_warning: bool = runtime(False)
    save_steps: int = runtime(1000)
    disk: str = runtime("")
    eat_gb: float = runtime(0.0)
    break_gpu_of_rank: int = runtime(-1)
    groups: int = 0


def run(config: TrainConfig, task: Task) -> Metrics:
    """Take the steps that are left, saving when asked to stop; write where every rank was."""
    import json
    import os
    import time

    from prefmill.core.files import append_row
    from prefmill.core.graceful_stop import Stopped, StopWatch
    from prefmill.pipeline.attempts import EXECUTED
    from prefmill.training.checkpoints import newest_checkpoint

    if config.groups:
        _score(task, config.groups, config.step_seconds)
    newest = newest_checkpoint(task.output)
    first = int(newest.rpartition("-")[2]) if newest else 0
    eaten = bytearray(b"x") * int(config.eat_gb * 2**30)
    watch = StopWatch(task.logs)
    for step in range(first + 1, config.steps + 1):
        time.sleep(config.step_seconds)
        if os.environ.get("RANK", "0") != "0":
            continue
        append_row(task.logs / EXECUTED, {"step": step})
        task.progress(step, config.steps, "steps")
        stops = watch.due(step, 1) and step < config.steps and not config.ignore_warning
        if stops or (step % config.save_steps == 0 and step < config.steps):
            _save(task, step, config.disk)
        if stops:
            raise Stopped(f"saved at step {step}")
    del eaten
    if os.environ.get("RANK") == str(config.break_gpu_of_rank) and not (task.logs / "broken").exists():
        (task.logs / "broken").touch()
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    total = _meet() if config.meet else 1
    if os.environ.get("RANK", "0") == "0":
        (task.output / "weights.txt").write_text(json.dumps({"steps": config.steps, "ranks": total}))
    return {"ranks": total}


def _score(task: Task, num_groups: int, seconds: float) -> None:
    """The real reference scoring, of a model that only takes its time; every group scored is noted in the logs."""
    import time

    import torch

    from prefmill.core.files import append_row
    from prefmill.training.data import Group
    from prefmill.training.reference import GroupScoring, kept_reference, reference_scores

    def score(group: Group) -> torch.Tensor:
        append_row(task.logs / "scored.jsonl", {"group": group.prompt[0]})
        time.sleep(seconds)
        return torch.tensor(group.prompt)

    scoring = GroupScoring(lambda group: group.prompt, lambda group: [group], score, lambda _, scores: scores[0])
    groups = [Group([number], [[0]], []) for number in range(num_groups)]
    reference_scores(groups, scoring, kept_reference(task, "toy", {}, torch.device("cpu")), task, "fp32")


def _save(task: Task, step: int, disk: str) -> None:
    """A checkpoint as the Trainer writes it; on `disk` first, where that is another one."""
    from pathlib import Path

    from prefmill.training.checkpoints import mark_complete

    if disk:
        Path(disk).write_bytes(b"x" * 200_000)
    checkpoint = task.output / f"checkpoint-{step}"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "weights.txt").write_text(str(step))
    mark_complete(checkpoint)


def _meet() -> int:
    """How many ranks there are, by adding one for each."""
    import os
    import socket

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    # One write: print's own newline is a second one, and another rank's line may come between them.
    os.write(1, f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}\n".encode())
    dist.destroy_process_group()
    return int(ones.item())


STAGE = Stage("train", TrainConfig, run, "checkpoints", "checkpoint", trains=True)
