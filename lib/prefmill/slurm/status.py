"""`prefmill status`: one table over a run's tasks, from the files they left and one look at the queue.

No configuration is read, and Slurm is asked only where something of the run was submitted and is not complete.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from prefmill.core.figures import columns, duration
from prefmill.core.places import STATUS
from prefmill.core.terminal import paint_states
from prefmill.pipeline.attempts import read_attempts, read_progress
from prefmill.pipeline.decisions import CANCEL, STOP, WAIT, Decisions
from prefmill.pipeline.run_record import run_tasks
from prefmill.pipeline.task_status import (
    INTERRUPTED,
    in_short,
    is_at_work,
    is_finished,
    is_running,
    manifest_fault,
    read_status,
)
from prefmill.slurm import jobs as slurm
from prefmill.slurm.elements import Tried, newest, read_tail, unsent
from prefmill.slurm.failures import last_words
from prefmill.slurm.jobs import JobState, held, why_queued
from prefmill.slurm.sightings import Sightings, sight
from prefmill.slurm.submission import script_of, submissions

_COLUMNS = ("TASK", "STATE", "PROGRESS", "NODE", "TIME", "GPU-H", "RESTARTS", "REASON")
_ROWS_OF_A_STAGE = 12  # a stage with more tasks is summed up in a row, and only what needs a look is listed
_BROKEN = ("failed", "killed", "stopped", "cancelled", "blocked", "interrupted", "ended", "damaged")
_GOING = ("running", "suspended", "queued", "unknown")
_CLEAR = "\x1b[H\x1b[2J"


@dataclass(frozen=True)
class Row:
    """A task as `status` shows it; times in seconds over all attempts."""

    key: str
    state: str
    reason: str = ""
    progress: str = ""
    node: str = ""
    seconds: float = 0.0
    gpus: int = 0
    restarts: int = 0

    @property
    def gpu_hours(self) -> float:
        """What it has cost so far."""
        return self.gpus * self.seconds / 3600


@dataclass(frozen=True)
class Table:
    """A run's rows, notes on the whole, and whether anything is going to act on what is open."""

    rows: list[Row]
    notes: list[str]
    goes_on: bool


def show_status(workspace: Path, run: str) -> int:
    """Print a run's tasks; returns 0, or 1 when one has failed."""
    seen = read_rows(workspace, run)
    print(render(run, seen.rows, seen.notes))
    return _exit_code(seen.rows)


def status_json(workspace: Path, run: str) -> int:
    """Print a run's tasks as JSON; returns as `show_status` does."""
    seen = read_rows(workspace, run)
    rows = [{**asdict(row), "gpu_hours": row.gpu_hours} for row in seen.rows]
    print(json.dumps({"run": run, "tasks": rows, "notes": seen.notes, "goes_on": seen.goes_on}, indent=1))
    return _exit_code(seen.rows)


def _exit_code(rows: Iterable[Row]) -> int:
    return int(any(row.state in ("failed", "killed", "stopped", "damaged") for row in rows))


def watch_status(workspace: Path, run: str, seconds: float) -> int:
    """Print the table until nobody is going to act on an open task; 0 only when all is complete."""
    while True:
        seen = read_rows(workspace, run)
        text = render(run, seen.rows, seen.notes)
        print((_CLEAR if sys.stdout.isatty() else "") + text, flush=True)
        if not seen.goes_on:
            return int(any(row.state != "complete" for row in seen.rows))
        time.sleep(seconds)


def read_rows(workspace: Path, run: str) -> Table:
    """Every task of a run, in the plan's order; asks Slurm once, and again of what squeue does not show."""
    tasks = run_tasks(workspace, run)
    found = submissions(workspace, run)
    tried = newest(found) | unsent(found)
    open_tasks = [task["key"] for task in tasks if not is_finished(Path(task["output"]), Path(task["logs"]))]
    wanted = [tried[key] for key in open_tasks if key in tried]
    healers = [job_id for one in found for job_id in one.advance_ids()]
    seen = sight(wanted, healers) if wanted else Sightings()
    notes = ["Slurm does not answer: states are those the tasks left themselves"] if seen is None else []
    decisions = Decisions(workspace, run)
    rows: dict[str, Row] = {}
    for task in tasks:
        key, output, logs = task["key"], Path(task["output"]), Path(task["logs"])
        one = tried.get(key)
        row = _row(key, output, logs, one, seen, decisions.last(key, one.name) if one else {})
        # The plan lists what is upstream first, so what a task needs has its row already.
        rows[key] = _blocked(row, [rows[other] for other in task.get("needs", ()) if other in rows])
    jobs = {job_id: seen.queue[job_id, -1] for job_id in healers if (job_id, -1) in seen.queue} if seen else {}
    healer_waits = [held(job, job_id) for job_id, job in jobs.items() if job.live and not job.held_after_launch]
    healing = "" in healer_waits
    wants_healer = seen is not None and bool(found) and script_of(found[-1]).is_file()
    notes += _notes(run, list(rows.values()), healing, wants_healer, healer_waits)
    # Without an answer from Slurm nobody can say that all is over: --watch goes on.
    somebody = seen is None or healing or is_at_work(workspace, run)
    return Table(list(rows.values()), notes, _goes_on(list(rows.values()), somebody))


