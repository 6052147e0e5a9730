"""Which tasks of a plan have an element in Slurm's queue already."""

from __future__ import annotations

from dataclasses import dataclass

from prefmill.core.errors import PipelineError
from prefmill.core.places import MANIFEST, WANTED_AGAIN
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.slurm import jobs as slurm
from prefmill.slurm.elements import Tried, newest
from prefmill.slurm.jobs import JobState
from prefmill.slurm.sightings import Sightings, sight, told
from prefmill.slurm.submission import submissions
from prefmill.slurm.task_batches import Element


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
    wanted = [tried[task.key] for task in plan.tasks if task.key in tried and _is_open(task)]
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


def _is_open(task: PlannedTask) -> bool:
    return not (task.output / MANIFEST).is_file() or (task.logs / WANTED_AGAIN).exists()


def _queued(tried: Tried, job: JobState) -> Queued:
    pending = job.state == "PENDING"
    return Queued(tried.element, tried.job.indices, pending, pending and slurm.waits_for(job)[1])
