"""What a run has cost, and what failed on the way: from the attempts every task logs, and the decisions on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact
from prefmill.core.files import read_record
from prefmill.core.places import RUN_RECORD
from prefmill.pipeline.attempts import read_attempts
from prefmill.pipeline.decisions import Decisions
from prefmill.report.training_logs import logs_of

Row = dict[str, Any]


def cost_section(artifacts: Sequence[Artifact]) -> Row:
    """What the page says of the cost of everything behind it.

    Without `attempts.jsonl` in its logs (a task whose output was copied here) a task counts by its run record, and one
    without either is counted as unknown.
    """
    ordered = sorted(artifacts, key=lambda item: (item.manifest.stage, item.manifest.task))
    found = [_task_cost(item) for item in ordered]
    tasks = [task for task in found if task is not None]
    return {
        "tasks": tasks,
        "hours": sum(task["hours"] for task in tasks),
        "gpu_hours": sum(task["gpu_hours"] for task in tasks),
        "num_unknown": len(found) - len(tasks),
        "early": [(task["name"], _explain(row)) for task in tasks for row in task["early"]],
        "decisions": _decisions(ordered),
    }


def clock(hours: float) -> str:
    """Hours as h:mm:ss."""
    seconds = round(hours * 3600)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _task_cost(artifact: Artifact) -> Row | None:
    """Over all attempts: hours of the clock, and times the GPUs that were held; what ended early, oldest first."""
    logs, record = logs_of(artifact), read_record(artifact.path / RUN_RECORD)
    attempts = read_attempts(logs) if logs else []
    if not attempts and "seconds" not in record:
        return None
    spans = [(row["ended"] - row["started"]) / 3600 for row in attempts] or [record["seconds"] / 3600]
    # Attempts of earlier versions have noted no GPUs.
    gpus = [row.get("gpus", 0) for row in attempts] or [0]
    return {
        "name": f"{artifact.manifest.stage}:{artifact.manifest.task}",
        "attempts": len(spans),
        "hours": sum(spans),
        # By what the job held, used or not: that is what a cluster bills.
        "gpu_hours": sum(hours * count for hours, count in zip(spans, gpus, strict=True)),
        "memory_gb": record.get("peak_memory_gb"),
        "early": [row for row in attempts if row["outcome"] != "complete"],
    }


def _explain(row: Mapping[str, Any]) -> str:
    """How an attempt ended, in words."""
    cause = row.get("signal") or row.get("kind")
    done = f" after step {row['last_step']}" if row.get("last_step") is not None else ""
    took = clock((row["ended"] - row["started"]) / 3600)
    return f"{row['outcome']}{f' ({cause})' if cause else ''}{done}, {took} on {row['node']}"


def _decisions(artifacts: Sequence[Artifact]) -> list[Row]:
    """What was decided on failed tasks, in every run that something here is of."""
    # A dictionary, as a set's order differs between processes, and with it the page.
    runs: dict[tuple[Path, str], None] = {}
    for artifact in artifacts:
        logs = logs_of(artifact)
        if logs is not None:
            runs[logs.parents[3], logs.parents[1].name] = None
    names = ("task", "element", "action", "kind", "reason", "why")
    rows = [row for workspace, run in runs for row in Decisions(workspace, run).all()]
    return [{name: row.get(name, "") for name in names} for row in rows]
