"""`prefmill submit`: a plan becomes one sbatch call for every chunk of a stage's array."""

from __future__ import annotations

import fcntl
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.pipeline.decisions import submissions_folder
from prefmill.pipeline.freeze import check_path, freeze, snapshot
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.pipeline.run_record import point_latest, write_plan
from prefmill.pipeline.sharing import share_finished
from prefmill.pipeline.state import code_version, inspect
from prefmill.slurm import jobs as slurm
from prefmill.slurm.cluster import ClusterFile, Resources, resources_for
from prefmill.slurm.elements import Tried, newest
from prefmill.slurm.jobs import JobState
from prefmill.slurm.script import advance_script, array_script, array_spec, max_array_size, sbatch
from prefmill.slurm.sightings import Sightings, sight, told
from prefmill.slurm.submission import (
    ARRAYS,
    ArrayFile,
    Submission,
    array_path,
    claim_folder,
    next_number,
    require_owner,
    submissions,
    user_name,
    write_array,
    write_submission,
)
from prefmill.slurm.task_batches import Element, TaskBatch, chunks_of, dependency, make_batches
from prefmill.store.artifacts import read_manifest

Say = Callable[[str], None]
ADVANCE = "advance"
_ADVANCE_MINUTES = 10


@dataclass(frozen=True)
class Call:
    """One sbatch call for `batch`, or for the job that looks after its stage; `after` makes its --dependency."""

    kind: Literal["array", "advance"]
    batch: TaskBatch
    script: Path
    text: str
    options: tuple[str, ...]
    after: Callable[[Mapping[str, str]], str]

    def arguments(self, ids: Mapping[str, str]) -> list[str]:
        """Options beside the script's own, where `ids` are the jobs submitted before."""
        waits = self.after(ids)
        return [*self.options, *([f"--dependency={waits}"] if waits else [])]


def submit(
    pipeline: PipelineFile,
    plan: Plan,
    source: Path,
    cluster: ClusterFile,
    only: str | None = None,
    dry_run: bool = False,
    say: Say = print,
) -> None:
    """Submit what is neither complete nor queued already.

    With `only`, refuses what reads from tasks that nobody is going to run. A dry run prints the calls and scripts
    of the submission and touches nothing. Raises PrefmillError before the first job where something is wrong.
    """
    check_path(plan.workspace)
    with _alone(plan, dry_run):
        require_owner(submissions(plan.workspace, plan.run))
        queued = queued_tasks(plan)
        if plan.share and not dry_run:
            share_finished(plan, queued, say)
        todo, live, words = _sort_out(plan, queued, only)
        say(words)
        size = max_array_size(cluster)
        batches = make_batches(plan, todo, {key: item.element for key, item in live.items()}, size)
        if not batches:
            say("nothing to submit")
            return
        draft = _draft(pipeline, plan, source, cluster, dry_run)
        arrays = _arrays(draft, plan, batches, pipeline, cluster, size)
        jobs = {item.element[0]: item.whole for item in live.values()}
        calls = list(_calls(draft, arrays, batches, jobs, cluster))
        if dry_run:
            _show(calls, say)
            return
        stuck = [item.element for key, item in queued.items() if key not in live]
        if stuck and not slurm.cancel(stuck):
            raise PipelineError("Slurm does not cancel what can never run", got=stuck, fix="scancel these elements")
        _write(draft, plan, arrays, calls)
        _send(draft, calls, say)


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
    wanted = [tried[task.key] for task in plan.tasks if task.key in tried and read_manifest(task.output) is None]
    seen = sight(wanted, [one.job.job_id for one in tried.values()]) if tried else Sightings()
    if seen is None:
        raise PipelineError("Slurm does not say what is queued", fix="try again when `squeue` answers")
    if lines := told(seen.unknown, tried):
        raise PipelineError(
            "Slurm says nothing of a job that may still run", got=lines[0],
            fix="try again in a few minutes; nothing was submitted",
        )  # fmt: skip
    return {key: _queued(one, seen.queue[one.element]) for key, one in tried.items() if seen.live(one.element)}


