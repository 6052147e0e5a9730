"""What training left in its logs: loss and margin curves, and the cost of every task. None of it is an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from prefmill.core.artifact import Artifact
from prefmill.core.files import read_appended, read_record
from prefmill.core.places import RUN_RECORD
from prefmill.pipeline.attempts import read_attempts
from prefmill.pipeline.decisions import Decisions
from prefmill.training.checkpoints import STEPS, read_curve

NATS = "nats"
MARGINS, MARGINS_LOGS = "margins", "margins_log*.jsonl"  # as prefmill.training.telemetry writes them, by rank


@dataclass(frozen=True)
class Curve:
    """A column of the trainer's log that is worth a chart."""

    name: str
    title: str
    unit: str
    explained: str


CURVES = (
    Curve("loss", "Training loss", "loss", "mean over the steps since the point before"),
    Curve("eval_loss", "Validation loss", "loss", "on the validation rows"),
    Curve("margin", "Margin", NATS, "how much more than its reference the model prefers the chosen side"),
    Curve("accuracy", "Pairs ranked right", "share", "training pairs in which it prefers the chosen side"),
)


@dataclass(frozen=True)
class Curves:
    """The curves of one training task by name, as (step, value); `missing` says why there are none."""

    stage: str
    task: str
    points: dict[str, list[tuple[float, float]]]
    missing: str | None


def read_curves(checkpoint: Artifact) -> Curves:
    """The curves that the training of `checkpoint` left beside it in logs/<run>/<stage>/<task>."""
    stage, task = checkpoint.manifest.stage, checkpoint.manifest.task
    folder = logs_of(checkpoint)
    rows = read_curve(folder / STEPS) if folder else []
    points = {
        name: [(float(row["step"]), float(row[name])) for row in rows if name in row]
        for name in (curve.name for curve in CURVES)
    }
    found = {name: curve for name, curve in points.items() if len(curve) > 1}
    missing = None if found else f"no curve of {stage}:{task}: its logs hold no {STEPS} with two steps or more"
    return Curves(stage, task, found, missing)


def read_margins(checkpoint: Artifact) -> list[float]:
    """The margin of every training pair in the last epoch, as the preference trainer logged it; a repeat counts once.

    Empty where the stage logs no margins.
    """
    folder = logs_of(checkpoint)
    margins: dict[tuple[int, str], tuple[int, float]] = {}
    for path in sorted((folder / MARGINS).glob(MARGINS_LOGS)) if folder else []:
        # A resumed training logs the steps after its checkpoint again; the later row counts.
        rows = read_appended(path, step=int, pair_id=str, epoch=int, margin=Real)
        margins |= {(row["step"], row["pair_id"]): (row["epoch"], row["margin"]) for row in rows}
    last = max((epoch for epoch, _ in margins.values()), default=0)
    return [margin for _, (epoch, margin) in sorted(margins.items()) if epoch == last]


def logs_of(artifact: Artifact) -> Path | None:
    """Where the task that made `artifact` logged, by the layout <workspace>/<root>/<run>/<stage>/<task>."""
    path = artifact.path.absolute()
    if len(path.parents) < 4:
        return None
    return path.parents[3] / "logs" / path.parents[1].name / path.parents[0].name / path.name


def cost_lines(artifacts: Iterable[Artifact]) -> list[str]:
    """What each artifact's task took, a line each, from its run record; those without one are left out."""
    lines = []
    for artifact in sorted(artifacts, key=lambda item: (item.manifest.stage, item.manifest.task)):
        if "seconds" in (record := read_record(artifact.path / RUN_RECORD)):
            name = artifact.manifest.key
            lines.append(f"{name:<32} {record['seconds']:>10.1f} s {record.get('peak_memory_gb', 0):>8.2f} GB")
    return lines


def bins(values: Sequence[float], num_bins: int = 24) -> list[tuple[float, float, int]]:
    """Counts of `values` in bins of equal width, as (low, high, count)."""
    counts, edges = np.histogram(values, num_bins)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))


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
        "name": artifact.manifest.key,
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
