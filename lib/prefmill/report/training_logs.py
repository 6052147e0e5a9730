"""What training left in its logs: loss and margin curves, and the cost of every task. None of it is an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefmill.core.artifact import Artifact
from prefmill.core.files import read_appended, read_record
from prefmill.core.places import RUN_RECORD
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
        margins |= {(row["step"], row["pair_id"]): (row["epoch"], row["margin"]) for row in read_appended(path)}
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
            name = f"{artifact.manifest.stage}:{artifact.manifest.task}"
            lines.append(f"{name:<32} {record['seconds']:>10.1f} s {record.get('peak_memory_gb', 0):>8.2f} GB")
    return lines


def bins(values: Sequence[float], num_bins: int = 24) -> list[tuple[float, float, int]]:
    """Counts of `values` in bins of equal width, as (low, high, count)."""
    counts, edges = np.histogram(values, num_bins)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))