def _queued(tried: Tried, job: JobState) -> Queued:
    pending = job.state == "PENDING"
    return Queued(tried.element, tried.job.indices, pending, pending and slurm.waits_for(job)[1])


def _sort_out(
    plan: Plan, queued: Mapping[str, Queued], only: str | None
) -> tuple[list[PlannedTask], dict[str, Queued], str]:
    """What to submit, what is left to the queue, and both in words.

    An element that waits for what has failed, or for what is submitted anew, is submitted anew as well.
    """
    states = inspect(plan)
    selected = {task.key for task in (plan.select(only) if only else plan.tasks)}
    todo: list[PlannedTask] = []
    left_out: set[str] = set()
    anew: set[str] = set()
    live = dict(queued)
    for task in plan.tasks:
        item = queued.get(task.key)
        upstream = {other.key for other in plan.upstream(task)}
        if item is not None and not item.broken and not (item.pending and upstream & anew):
            continue
        if states[task.key].freshness == "complete":
            continue
        if task.key not in selected:
            left_out.add(task.key)
            continue
        if missing := upstream & left_out:
            raise PipelineError(
                f"{task.key} reads what nobody is going to make", got=f"{min(missing)}: neither complete nor queued",
                fix="leave --only out, or submit that stage first",
            )  # fmt: skip
        live.pop(task.key, None)
        anew.add(task.key)
        todo.append(task)
    complete = len(plan.tasks) - len(todo) - len(live) - len(left_out)
    stuck = len(queued) - len(live)
    words = f"run {plan.run}: {complete} tasks complete, {len(live)} queued or running, {len(todo)} to submit"
    return todo, live, words + (f" ({stuck} that could never run as they were)" if stuck else "")


def _draft(pipeline: PipelineFile, plan: Plan, source: Path, cluster: ClusterFile, dry_run: bool) -> Submission:
    if dry_run:
        number = next_number(plan.workspace, plan.run)
        folder = submissions_folder(plan.workspace, plan.run) / f"{number:04d}"
    else:
        number, folder = claim_folder(plan.workspace, plan.run)
    values = freeze(pipeline, plan, source)
    shown = cluster.model_dump(mode="json")
    return Submission(folder, number, plan.run, plan.workspace, values, str(source), shown, code_version(), user_name())


def _arrays(
    draft: Submission, plan: Plan, batches: Sequence[TaskBatch], pipeline: PipelineFile, cluster: ClusterFile, size: int
) -> dict[tuple[str, int], ArrayFile]:
    """Every chunk that has something to run."""
    found = {}
    for stage in dict.fromkeys(batch.stage for batch in batches):
        tasks = [task for task in plan.tasks if task.stage.name == stage]
        resources = _checked(tasks[0], resources_for(cluster, stage, pipeline.stages[stage].resources))
        names: dict[int, list[str]] = {}
        for key, (chunk, _) in chunks_of(tasks, size).items():
            names.setdefault(chunk, []).append(key.partition(":")[2])
        for chunk in sorted({batch.chunk for batch in batches if batch.stage == stage}):
            path = array_path(draft.folder, stage, chunk)
            found[stage, chunk] = ArrayFile(path, stage, chunk, tuple(names[chunk]), resources.model_dump(mode="json"))
    return found


def _checked(task: PlannedTask, resources: Resources) -> Resources:
    if resources.nodes > 1 and not task.stage.trains:
        raise ConfigError(
            f"stage {task.stage.name} cannot use more than one node", got=f"nodes: {resources.nodes}",
            fix="leave `nodes` to the stages that train; spread others by an array over shards",
        )  # fmt: skip
    return resources


