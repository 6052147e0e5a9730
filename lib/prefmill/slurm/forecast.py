"""Hours before they are spent: from slices timed on this machine, or from the cluster file's `throughput`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prefmill.core.figures import duration
from prefmill.core.places import MANIFEST
from prefmill.pipeline.local import Say
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.pipeline.slots import Slots
from prefmill.slurm.cluster import Resources
from prefmill.slurm.slices import Timed, is_measurable, is_whole, measure, record_seconds, rows_of
from prefmill.training.config import TrainingConfig

_IDLE = 0.1  # of the cores: what others may use before times are doubted


def forecast(
    plan: Plan, resources: Mapping[str, Resources], say: Say, show: Say = print, only: str | None = None
) -> None:
    """Time slices of scoring and training tasks, all or `only` one's, and `say` the hours that follow.

    Of tasks with the same configuration the first stands for all. `resources` are what stages get on a cluster, if any;
    `show` gets the slices' progress.
    """
    ready = []
    for task in _distinct(plan.select(only) if only else plan.tasks):
        missing = [path for paths in task.inputs.values() for path in paths if not (path / MANIFEST).is_file()]
        if missing:
            say(f"{task.key}: not measured, as its input {missing[0]} is not finished: run what makes it first")
        else:
            ready.append(task)
    for key, times in measure(ready, plan.workspace, show).items() if ready else ():
        (task,) = plan.select(key)
        for line in _lines(task, times, resources.get(task.stage.name)):
            say(line)


def seconds_for(times: Sequence[Timed], rows: int) -> float:
    """Seconds for so many rows: a start and so much for each row, by the last two slices."""
    last = times[-1]
    return last.seconds + (rows - last.rows) * _seconds_per_row(times)


def stated(task: PlannedTask, resources: Resources, rates: Mapping[str, float], kind: str) -> Iterator[str]:
    """The hours that the cluster file's `throughput` gives for a task of this stage, where it has the stage."""
    rate, rows = rates.get(task.stage.name), rows_of(task)
    if rate is not None and rows is not None:
        ranks = resources.ranks(task.processes) if task.stage.trains else 1
        yield (
            f"  about {duration(rows * _epochs(task) / rate / ranks)} a task: {_amount(task, rows)} at {rate:g} per "
            f"second on each of {ranks} (throughput.{kind}.{task.stage.name} of the cluster file)"
        )


def _distinct(tasks: Iterable[PlannedTask]) -> list[PlannedTask]:
    found: list[PlannedTask] = []
    for task in filter(is_measurable, tasks):
        if not any(other.stage is task.stage and other.config == task.config for other in found):
            found.append(task)
    return found


def _lines(task: PlannedTask, times: Sequence[Timed], resources: Resources | None) -> Iterator[str]:
    ranks, rows = Slots(1).ranks(task), rows_of(task) or (times[-1].rows if is_whole(times) else None)
    per_row = _seconds_per_row(times)
    slices = " and ".join(f"{timed.rows:,} rows in {duration(timed.seconds)}" for timed in times[-2:])
    rate = f"{float(f'{_epochs(task) / per_row / ranks:.3g}'):,g} rows per second on each of {ranks}" if per_row else ""
    yield f"{task.key}: {rate or 'no rate, as more rows took no longer'}; measured: {slices}"
    cores = max(timed.cores for timed in times)
    if cores > _IDLE * (os.cpu_count() or 1):
        yield (
            f"  the machine was busy: other programs used {cores:.1f} of its {os.cpu_count()} cores, so that these "
            "times may be several times too high; measure again on an idle machine"
        )
    if rows is None:
        yield "  how many rows there are is not known before it reads its dataset"
        return
    took = seconds_for(times, rows)
    is_known = per_row > 0 or rows <= times[-1].rows
    yield f"  {'about' if is_known else 'at least'} {duration(took)} here for {_amount(task, rows)}"
    if resources is not None and is_known:
        yield from _on_the_cluster(task, took * ranks, resources)
    if (seconds := record_seconds(task.output)) is not None:
        yield f"  the finished run took {duration(seconds)}: the forecast is {took / seconds:.2f} times that"


def _on_the_cluster(task: PlannedTask, rank_seconds: float, resources: Resources) -> Iterator[str]:
    ranks = resources.ranks(task.processes) if task.stage.trains else 1
    took, limit = rank_seconds / ranks, 60 * resources.time_limit_minutes
    stops = f"; stopped and resumed {took // limit:.0f} times" if took > limit else ""
    yield f"  about {duration(took)} on the {ranks} asked for, were each as fast as here{stops}"


def _seconds_per_row(times: Sequence[Timed]) -> float:
    last, before = times[-1], times[-2] if len(times) > 1 else Timed(0, 0.0)
    if last.rows == before.rows:
        before = Timed(0, 0.0)
    return max(0.0, (last.seconds - before.seconds) / (last.rows - before.rows))


def _epochs(task: PlannedTask) -> int:
    return task.config.num_train_epochs if isinstance(task.config, TrainingConfig) else 1


def _amount(task: PlannedTask, rows: int) -> str:
    return f"{rows:,} rows" + (f" x {_epochs(task)} epochs" if _epochs(task) > 1 else "")
