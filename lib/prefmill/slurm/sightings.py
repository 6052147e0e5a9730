"""What is known of the elements of a run: which live, which have ended, and of which Slurm says nothing.

Absence is no evidence: a queue that is empty, cut short or shows nobody the jobs of others looks like a dead job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from prefmill.slurm import jobs as slurm
from prefmill.slurm.elements import Tried, left_end_record
from prefmill.slurm.jobs import Element, JobState

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
