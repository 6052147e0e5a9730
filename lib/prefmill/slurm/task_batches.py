"""Which elements each sbatch call runs and what it waits for: pure functions from a plan and what is live."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.slurm.jobs import Element


@dataclass(frozen=True)
class TaskBatch:
    """One sbatch call: `indices` of chunk `chunk` of `stage`; `needs` are the elements each index waits for."""

    stage: str
    chunk: int
    indices: tuple[int, ...]
    needs: Mapping[int, frozenset[Element]]

    @property
    def name(self) -> str:
        """Stands for the job's id until there is one."""
        return f"<{self.stage}.{self.chunk}{'' if any(self.needs.values()) else ' ready'}>"


def chunks_of(tasks: Sequence[PlannedTask], size: int) -> dict[str, tuple[int, int]]:
    """The chunk and array index of every task of one stage: places in the plan, whatever is already complete.

    So the same element has the same index in every submission and in every stage with the same array.
    """
    return {task.key: divmod(place, size) for place, task in enumerate(tasks)}


def make_batches(plan: Plan, todo: Sequence[PlannedTask], live: Mapping[str, Element], size: int) -> list[TaskBatch]:
    """The sbatch calls that run `todo`, upstream first; `live` are queued or running elements by task.

    A chunk is one call, or two where some of its elements have nothing to wait for and others do.
    """
    batches: list[TaskBatch] = []
    elements = dict(live)
    for stage in dict.fromkeys(task.stage.name for task in todo):
        places = chunks_of([task for task in plan.tasks if task.stage.name == stage], size)
        chunks: dict[int, dict[int, frozenset[Element]]] = {}
        of_stage = [task for task in todo if task.stage.name == stage]
        for task in of_stage:
            chunk, index = places[task.key]
            needs = frozenset(elements[other.key] for other in plan.upstream(task) if other.key in elements)
            chunks.setdefault(chunk, {})[index] = needs
        made = [batch for chunk, needs in sorted(chunks.items()) for batch in _split(stage, chunk, needs)]
        names = {(batch.chunk, index): batch.name for batch in made for index in batch.indices}
        # No job has an id before sbatch is called: later stages name the batch, and `dependency` puts the id in.
        elements |= {task.key: (names[places[task.key]], places[task.key][1]) for task in of_stage}
        batches += made
    return batches


def dependency(batch: TaskBatch, whole: Mapping[str, tuple[int, ...]], ids: Mapping[str, str]) -> str:
    """The --dependency of a batch on every job it needs, "" where there is none.

    `whole` gives the indices of each job and `ids` the job ids of submitted batches. Elementwise (aftercorr) only
    where both have the same indices and each needs its own; else the whole array, or its elements one by one.
    """
    jobs = sorted({job for needs in batch.needs.values() for job, _ in needs})
    return ",".join(_on_job(batch, job, whole[job], ids.get(job, job)) for job in jobs)


def _split(stage: str, chunk: int, needs: Mapping[int, frozenset[Element]]) -> Iterator[TaskBatch]:
    # A dependency holds a whole array back: those with nothing to wait for get an array of their own.
    for waits in (False, True):
        indices = tuple(sorted(index for index, elements in needs.items() if bool(elements) is waits))
        if indices:
            yield TaskBatch(stage, chunk, indices, {index: needs[index] for index in indices})


def _on_job(batch: TaskBatch, job: str, indices: tuple[int, ...], job_id: str) -> str:
    needed = {index: {k for other, k in elements if other == job} for index, elements in batch.needs.items()}
    if indices == batch.indices and all(ks == {index} for index, ks in needed.items()):
        return f"aftercorr:{job_id}"
    union = {k for ks in needed.values() for k in ks}
    if union == set(indices):
        return f"afterok:{job_id}"
    return "afterok:" + ":".join(f"{job_id}_{k}" for k in sorted(union))
