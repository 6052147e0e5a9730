"""A run as it is now: its open tasks, which of them live, and when somebody has to look again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefmill.core.config import validate
from prefmill.core.errors import PipelineError
from prefmill.core.terminal import Say
from prefmill.pipeline.decisions import CANCEL, WAIT, Decisions
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask, make_plan
from prefmill.pipeline.state import inspect
from prefmill.pipeline.task_status import is_running
from prefmill.slurm.elements import Tried, newest, unsent
from prefmill.slurm.follow_up import LOOK_MINUTES, Wait
from prefmill.slurm.intents import settle
from prefmill.slurm.jobs import Element, JobState
from prefmill.slurm.sightings import Sightings, sight
from prefmill.slurm.submission import Submission, submissions

_SECONDS_BETWEEN_TRIES = (0, 5, 20)


@dataclass
class View:
    """A run as it is now: `open` tasks are those without the output that is wanted, `live` their queued elements.

    Of the elements in `unknown` nobody can say whether they live: what has them is left as it is.
    """

    plan: Plan
    submissions: list[Submission]
    tried: dict[str, Tried]
    queue: dict[Element, JobState]
    open: dict[str, PlannedTask]
    decisions: Decisions
    live: dict[str, Element] = field(default_factory=dict)
    unknown: Mapping[Element, str] = field(default_factory=dict)
    postponed: set[str] = field(default_factory=set)  # no room for them among the submitted jobs

    def needs(self, task: PlannedTask) -> frozenset[Element] | None:
        """The elements that are going to make what `task` reads; None where something is made by nobody."""
        makers = [self.live.get(other.key) for other in self.plan.upstream(task) if other.key in self.open]
        return None if None in makers else frozenset(maker for maker in makers if maker is not None)

    def undecided(self, key: str) -> bool:
        """Whether nobody can say if the task's newest element lives."""
        return key in self.tried and self.tried[key].element in self.unknown


def look(workspace: Path, run: str, say: Say = print) -> View:
    """The run as manifests and Slurm show it; asks Slurm once, and again of what was cut off in the middle."""
    found = submissions(workspace, run)
    if not found:
        raise PipelineError(f"run {run} has no submission", where=workspace, fix="submit it with `prefmill submit`")
    for line in settle(found):
        say(line)
    latest = found[-1]
    plan = make_plan(validate(PipelineFile, latest.pipeline, where=latest.folder), Path(latest.source))
    states = inspect(plan)
    # What was wanted and not sent comes last: it counts even where an earlier submission had a job for it.
    tried = newest(found) | unsent(found)
    open_tasks = {task.key: task for task in plan.tasks if states[task.key].freshness != "complete"}
    wanted = [one for key, one in tried.items() if key in open_tasks]
    others = [one.job.job_id for one in tried.values() if one.sent]
    answers = (_sight_after(seconds, wanted, others) for seconds in _SECONDS_BETWEEN_TRIES)
    seen = next((answer for answer in answers if answer is not None), None)
    if seen is None:
        raise PipelineError("Slurm does not answer", fix="try again when `squeue` does; nothing was touched")
    live = {key: tried[key].element for key in tried if key in open_tasks and seen.live(tried[key].element)}
    decisions = Decisions(workspace, run)
    # Cancelled before it started, an element is for some seconds in no answer of Slurm: nothing is open about it.
    over = {one.element for key, one in tried.items() if decisions.last(key, one.name).get("action") == CANCEL}
    unknown = {element: why for element, why in seen.unknown.items() if element not in over}
    return View(plan, found, tried, dict(seen.queue), open_tasks, decisions, live, unknown)


def _sight_after(seconds: float, wanted: Sequence[Tried], others: Sequence[str]) -> Sightings | None:
    time.sleep(seconds)  # a controller that restarts answers again soon
    return sight(wanted, others)


def next_look(view: View) -> Wait | None:
    """When to look again: when a job has ended, in some minutes where nothing tells of a change, None for never."""
    waiting = any(view.decisions.last(key).get("action") == WAIT for key in view.open)
    # No job's end tells of a task that a `prefmill run` is at.
    waiting |= any(is_running(task.logs) for key, task in view.open.items() if key not in view.live)
    live = tuple(dict.fromkeys(view.live[key][0] for key in view.open if key in view.live))  # upstream first
    if waiting or (view.postponed and not live):
        return Wait(minutes=LOOK_MINUTES)
    if not going_on(view) and not view.postponed:
        return None
    return Wait(live) if live and not view.unknown else Wait(minutes=LOOK_MINUTES)


def going_on(view: View) -> set[str]:
    """The open tasks that run, or wait for nothing but tasks that do; others wait for an input that nothing makes."""
    going: set[str] = set()
    for key, task in view.open.items():  # upstream first
        needed = {other.key for other in view.plan.upstream(task) if other.key in view.open}
        if (key in view.live and needed <= going) or view.undecided(key):
            going.add(key)
    return going
