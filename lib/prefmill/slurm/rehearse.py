"""`prefmill rehearse`: the pipeline made small, on the user's own cluster, with a fire drill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefmill.core.places import CHECKPOINT_PREFIX, PROGRESS
from prefmill.core.terminal import Say
from prefmill.pipeline.attempts import read_attempts, read_progress
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.pipeline.task_status import read_status
from prefmill.pipeline.worker import set_aside
from prefmill.slurm import jobs as slurm
from prefmill.slurm.advance import advance
from prefmill.slurm.cluster import ClusterFile
from prefmill.slurm.estimate import estimate
from prefmill.slurm.rehearsal_plan import SAVE_STEPS, rehearsal_of
from prefmill.slurm.status import read_rows, render
from prefmill.slurm.submit import submit
from prefmill.slurm.view import View, going_on, look
from prefmill.store.artifacts import read_manifest
from prefmill.training.checkpoints import COMPLETE

_POLL_SECONDS, _TABLE_SECONDS, _ADVANCE_SECONDS = 0.5, 15.0, 20.0
_PATIENCE_SECONDS = 4 * 3600.0
_RECORD_SECONDS = 15.0  # within which a worker on a busy node has recorded its end


@dataclass
class Drill:
    """A fault to be injected into a training once it has saved; `done` when it was, `outcome` as it is recorded."""

    name: str
    strike: Callable[[PlannedTask, View], bool]
    outcomes: tuple[str, ...]
    task: PlannedTask | None = None
    attempts_before: int = 0
    problems: list[str] = field(default_factory=list)


def rehearse(pipeline: PipelineFile, plan: Plan, source: Path, cluster: ClusterFile, say: Say = print) -> int:
    """Run the whole pipeline small, interrupt it, check that it resumes; returns 0 where all is well, else 1."""
    small, small_plan = rehearsal_of(pipeline, plan, source, cluster)
    estimate(small, small_plan, cluster, None, say, tiny=True)
    for task in small_plan.tasks:  # what an earlier rehearsal has finished cannot be interrupted
        if task.stage.trains and read_manifest(task.output) is not None:
            set_aside(task.output)
            (task.logs / PROGRESS).unlink(missing_ok=True)  # or the new one seems to get nowhere
    submit(small, small_plan, source, cluster, say=say)
    drills = [
        Drill("warning before a time limit", _warn, ("requeued",)),
        Drill("kill -9 of a training process", _kill, ("failed", "lost")),
    ]
    ended = _follow(small_plan, drills, say)
    say(_table(small_plan))
    verdicts = [("every task complete", [] if ended else ["see the table above, and `prefmill why`"])]
    if any(task.stage.trains for task in small_plan.tasks):
        verdicts += [(drill.name, list(_judge(drill))) for drill in drills]
    for name, problems in verdicts:
        say(f"{'ok  ' if not problems else 'FAIL'} {name}{''.join(f': {text}' for text in problems)}")
    return int(any(problems for _, problems in verdicts))


def _table(plan: Plan) -> str:
    seen = read_rows(plan.workspace, plan.run)
    return render(plan.run, seen.rows, seen.notes)


def _follow(plan: Plan, drills: list[Drill], say: Say) -> bool:
    """Look until the run ends, injecting the drills on the way; returns whether all is complete."""
    begun = shown = advanced = time.monotonic()
    while time.monotonic() - begun < _PATIENCE_SECONDS:
        view = look(plan.workspace, plan.run)
        if not view.open:
            return True
        _strike(view, drills, say)
        if time.monotonic() - advanced > _ADVANCE_SECONDS or not view.live:
            # The job that looks after the run comes back after two minutes at the earliest: too late for a drill.
            view = advance(plan.workspace, plan.run, say=lambda line: None if line.startswith("run ") else say(line))
            advanced = time.monotonic()
            if not going_on(view):
                return not view.open
        if time.monotonic() - shown > _TABLE_SECONDS:
            say(_table(plan))
            shown = time.monotonic()
        time.sleep(_POLL_SECONDS)
    return False


def _strike(view: View, drills: list[Drill], say: Say) -> None:
    """Inject the next drill into a training that runs and has saved; one at a time, each into another if there is."""
    waiting = [drill for drill in drills if drill.task is None]
    struck = {drill.task.stage.name for drill in drills if drill.task is not None}
    to_come = {task.stage.name for task in view.open.values() if task.stage.trains} - struck
    for key in sorted(view.live):
        task = view.open[key]
        job = view.queue[view.live[key]]
        status = read_status(task.logs)
        if not waiting or not task.stage.trains or job.state != "RUNNING" or status.get("state") != "running":
            continue
        if task.stage.name in struck and len(to_come) >= len(waiting):  # SFT has had its fault: the next is for DPO
            continue
        if (
            _recovering(task, drills)
            or read_progress(task.logs).get("done", 0) <= status["attempt"]["done_before"]
            or not any(task.output.glob(f"{CHECKPOINT_PREFIX}*/{COMPLETE}"))
        ):
            continue
        drill = waiting.pop(0)
        drill.attempts_before = len(read_attempts(task.logs))
        if drill.strike(task, view):
            drill.task = task
            say(f"fire drill: {drill.name} ({key})")
        else:
            drill.task, drill.problems = task, ["Slurm refused it"]


def _recovering(task: PlannedTask, drills: list[Drill]) -> bool:
    """Whether an earlier drill's end is not recorded yet."""
    return any(
        drill.task is not None and drill.task.key == task.key and len(read_attempts(task.logs)) <= drill.attempts_before
        for drill in drills
    )