def _calls(
    draft: Submission,
    arrays: Mapping[tuple[str, int], ArrayFile],
    batches: Sequence[TaskBatch],
    jobs: Mapping[str, tuple[int, ...]],
    cluster: ClusterFile,
) -> Iterator[Call]:
    """Every sbatch call in order: a stage's chunks, then the job that looks after them."""
    whole = {**jobs, **{batch.name: batch.indices for batch in batches}}
    for stage in dict.fromkeys(batch.stage for batch in batches):
        of_stage = [batch for batch in batches if batch.stage == stage]
        for batch in of_stage:
            same = [other for other in of_stage if other.chunk == batch.chunk]
            array = arrays[stage, batch.chunk]
            resources = validate(Resources, array.resources)
            indices = [index for other in same for index in other.indices]
            text = array_script(cluster, resources, f"{draft.run}.{stage}", indices, array.path, draft.code_folder)
            spec = array_spec(batch.indices, resources.max_concurrent)
            options = (f"--array={spec}",) if len(same) > 1 else ()
            yield Call("array", batch, array.script, text, options, partial(dependency, batch, whole))
        if cluster.advance:
            text = advance_script(cluster, _small(cluster), draft.run, draft.workspace, draft.code_folder)
            names = [batch.name for batch in of_stage]
            yield Call(
                "advance", of_stage[-1], draft.folder / ARRAYS / f"{ADVANCE}.sbatch", text, (), partial(_ended, names)
            )


def _small(cluster: ClusterFile) -> Resources:
    """What the repair job gets: little, where the site's defaults run, unless its file says otherwise."""
    shared = {key: value for key, value in cluster.resources.items() if key in ("partition", "python", "setup")}
    defaults = {"time_limit_minutes": _ADVANCE_MINUTES, **shared}
    return resources_for(cluster.model_copy(update={"resources": defaults}), ADVANCE)


def _ended(names: Sequence[str], ids: Mapping[str, str]) -> str:
    return "afterany:" + ":".join(ids.get(name, name) for name in names)


def _show(calls: Sequence[Call], say: Say) -> None:
    for call in calls:
        say(shlex.join(["sbatch", *call.arguments({}), str(call.script)]))
    for script, text in {call.script: call.text for call in calls}.items():
        say(f"\n# {script}\n{text}")


def _write(draft: Submission, plan: Plan, arrays: Mapping[tuple[str, int], ArrayFile], calls: Sequence[Call]) -> None:
    point_latest(plan)
    write_plan(plan)
    snapshot(draft.code_folder)
    logs = plan.workspace / "logs" / plan.run
    (logs / ADVANCE).mkdir(exist_ok=True)
    for array in arrays.values():
        (logs / array.stage / "slurm").mkdir(parents=True, exist_ok=True)
        write_array(array)
    for script, text in {call.script: call.text for call in calls}.items():
        script.write_text(text, encoding="utf-8")
    write_submission(draft)


def _send(draft: Submission, calls: Sequence[Call], say: Say) -> None:
    ids: dict[str, str] = {}
    for call in calls:
        arguments = call.arguments(ids)
        job_id = sbatch(call.script, arguments)
        waits = call.after(ids)
        indices = call.batch.indices if call.kind == "array" else ()
        draft.record_job(call.kind, call.batch.stage, call.batch.chunk, job_id, indices, waits)
        if call.kind == "array":
            ids[call.batch.name] = job_id
            after = f", after {waits}" if waits else ""
            say(f"+ {call.batch.stage} chunk {call.batch.chunk}: {len(indices)} tasks as job {job_id}{after}")
    say(f"submission {draft.number:04d}: {len(calls)} sbatch calls; `prefmill status` shows how it goes")


@contextmanager
def _alone(plan: Plan, dry_run: bool) -> Iterator[None]:
    """Of two submissions of a run at the same time, the second waits and then sees the first one's jobs."""
    if dry_run:
        yield
        return
    folder = submissions_folder(plan.workspace, plan.run)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