def _notes(
    run: str, rows: Sequence[Row], healing: bool, wants_healer: bool, healer_waits: Sequence[str]
) -> Iterator[str]:
    """Where somebody has to act on the whole run, and who does."""
    states = {row.state for row in rows}
    who = "a job that does is queued" if healing else f"`prefmill advance {run}` does"
    if "ended" in states:
        yield f"some tasks have ended that nobody has judged yet: {who}"
    if "unsent" in states:
        yield f"{sum(row.state == 'unsent' for row in rows)} tasks are not submitted yet: {who}"
    if wants_healer and not healing and states & {*_GOING, "ended", "unsent"}:
        yield (
            f"the job that looks after this run does not start: {healer_waits[0]}"
            if healer_waits
            else f"no job looks after this run: the next task to start books one, and so does `prefmill advance {run}`"
        )


def _goes_on(rows: Sequence[Row], somebody: bool) -> bool:
    """Whether an open task is going to be acted on: by its own job, or by `somebody` who looks after the run."""
    open_rows = [row for row in rows if row.state != "complete"]
    return bool(open_rows) and (somebody or any(row.state in _GOING for row in open_rows))


def render(run: str, rows: Sequence[Row], notes: Iterable[str] = ()) -> str:
    """The table, what it cost, and the notes."""
    stages = groupby(rows, key=lambda row: row.key.partition(":")[0])
    # Painted last: codes of colours would count in a column's width.
    table = columns([_COLUMNS, *(line for _, stage in stages for line in _lines(list(stage)))])
    counts = Counter(row.state for row in rows)
    summary = f"{len(rows)} tasks: " + ", ".join(f"{count} {state}" for state, count in counts.most_common())
    busy = sum(row.gpus for row in rows if row.state == "running")
    cost = f"cost so far: {sum(row.gpu_hours for row in rows):.1f} GPU-hours" + (f", {busy} GPUs at work" * bool(busy))
    return "\n".join([f"run {run}", *(paint_states(f"  {line}") for line in table), summary, cost, *notes])


def explain(workspace: Path, run: str, key: str, logs: Path) -> list[str]:
    """Why a task that is not complete has ended, and what to do; empty where nothing is known."""
    one = newest(submissions(workspace, run)).get(key)
    row = Decisions(workspace, run).last(key, one.name) if one else {}
    lines = []
    if row.get("action") in (STOP, CANCEL, WAIT):
        lines.append(f"{_WORDS[row['action']]} ({row['kind']}, by {row.get('source', 'hand')}): {row['why']}")
        lines += [f"because {row['reason']}"] if row.get("reason") else []
        lines += [f"to do: {row['todo']}"] if row.get("todo") else []
    status = read_status(logs)
    if status.get("state") == "failed":
        lines += [f"its last error: {line}" for line in str(status.get("error", "")).strip().splitlines()[:1]]
        lines += [line for line in str(status.get("error", "")).strip().splitlines() if line.startswith("  fix:")]
    if lines:
        lines.append(f"log: {logs.parent / logs.name}.log")
    return lines


def _row(
    key: str, output: Path, logs: Path, tried: Tried | None, seen: Sightings | None, decided: Mapping[str, Any]
) -> Row:
    status, past = read_status(logs), read_attempts(logs)
    state, reason, job = _state(output, logs, status, tried, seen, decided)
    begun = status.get("attempt", {}).get("started") if state == "running" else None
    # A node's clock may be set back during an attempt, whose time is then not known.
    seconds = sum(max(0.0, row.get("ended", row["started"]) - row["started"]) for row in past)
    resources = tried.array.resources if tried else {}
    return Row(
        key=key, state=state, reason=reason, progress=_progress(logs, state, status) if state != "complete" else "",
        node=(job.node if job else "") or str(status.get("host", "")) * bool(past or begun),
        seconds=seconds + (max(0.0, time.time() - begun) if begun else 0.0),
        gpus=resources.get("nodes", 1) * resources.get("gpus", 0), restarts=max(0, len(past) + bool(begun) - 1),
    )  # fmt: skip


def _state(
    output: Path,
    logs: Path,
    status: Mapping[str, Any],
    tried: Tried | None,
    seen: Sightings | None,
    decided: Mapping[str, Any],
) -> tuple[str, str, JobState | None]:
    """A finished artifact is the truth, then the queue; a status that says running without a process is none."""
    job = seen.queue.get(tried.element) if tried and seen else None
    if job is not None and job.live:
        return (*_live_state(job, tried.name if tried else ""), job)
    if is_finished(output, logs):
        return "complete", "", job
    if is_running(logs):
        return "running", "", job
    if _is_starting(logs, status):
        return "running", "its process is starting", job
    if decided.get("action") in _WORDS:
        todo = f"; to do: {decided['todo']}" if decided.get("todo") else ""
        return _WORDS[decided["action"]], f"{decided['kind']}: {decided['why']} ({decided['reason']}){todo}", job
    if tried and not tried.sent:
        return "unsent", "not submitted yet", job
    if tried and seen and tried.element in seen.unknown:
        return "unknown", seen.unknown[tried.element], job
    if fault := manifest_fault(output) or ("" if tried else _status_fault(logs, status)):
        return "damaged", fault, job
    return (*_left_state(status, tried, seen, job), job)