def _warn(task: PlannedTask, view: View) -> bool:
    """The signal that Slurm sends before the time is over."""
    name = slurm.element_name(view.live[task.key])
    # --batch: to the batch script's process alone, as B:USR1 in the script has Slurm do it.
    return slurm.ask(["scancel", "--batch", "--signal=USR1", name]) is not None


def _kill(task: PlannedTask, view: View) -> bool:
    """SIGKILL to the processes that the worker has started, on its own node."""
    status, job = read_status(task.logs), view.queue[view.live[task.key]]
    # --overlap: a training on several nodes has a step of its own, whose end a second one would wait for.
    step = ["srun", f"--jobid={job.raw_id}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={status['host']}"]
    return slurm.ask([*step, "--chdir=/", "pkill", "-KILL", "-P", str(status["pid"])]) is not None


def _judge(drill: Drill) -> Iterator[str]:
    """What went wrong in a drill: the attempt it ended, and the one after it that must go on where that had saved."""
    yield from drill.problems
    if drill.task is None:
        yield "no training ran long enough to be interrupted after it had saved"
        return
    if drill.problems:
        return
    rows = _attempts_since(drill.attempts_before, drill.task)
    if not rows or rows[0]["outcome"] not in drill.outcomes:
        yield f"recorded as {rows[0]['outcome'] if rows else 'nothing'} instead of {' or '.join(drill.outcomes)}"
    elif len(rows) < 2 or rows[1]["first_step"] is None:
        yield "it was not resumed"
    # No more than the steps between two saves may be lost, or it has gone on from too old a checkpoint.
    elif rows[1]["first_step"] == 1 or (rows[0]["last_step"] or 0) - rows[1]["first_step"] >= SAVE_STEPS:
        yield f"it had got to step {rows[0]['last_step']} and went on from step {rows[1]['first_step']}"


def _attempts_since(before: int, task: PlannedTask) -> list[dict[str, Any]]:
    """The task's later attempts. A worker records its last a moment after the output is complete, so look again."""
    deadline = time.monotonic() + _RECORD_SECONDS
    while True:
        rows = read_attempts(task.logs)[before:]
        if (rows and rows[-1]["outcome"] == "complete") or time.monotonic() > deadline:
            return rows
        time.sleep(_POLL_SECONDS)
