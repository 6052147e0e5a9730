"""Hours before they are spent: from slices timed on this machine, or from the cluster file's `throughput`."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefmill.core.artifact import Provenance
from prefmill.core.errors import PipelineError
from prefmill.core.figures import duration
from prefmill.core.files import read_record
from prefmill.core.places import RUN_RECORD
from prefmill.core.terminal import Say
from prefmill.pipeline.local import RunOptions, run_plan
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.pipeline.slots import Slots
from prefmill.pipeline.task_status import manifest_fault
from prefmill.reviews.join import PAPERS, REVIEWS
from prefmill.slurm.cluster import Resources
from prefmill.store.artifacts import publish, read_manifest
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.config import TrainingConfig

_GROWTH, _LONGER, _SECONDS = 4, 2.0, 300.0
_COUNTS = ("num_scored", "pairs", "train_rows")  # of the metrics of scoring, preference training and sft
_TRAIN, _VAL = "_train", "_val"
_LOOK_SECONDS = 1.0
_MACHINE = Path("/proc/stat")


@dataclass(frozen=True)
class Timed:
    """Seconds that so many rows took, start and end included, beside other programs on so many `cores`."""

    rows: int
    seconds: float
    cores: float = 0.0


def rows_of(task: PlannedTask) -> int | None:
    """Rows that a scoring or training task goes through once, from the manifests of its inputs; None if unknown."""
    if task.stage.writes == "review_scores":
        found = _manifest_rows(task.inputs["corpus"], REVIEWS)
        share = None if found is None else -(-found // task.sizes.get("shard", 1))
        limit = getattr(task.config, "limit", None)
        return share if limit is None or share is None else min(share, limit)
    return _manifest_rows(task.inputs.get("datasets", ()), _train_file(task))


def is_measurable(task: PlannedTask) -> bool:
    """Whether the task scores reviews, or trains on chats or pairs."""
    trains = task.stage.trains and isinstance(task.config, TrainingConfig) and "datasets" in task.stage.reads
    return trains or task.stage.writes == "review_scores"


def record_seconds(output: Path) -> float | None:
    """Seconds that the attempt took which finished this output; None where there is none."""
    seconds: float | None = read_record(output / RUN_RECORD).get("seconds")
    return seconds


def measure(tasks: Sequence[PlannedTask], workspace: Path, say: Say) -> dict[str, list[Timed]]:
    """Each task's times on slices that grow until work outweighs the start; raises PipelineError where one fails.

    Two slices at least, unless one holds every row. They run one after the other, through `prefmill run`.
    """
    found: dict[str, list[Timed]] = {task.key: [] for task in tasks}
    pending = {task.key: task for task in tasks}
    while pending:
        # A workspace of its own each time: nothing that a smaller slice has kept may spare a larger one work.
        with TemporaryDirectory(prefix=".measure-", dir=workspace) as scratch:
            for key, timed in _run(pending, found, Path(scratch), say).items():
                found[key].append(timed)
        pending = {key: task for key, task in pending.items() if not _enough(found[key], rows_of(task))}
    return found


def _enough(times: Sequence[Timed], rows: int | None) -> bool:
    if times[-1].rows >= (rows or math.inf) or is_whole(times):
        return True
    took = [timed.seconds for timed in times]
    # Below twice, the difference of two slices is as much the machine's mood as the rows'.
    return len(took) > 1 and (took[-1] > _LONGER * took[-2] or sum(took) > _SECONDS)


def is_whole(times: Sequence[Timed]) -> bool:
    """Whether a larger slice has no more rows than the one before."""
    return len(times) > 1 and times[-1].rows == times[-2].rows


def _run(
    tasks: Mapping[str, PlannedTask], found: Mapping[str, Sequence[Timed]], scratch: Path, say: Say
) -> dict[str, Timed]:
    slices = {key: _slice(task, _first(task) * _GROWTH ** len(found[key]), scratch) for key, task in tasks.items()}
    plan = Plan("measure", scratch, tuple(slices.values()))
    before = cores_of_others()
    if run_plan(plan, say=say, options=RunOptions(jobs=1, why="on a slice of its rows")):
        raise PipelineError(
            "a slice could not be run, so nothing is forecast", where=", ".join(tasks), fix="correct the error above"
        )
    cores = max(before, cores_of_others())
    return {key: Timed(_rows_done(small), record_seconds(small.output) or 0.0, cores) for key, small in slices.items()}


def cores_of_others() -> float:
    """The cores in use while this program waits for a second; 0 where the system does not tell."""
    # Looked at before and after a slice: a task is a fork server's child, whose own share nobody counts here.
    before, start = _used_seconds(), time.monotonic()
    time.sleep(_LOOK_SECONDS)
    return (_used_seconds() - before) / (time.monotonic() - start)


def _used_seconds() -> float:
    try:
        user, nice, system, _idle, _iowait, *rest = map(int, _MACHINE.read_text().split("\n", 1)[0].split()[1:9])
    except OSError:  # not Linux
        return 0.0
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _rows_done(task: PlannedTask) -> int:
    manifest = read_manifest(task.output)
    assert manifest is not None
    # Of a dataset of the user's nobody knows before how many rows it has, and how many of them are held out.
    return int(next(manifest.metrics[name] for name in _COUNTS if name in manifest.metrics))


def _first(task: PlannedTask) -> int:
    """Rows of the smallest slice: a step, or a few reviews."""
    return task.config.effective_batch_size if isinstance(task.config, TrainingConfig) else 8


def _slice(task: PlannedTask, rows: int, scratch: Path) -> PlannedTask:
    """`task` on about so many of its rows."""
    place = Path("measure") / task.stage.name / task.name
    small = replace(task, run="measure", output=scratch / task.stage.root / place, logs=scratch / "logs" / place)
    if task.inputs.get("datasets"):
        cut = _sliced_datasets(task, rows, scratch / "inputs" / place)
        return replace(small, inputs={**task.inputs, "datasets": (cut,)})
    if task.stage.writes == "review_scores":
        return _sliced_reviews(task, small, rows, scratch / "inputs" / place)
    # Of a dataset that the task reads itself the first rows: nobody knows how many there are to draw from.
    most = task.config.max_rows  # type: ignore[attr-defined]
    return replace(small, config=task.config.model_copy(update={"max_rows": rows if most is None else min(rows, most)}))


def _sliced_reviews(task: PlannedTask, small: PlannedTask, rows: int, folder: Path) -> PlannedTask:
    """`small` on about so many reviews of the task's shard; with a `limit` of its own on the first, which it scores."""
    share, most = task.config.max_failed_share, task.config.limit  # type: ignore[attr-defined]
    changes = {"max_failed_share": max(0.5, share)} if share else {}  # one of eight is too long: that says nothing
    if most is not None:
        return replace(small, config=task.config.model_copy(update={**changes, "limit": min(rows, most)}))
    (source,) = task.inputs["corpus"]
    reviews = list(_some_groups(source / REVIEWS, rows * task.sizes.get("shard", 1)))
    papers = {review["paper_id"] for review in reviews}
    write_jsonl(folder / REVIEWS, reviews)
    write_jsonl(folder / PAPERS, (paper for paper in read_jsonl(source / PAPERS) if paper["paper_id"] in papers))
    _publish_as(source, folder)
    inputs = {**task.inputs, "corpus": (folder,)}
    return replace(small, config=task.config.model_copy(update=changes), inputs=inputs)


