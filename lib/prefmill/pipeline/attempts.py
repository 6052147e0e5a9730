"""The attempts at a task: which job, which node, when, how it ended, and how far it got."""

from __future__ import annotations

import os
import socket
import time
from numbers import Real
from pathlib import Path
from typing import Any

from prefmill.core.files import append_row, read_appended, read_record
from prefmill.core.places import PROGRESS
from prefmill.distributed.devices import visible_gpus

EXECUTED = "executed_steps.jsonl"  # one row for every optimizer step this task ever took, repeats included
ATTEMPTS = "attempts.jsonl"
# Without a bound a task whose time limit is too short to save in would be requeued for ever.
MAX_IDLE_ATTEMPTS = 5
_VARIABLES = {
    "job_id": "SLURM_JOB_ID",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "restart_count": "SLURM_RESTART_COUNT",
}


def this_job() -> dict[str, str]:
    """The Slurm job this process is in, as far as it is in one."""
    return {key: os.environ[name] for key, name in _VARIABLES.items() if name in os.environ}


def held_gpus() -> int:
    """The GPUs that this task's job holds on all of its nodes; outside Slurm those this process can see."""
    # All that the job holds, used or not: that is what a cluster bills.
    if "SLURM_JOB_ID" in os.environ:
        return int(os.environ.get("SLURM_GPUS_ON_NODE", "0")) * int(os.environ.get("SLURM_NNODES", "1"))
    return len(visible_gpus())


def note_lost(logs: Path, before: dict[str, Any]) -> None:
    """Record the attempt that left the status `before` if nothing was left to say how it ended: SIGKILL, power cut."""
    if before.get("state") == "running" and "attempt" in before:
        _append(logs, before["attempt"], "lost", ended=_last_sign(logs, before.get("time", 0.0)))


def begin(logs: Path, before: dict[str, Any]) -> dict[str, Any]:
    """What is known when an attempt starts; `before` is the status left by the last one, recorded if it was lost."""
    note_lost(logs, before)
    return {
        "job": this_job(), "node": socket.gethostname(), "gpus": held_gpus(), "started": time.time(),
        "steps_before": len(_steps(logs)), "done_before": _done(logs),
    }  # fmt: skip


def end(logs: Path, attempt: dict[str, Any], outcome: str, **details: Any) -> None:
    """Record how an attempt ended: complete, failed, requeued, ..."""
    _append(logs, attempt, outcome, ended=time.time(), **details)


def read_attempts(logs: Path) -> list[dict[str, Any]]:
    """Every attempt that has ended, oldest first; a line torn by a crash is left out."""
    return read_appended(logs / ATTEMPTS, started=Real, outcome=str, progressed=bool)


def read_progress(logs: Path) -> dict[str, Any]:
    """How far a task said that it is; empty where it did not, or what is there is no such record."""
    record = read_record(logs / PROGRESS, done=int, unit=str, time=Real)
    return record if isinstance(record.get("total"), int | None) else {}


def idle_attempts(logs: Path) -> int:
    """How many attempts in a row have ended early without getting further than the ones before."""
    count = 0
    for row in reversed(read_attempts(logs)):
        if row["outcome"] not in ("requeued", "lost") or row["progressed"]:
            break
        count += 1
    return count


def progressed(logs: Path, attempt: dict[str, Any]) -> bool:
    """Whether an attempt has got further than all before it: in optimizer steps, or else in what it reports."""
    steps, own = _own_steps(logs, attempt)
    # A resumed attempt repeats the steps after its checkpoint: those are no progress.
    best = max(steps[: len(steps) - len(own)], default=0)
    return max(own, default=0) > best or (not steps and _done(logs) > attempt["done_before"])


def _own_steps(logs: Path, attempt: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Every step ever taken, and those of this attempt."""
    steps = _steps(logs)
    # Fewer than counted at the start: other content begins anew, and its log was cleared after the count.
    return steps, steps[attempt["steps_before"] :] if len(steps) >= attempt["steps_before"] else steps


def _append(logs: Path, attempt: dict[str, Any], outcome: str, **details: Any) -> None:
    _, own = _own_steps(logs, attempt)
    row = {
        **attempt["job"], "node": attempt["node"], "gpus": attempt.get("gpus", 0), "started": attempt["started"],
        "outcome": outcome, **details,
        "first_step": own[0] if own else None, "last_step": own[-1] if own else None,
        "progressed": progressed(logs, attempt),
    }  # fmt: skip
    append_row(logs / ATTEMPTS, row)


def _steps(logs: Path) -> list[int]:
    return [row["step"] for row in read_appended(logs / EXECUTED, step=int)]


def _done(logs: Path) -> int:
    return int(read_progress(logs).get("done", 0))


def _last_sign(logs: Path, default: float) -> float:
    # A killed attempt says nothing of its end; the file it wrote last tells when it was still alive.
    path = logs / PROGRESS
    return max(default, path.stat().st_mtime) if path.is_file() else default
