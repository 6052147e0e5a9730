"""What is known of the elements of a run: which live, which have ended, and of which Slurm says nothing.

Absence is no evidence: a queue that is empty, cut short or shows nobody the jobs of others looks like a dead job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from prefmill.core.errors import PipelineError
from prefmill.pipeline.task_status import is_finished
from prefmill.slurm import jobs as slurm
from prefmill.slurm.elements import Tried, left_end_record, newest
from prefmill.slurm.jobs import Element, JobState
from prefmill.slurm.submission import Submission, submissions

if TYPE_CHECKING:  # the plan brings the configurations, and `status` must answer at once
    from prefmill.pipeline.plan import Plan

OWN_RECORD, PURGED = "its own record", "Slurm no longer knows its job"
_DEFAULT_MIN_JOB_AGE = 300  # seconds that slurmctld remembers a job that has ended, unless it says otherwise


@dataclass(frozen=True)
class Sightings:
    """`queue` holds the elements that squeue or, where it lacks one, sacct shows; `unknown` says why nobody knows."""

    queue: Mapping[Element, JobState] = field(default_factory=dict)
    ended: Mapping[Element, str] = field(default_factory=dict)
    unknown: Mapping[Element, str] = field(default_factory=dict)

    def live(self, element: Element) -> bool:
        """Whether it is queued or running, by what Slurm shows."""
        job = self.queue.get(element)
        return job is not None and job.live


def sight(tried: Iterable[Tried], others: Iterable[str] = ()) -> Sightings | None:
    """Ask Slurm about these elements and the `others`' job ids; None where squeue gives no answer.

    One that squeue does not show has ended if sacct, its own end record or a purge of its job id says so.
    """
    wanted = [one for one in tried if one.sent]
    shown = slurm.queue([*(one.job.job_id for one in wanted), *others])
    if shown is None:
        return None
    strangers = dict(_strangers(wanted, shown))
    own = {element: job for element, job in shown.items() if element not in strangers}
    # squeue forgets a job some minutes after its end; the accounting keeps it.
    absent = [one for one in wanted if one.element not in shown]
    ids = sorted({one.job.job_id for one in absent})
    accounts = (slurm.accounting(ids) or {}) if ids else {}
    own |= {one.element: accounts[one.element] for one in absent if one.element in accounts}
    ended, unknown = _without_record([one for one in absent if one.element not in accounts])
    return Sightings(own, ended, {**unknown, **strangers})


def live_elements(found: Sequence[Submission]) -> list[Element] | None:
    """Everything of a run that is queued or running, its follow-up job too; None where Slurm does not answer."""
    ids = [job.job_id for one in found for job in one.jobs()]
    shown = slurm.queue(ids) if ids else {}
    # An id may be somebody else's job by now: Slurm counts anew when its state is lost.
    owners = {"", *(one.owner for one in found)}
    return None if shown is None else [key for key, job in shown.items() if job.live and job.user in owners]


def told(unknown: Mapping[Element, str], tried: Mapping[str, Tried]) -> list[str]:
    """A line for every task whose newest element nobody knows."""
    return [
        f"{key} ({one.name}): {unknown[one.element]}; nothing is done about it until more is known"
        for key, one in tried.items()
        if one.element in unknown
    ]


def _strangers(tried: Iterable[Tried], shown: Mapping[Element, JobState]) -> Iterator[tuple[Element, str]]:
    """Elements whose id now is a job of somebody else: Slurm counts anew when its state is lost."""
    for one in tried:
        job, owner = shown.get(one.element), one.submission.owner
        if job is not None and owner and job.user not in ("", owner):
            yield one.element, f"job {one.name} belongs to {job.user}, not to {owner}"


def _without_record(absent: Iterable[Tried]) -> tuple[dict[Element, str], dict[Element, str]]:
    """What neither squeue nor sacct shows: those that have ended by other evidence, and those nobody knows."""
    is_purged = cache(slurm.is_purged)
    purge_seconds = cache(lambda: slurm.setting("MinJobAge", _DEFAULT_MIN_JOB_AGE))
    ended: dict[Element, str] = {}
    unknown: dict[Element, str] = {}
    for one in absent:
        if left_end_record(one):
            ended[one.element] = OWN_RECORD
        # Slurm knows an array as long as one of its elements: a purged element has to be asked for itself.
        elif _old_enough(one, purge_seconds) and (is_purged(one.job.job_id) or is_purged(one.name)):
            ended[one.element] = PURGED
        else:
            unknown[one.element] = "neither squeue nor sacct shows its job"
    return ended, unknown


def _old_enough(one: Tried, purge_seconds: Callable[[], float]) -> bool:
    """A job younger than MinJobAge cannot have been purged: a controller that denies it has lost its state."""
    return time.time() - one.job.time > purge_seconds()


@dataclass(frozen=True)
class Queued:
    """A task's element in the queue; `whole` are all indices of its job, `broken` if it waits for what has failed."""

    element: Element
    whole: tuple[int, ...]
    pending: bool
    broken: bool


def queued_tasks(plan: Plan) -> dict[str, Queued]:
    """The queued or running element of every task that has one; asks Slurm once.

    Raises PipelineError when Slurm does not answer, or says nothing of a job: tasks could be submitted twice.
    """
    found = submissions(plan.workspace, plan.run)
    tried = newest(found)
    wanted = [tried[task.key] for task in plan.tasks if task.key in tried and not is_finished(task.output, task.logs)]
    # Jobs of finished tasks as well: a manifest is written before its job has ended.
    seen = sight(wanted, [one.job.job_id for one in tried.values()]) if tried else Sightings()
    if seen is None:
        raise PipelineError("Slurm does not list its queue", fix="try again when `squeue` answers")
    if lines := told(seen.unknown, tried):
        raise PipelineError(
            "Slurm says nothing of a job that may still run", got=lines[0],
            fix="try again in a few minutes; nothing was submitted",
        )  # fmt: skip
    return {key: _queued(one, seen.queue[one.element]) for key, one in tried.items() if seen.live(one.element)}


def _queued(tried: Tried, job: JobState) -> Queued:
    pending = job.state == "PENDING"
    return Queued(tried.element, tried.job.indices, pending, pending and slurm.waits_for(job)[1])
