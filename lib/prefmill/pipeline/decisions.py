"""What was decided about the failed tasks of a run: one growing file beside its submissions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from prefmill.core.errors import PipelineError
from prefmill.core.files import append_row, read_appended
from prefmill.pipeline.task_status import held

DECISIONS = "decisions.jsonl"
AGAIN, CANCEL, STOP, RETRY, WAIT, RELEASE = "again", "cancel", "stop", "retry", "wait", "release"
EXCLUSION_SECONDS = 24 * 3600.0  # a node that failed gets work again after that
_LOCK_SECONDS = 300.0


class Decisions:
    """The decisions on a run's tasks; those before somebody asked for a task again no longer count for it."""

    def __init__(self, workspace: Path, run: str) -> None:
        self.path = submissions_folder(workspace, run) / DECISIONS
        self._rows = read_appended(self.path, time=Real, task=str, element=str, action=str)

    def all(self) -> list[dict[str, Any]]:
        """Every decision ever taken on the run, oldest first."""
        return list(self._rows)

    def of(self, task: str, submission: int | None = None) -> list[dict[str, Any]]:
        """The decisions on a task that still count, oldest first; of one submission where its number is given."""
        rows = [row for row in self._rows if row["task"] == task and submission in (None, row.get("submission"))]
        starts = [place for place, row in enumerate(rows) if row["action"] == AGAIN]
        return rows[starts[-1] + 1 :] if starts else rows

    def last(self, task: str, element: str | None = None) -> dict[str, Any]:
        """The last decision on a task, and on this very element of it; empty where there is none."""
        rows = [row for row in self.of(task) if element is None or row["element"] == element]
        return rows[-1] if rows else {}

    def stopped(self) -> dict[str, dict[str, Any]]:
        """The tasks that nothing is going to run again by itself."""
        tasks = dict.fromkeys(row["task"] for row in self._rows)
        return {task: row for task in tasks if (row := self.last(task)).get("action") in (STOP, CANCEL)}

    def excluded_nodes(self, now: float) -> list[str]:
        """Nodes that failed not long ago, the latest first."""
        rows = [row for row in reversed(self._rows) if row.get("exclude") and now - row["time"] < EXCLUSION_SECONDS]
        return list(dict.fromkeys(row["exclude"] for row in rows))

    def record(self, task: str, element: str, action: str, **details: Any) -> None:
        """Note a decision; on disk before this returns."""
        row = {"time": time.time(), "task": task, "element": element, "action": action, **details}
        # On disk first: what is done about a decision that a kill then loses would be done again.
        append_row(self.path, row)
        self._rows.append(row)


def show(task: str, row: Mapping[str, Any]) -> str:
    """A decision in a line."""
    todo = f"; to do: {row['todo']}" if row.get("todo") and row["action"] != RETRY else ""
    return f"{task} {row['action']}: {row.get('kind', 'asked')} ({row.get('reason', '')}): {row.get('why', '')}{todo}"


@contextmanager
def alone(workspace: Path, run: str) -> Iterator[None]:
    """Hold the lock that `submit` takes too; raises PipelineError when another holds it for minutes."""
    folder = submissions_folder(workspace, run)
    if not folder.is_dir():
        raise PipelineError(
            f"run {run} was not submitted to Slurm from here", where=folder,
            fix="`prefmill submit PIPELINE --cluster FILE` does that; a local run is continued by "
            "`prefmill run PIPELINE`, and a stage of it made anew by `prefmill run PIPELINE --only STAGE --force`",
        )  # fmt: skip
    refusal = PipelineError(
        "another prefmill is at work on this run", where=folder / "lock",
        fix="wait until it has ended, and give the command again",
    )  # fmt: skip
    with held(folder / "lock", _LOCK_SECONDS, refusal):
        yield


def submissions_folder(workspace: Path, run: str) -> Path:
    """Where a run's submissions are."""
    return workspace / "logs" / run / "submissions"