def _status_fault(logs: Path, status: Mapping[str, Any]) -> str:
    unread = (logs / STATUS).is_file() and not status
    return f"its status cannot be read: {logs / STATUS}; to do: `prefmill run` writes it anew" * unread


def _is_starting(logs: Path, status: Mapping[str, Any]) -> bool:
    """Whether a `prefmill run` here has begun the task, whose process has not yet come to take its lock."""
    return (
        is_at_work(logs.parents[3], logs.parents[1].name)
        and status.get("state") == "running"
        and "attempt" not in status
    )


def _live_state(job: JobState, name: str) -> tuple[str, str]:
    if job.state == "SUSPENDED":
        return "suspended", f"Slurm lets its node do other work; where somebody asked for it: `scontrol resume {name}`"
    if job.state != "PENDING":
        return "running", ""
    reason = "what it reads has failed" if slurm.waits_for(job)[1] else held(job, name)
    return ("held", reason) if reason else ("queued", why_queued(job))


def _left_state(
    status: Mapping[str, Any], tried: Tried | None, seen: Sightings | None, job: JobState | None
) -> tuple[str, str]:
    """What an attempt that has ended left, where nobody has judged it."""
    state = str(status.get("state", "waiting"))
    error = in_short(str(status.get("error", ""))).strip().splitlines()[:1]
    if tried and seen and not (state == "failed" and error):
        # A job that began no task has no log but Slurm's.
        said = last_words(read_tail(tried.slurm_log)) if state == "waiting" else ""
        ended = f"Slurm: {job.state}" if job else seen.ended.get(tried.element, "its job is gone")
        return "ended", ended + f": {said}" * bool(said)
    if state == INTERRUPTED:
        return state, f"{status.get('error', 'asked to stop')}: run again to resume"
    if state in ("running", "complete", "killed"):
        return "interrupted", f"{status.get('signal', 'its process ended early')}: run again to resume"
    return state, error[0] if state == "failed" and error else ""


def _blocked(row: Row, upstream: Sequence[Row]) -> Row:
    """A task that nobody has begun, behind one that nothing runs again by itself."""
    broken = [other for other in upstream if other.state in _BROKEN]
    if not broken or row.state not in ("waiting", "queued", "held", "ended"):
        return row
    cause = broken[0].reason if broken[0].state == "blocked" else f"{broken[0].key} has {broken[0].state}"
    cause = cause.replace("has ended", "has failed").replace("has blocked", "is blocked").replace("has dam", "is dam")
    return Row(row.key, "blocked", cause, seconds=row.seconds, gpus=row.gpus, restarts=row.restarts)


def _progress(logs: Path, state: str, status: Mapping[str, Any]) -> str:
    is_going = status.get("state") == "running"
    if is_going and "attempt" not in status:
        return ""  # its process is starting: the numbers there are an earlier attempt's
    if not (progress := read_progress(logs)):
        return ""
    shown = f"{progress['done']}{'/' + str(progress['total']) if progress['total'] else ''} {progress['unit']}"
    left = _seconds_left(progress, status["attempt"]) if is_going and state == "running" else None
    return shown if left is None else f"{shown}, {duration(left)} left"


def _seconds_left(progress: Mapping[str, Any], attempt: Mapping[str, Any]) -> float | None:
    """By the pace of this attempt."""
    # A resumed attempt counts from its checkpoint on: what came before was not done in its time.
    done = progress["done"] - attempt.get("done_before", 0)
    if not progress["total"] or done <= 0 or progress["time"] <= attempt["started"]:
        return None
    left: float = (progress["time"] - attempt["started"]) / done * (progress["total"] - progress["done"])
    return left


def _lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    if len(rows) <= _ROWS_OF_A_STAGE:
        return [_cells(row) for row in rows]
    counts = Counter(row.state for row in rows)
    seconds = sum(row.seconds for row in rows)
    summed = Row(
        f"{rows[0].key.partition(':')[0]} ({len(rows)})", "", ", ".join(f"{n} {s}" for s, n in counts.most_common()),
        seconds=seconds, restarts=sum(row.restarts for row in rows),
    )  # fmt: skip
    cells = _cells(summed)
    hours = sum(row.gpu_hours for row in rows)
    shown = [row for row in rows if row.state in _BROKEN and row.state != "blocked"][:_ROWS_OF_A_STAGE]
    return [(*cells[:5], f"{hours:.1f}" if hours else "", *cells[6:]), *(_cells(row) for row in shown)]


def _cells(row: Row) -> tuple[str, ...]:
    time_shown = duration(row.seconds) if row.seconds else ""
    hours = f"{row.gpu_hours:.1f}" if row.gpus else ""
    return (row.key, row.state, row.progress, row.node, time_shown, hours, str(row.restarts or ""), row.reason)


_WORDS = {STOP: "stopped", CANCEL: "cancelled", WAIT: "waiting"}
