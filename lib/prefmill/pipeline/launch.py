"""`prefmill submit`: a plan becomes one sbatch call for every chunk of a stage's array."""

from __future__ import annotations

import fcntl
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from prefmill.errors import PipelineError
from prefmill.pipeline.batches import Batch, Element, chunks_of, dependency, make_batches
from prefmill.pipeline.cluster import ClusterFile, Resources, resources_for
from prefmill.pipeline.freeze import check_path, freeze, snapshot
from prefmill.pipeline.local import point_latest, write_plan
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.pipeline.script import advance_script, array_script, array_spec, max_array_size, sbatch
from prefmill.pipeline.state import code_version, inspect
from prefmill.pipeline.submission import (
    ARRAYS,
    ArrayFile,
    Submission,
    array_path,
    claim_folder,
    next_number,
    submissions,
    submissions_folder,
    write_array,
    write_submission,
)

Say = Callable[[str], None]
ADVANCE = "advance"
_ADVANCE_MINUTES = 10


@dataclass(frozen=True)
class Call:
    """One sbatch call for `batch`, or for the job that looks after its stage; `after` makes its --dependency."""

    kind: Literal["array", "advance"]
    batch: Batch
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
        live = live_tasks(plan)
        todo = _todo(plan, live, only, say)
        size = max_array_size(cluster)
        batches = make_batches(plan, todo, {key: element for key, (element, _) in live.items()}, size)
        if not batches:
            say("nothing to submit")
            return
        draft = _draft(pipeline, plan, source, cluster, dry_run)
        arrays = _arrays(draft, plan, batches, pipeline, cluster, size)
        jobs = {job: indices for (job, _), indices in live.values()}
        calls = list(_calls(draft, arrays, batches, jobs, cluster))
        if dry_run:
            _show(calls, say)
            return
        _write(draft, plan, arrays, calls)
        _send(draft, calls, say)


def live_tasks(plan: Plan) -> dict[str, tuple[Element, tuple[int, ...]]]:
    """The queued or running element of every task that has one, and all indices of its job; asks Slurm once."""
    jobs = [
        (job, submission.array(job.stage, job.chunk).tasks)
        for submission in submissions(plan.workspace, plan.run)
        for job in submission.jobs()
        if job.kind == "array"
    ]
    alive = queued() if jobs else set()
    return {
        f"{job.stage}:{tasks[index]}": ((job.job_id, index), job.indices)
        for job, tasks in jobs
        for index in job.indices
        if (job.job_id, index) in alive
    }


def queued() -> set[Element]:
    """Every element of one's own arrays that is queued or running; raises PipelineError when Slurm does not answer."""
    command = ["squeue", "-h", "-r", "--me", "-o", "%F %K"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise PipelineError(
            "Slurm does not say what is queued", got=getattr(error, "stderr", None) or str(error),
            fix="try again when `squeue` answers: without it, tasks could be submitted twice",
        ) from None  # fmt: skip
    rows = [line.split() for line in shown.splitlines()]
    return {(job, int(index)) for job, index in rows if index.isdigit()}


def _todo(
    plan: Plan, live: Mapping[str, tuple[Element, tuple[int, ...]]], only: str | None, say: Say
) -> list[PlannedTask]:
    states = inspect(plan)
    selected = {task.key for task in (plan.select(only) if only else plan.tasks)}
    complete = [task.key for task in plan.tasks if states[task.key].freshness == "complete"]
    open_tasks = [task for task in plan.tasks if task.key not in live and states[task.key].freshness != "complete"]
    todo = [task for task in open_tasks if task.key in selected]
    left_out = {task.key for task in open_tasks} - selected
    for task in todo:
        missing = [other.key for other in plan.upstream(task) if other.key in left_out]
        if missing:
            raise PipelineError(
                f"{task.key} reads what nobody is going to make", got=f"{missing[0]}: neither complete nor queued",
                fix="leave --only out, or submit that stage first",
            )  # fmt: skip
    say(f"run {plan.run}: {len(complete)} tasks complete, {len(live)} queued or running, {len(todo)} to submit")
    return todo


def _draft(pipeline: PipelineFile, plan: Plan, source: Path, cluster: ClusterFile, dry_run: bool) -> Submission:
    if dry_run:
        number = next_number(plan.workspace, plan.run)
        folder = submissions_folder(plan.workspace, plan.run) / f"{number:04d}"
    else:
        number, folder = claim_folder(plan.workspace, plan.run)
    values = freeze(pipeline, plan, source)
    shown = cluster.model_dump(mode="json")
    return Submission(folder, number, plan.run, plan.workspace, values, str(source), shown, code_version())


def _arrays(
    draft: Submission, plan: Plan, batches: Sequence[Batch], pipeline: PipelineFile, cluster: ClusterFile, size: int
) -> dict[tuple[str, int], ArrayFile]:
    """Every chunk that has something to run."""
    found = {}
    for stage in dict.fromkeys(batch.stage for batch in batches):
        tasks = [task for task in plan.tasks if task.stage.name == stage]
        resources = resources_for(cluster, stage, pipeline.stages[stage].resources).model_dump(mode="json")
        names: dict[int, list[str]] = {}
        for key, (chunk, _) in chunks_of(tasks, size).items():
            names.setdefault(chunk, []).append(key.partition(":")[2])
        for chunk in sorted({batch.chunk for batch in batches if batch.stage == stage}):
            path = array_path(draft.folder, stage, chunk)
            found[stage, chunk] = ArrayFile(path, stage, chunk, tuple(names[chunk]), resources)
    return found


def _calls(
    draft: Submission,
    arrays: Mapping[tuple[str, int], ArrayFile],
    batches: Sequence[Batch],
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
            resources = Resources.model_validate(array.resources)
            indices = [index for other in same for index in other.indices]
            text = array_script(cluster, resources, f"{draft.run}.{stage}", indices, array.path, draft.code_folder)
            spec = array_spec(batch.indices, resources.max_running)
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
    defaults = {"minutes": _ADVANCE_MINUTES, **shared}
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
