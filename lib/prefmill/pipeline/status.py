"""`prefmill status`: one table over a run's tasks, from the files they left; no configuration is read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from prefmill.artifacts import MANIFEST, RUN_RECORD
from prefmill.errors import PipelineError
from prefmill.pipeline.worker import STATUS, is_running

_COLUMNS = ("TASK", "STATE", "PROGRESS", "TIME", "NOTE")


def show_status(workspace: Path, run: str) -> int:
    """Print a run's tasks; returns 0, or 1 when one has failed."""
    path = workspace / "logs" / run / "plan.json"
    if not path.is_file():
        raise PipelineError(
            "no such run", where=path.parent, expected=f"one of: {', '.join(_runs(workspace)) or '(none yet)'}",
            fix="start one with `prefmill run PIPELINE`, or name the workspace with --workspace",
        )  # fmt: skip
    plan = json.loads(path.read_text())
    rows = [(task["key"], *_row(Path(task["output"]), Path(task["logs"]))) for task in plan["tasks"]]
    widths = [max(len(row[column]) for row in [_COLUMNS, *rows]) for column in range(len(_COLUMNS))]
    print(f"run {plan['run']}")
    for row in [_COLUMNS, *rows]:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return int(any(row[1] in ("failed", "killed") for row in rows))


def _row(output: Path, logs: Path) -> tuple[str, str, str, str]:
    status, progress = _read(logs / STATUS), _read(logs / "progress.json")
    state = _state(output, logs, status)
    shown = "" if state in ("complete", "waiting") else _progress(progress)
    return state, shown, _duration(output, status, state), _note(status, state)


def _state(output: Path, logs: Path, status: dict[str, Any]) -> str:
    """A finished artifact is the truth; a status that says running without a live process is an interruption."""
    if is_running(logs):
        return "running"
    if (output / MANIFEST).is_file() and status.get("state") != "failed":
        return "complete"
    state: str = status.get("state", "waiting")
    return "interrupted" if state in ("running", "complete") else state


def _progress(progress: dict[str, Any]) -> str:
    if not progress:
        return ""
    total = f"/{progress['total']}" if progress["total"] else ""
    return f"{progress['done']}{total} {progress['unit']}"


def _duration(output: Path, status: dict[str, Any], state: str) -> str:
    if state == "complete":
        seconds = _read(output / RUN_RECORD).get("seconds")
    elif state == "running":
        seconds = time.time() - status["time"]
    else:
        seconds = None
    return "" if seconds is None else f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _note(status: dict[str, Any], state: str) -> str:
    if state == "failed":
        return str(status.get("error", "")).strip().splitlines()[0]
    if state in ("interrupted", "killed"):
        return f"{status.get('signal', 'its process ended early')}: run again to resume"
    return ""


def _runs(workspace: Path) -> list[str]:
    return sorted(path.parent.name for path in (workspace / "logs").glob("*/plan.json") if path.parent.name != "latest")


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return record