def _sliced_datasets(task: PlannedTask, rows: int, folder: Path) -> Path:
    """The task's dataset with about so many rows, and its share of the rows for validation."""
    (source,) = task.inputs["datasets"]
    manifest = read_manifest(source)
    assert manifest is not None
    total = rows_of(task) or rows
    for entry in manifest.files:
        if entry.path in (_train_file(task), _train_file(task).replace(_TRAIN, _VAL)) and entry.rows:
            chosen = list(_some_groups(source / entry.path, max(1, round(entry.rows * rows / total))))
            write_jsonl(folder / entry.path, chosen)
            _link_images(chosen, source, folder)
    _publish_as(source, folder)
    return folder


def _publish_as(source: Path, folder: Path) -> None:
    manifest = read_manifest(source)
    assert manifest is not None
    origin = Provenance(**{name: getattr(manifest, name) for name in Provenance.__dataclass_fields__})
    publish(folder, manifest.kind, origin, {})


def _some_groups(path: Path, rows: int) -> Iterator[dict[str, Any]]:
    """Whole groups of rows, drawn from all of the file, until there are so many rows."""
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(read_jsonl(path)):
        groups.setdefault(row.get("group", row.get("paper_id", number)), []).append(number)
    drawn = list(groups.values())
    # Not the first ones: files are often sorted, and lengths with them.
    random.Random(0).shuffle(drawn)
    wanted: set[int] = set()
    while drawn and len(wanted) < rows:
        wanted.update(drawn.pop())
    return (row for number, row in enumerate(read_jsonl(path)) if number in wanted)


def _link_images(rows: Iterable[Mapping[str, Any]], source: Path, folder: Path) -> None:
    for name in {name for row in rows for name in row.get("images", ())}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to(source / name)


def _train_file(task: PlannedTask) -> str:
    """Of a dataset: masked diffusion trains on the same files as dpo and sft."""
    return f"{task.stage.name.removeprefix('mdlm_')}_{getattr(task.config, 'modality', 'clean')}{_TRAIN}/data.jsonl"


def _manifest_rows(folders: Iterable[Path], name: str) -> int | None:
    manifests = [read_manifest(folder) for folder in folders]
    files = [entry for manifest in manifests if manifest for entry in manifest.files]
    return next((entry.rows for entry in files if entry.path == name), None)


_IDLE = 0.1  # of the cores: what others may use before times are doubted


def forecast(
    plan: Plan, resources: Mapping[str, Resources], say: Say, show: Say = print, only: str | None = None
) -> None:
    """Time slices of scoring and training tasks, all or `only` one's, and `say` the hours that follow.

    Of tasks with the same configuration the first stands for all. `resources` are what stages get on a cluster, if any;
    `show` gets the slices' progress.
    """
    ready, asked = [], plan.select(only) if only else plan.tasks
    if not any(map(is_measurable, asked)):
        say("nothing to measure: slices are of score_reviews and of trainings on chats or pairs of texts")
    for task in _distinct(asked):
        missing = [path for paths in task.inputs.values() for path in paths if manifest_fault(path) != ""]
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
