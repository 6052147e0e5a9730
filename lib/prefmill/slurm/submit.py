"""`prefmill submit`: a plan becomes one sbatch call for every chunk of a stage's array."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.terminal import Say, say_on
from prefmill.pipeline.decisions import alone, submissions_folder
from prefmill.pipeline.freeze import check_path, freeze, snapshot
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.pipeline.run_record import point_latest, write_plan
from prefmill.pipeline.sharing import share_finished
from prefmill.pipeline.state import code_version, inspect, read_outside
from prefmill.pipeline.task_status import refuse_beside_run
from prefmill.slurm import jobs as slurm
from prefmill.slurm.cluster import ClusterFile, Resources, not_taken_along, resources_for
from prefmill.slurm.follow_up import LOOK_MINUTES, Wait, live_follow_ups, postpone, send_follow_up
from prefmill.slurm.intents import FullError, Order, SbatchRefusedError, send_fitting, settle
from prefmill.slurm.script import array_script, healer_script, max_array_size
from prefmill.slurm.sightings import Queued, queued_tasks
from prefmill.slurm.submission import (
    ADVANCE,
    ArrayFile,
    Submission,
    array_path,
    claim_folder,
    next_number,
    require_owner,
    script_of,
    submissions,
    user_name,
    write_array,
    write_submission,
)
from prefmill.slurm.task_batches import TaskBatch, chunks_of, dependency, make_batches

_ADVANCE_MINUTES = 10
_SUBMITTING_MINUTES = 5  # nobody submits for so long; a submission that was cut off is then finished


@dataclass(frozen=True)
class Call:
    """One sbatch call for `batch` of `array`, with the `text` of its script; `after` makes its --dependency."""

    batch: TaskBatch
    array: ArrayFile
    text: str
    max_concurrent: int | None
    after: Callable[[Mapping[str, str]], str]

    def order(self, draft: Submission, ids: Mapping[str, str]) -> Order:
        """The call, where `ids` are the jobs submitted before."""
        where = (self.batch.stage, self.batch.chunk, self.array.script)
        return Order(draft, "array", *where, self.batch.indices, (), self.after(ids), self.max_concurrent)


def submit(
    pipeline: PipelineFile,
    plan: Plan,
    source: Path,
    cluster: ClusterFile,
    only: str | None = None,
    dry_run: bool = False,
    say: Say = say_on,
) -> None:
    """Submit what is neither complete nor queued already.

    With `only`, refuses what reads from tasks that nobody is going to run. A dry run prints the calls and scripts
    of the submission and touches nothing. Raises PrefmillError before the first job where something is wrong.
    """
    check_path(plan.workspace)
    if not dry_run:
        submissions_folder(plan.workspace, plan.run).mkdir(parents=True, exist_ok=True)
    # Of two submissions of a run at the same time, the second waits and then sees the first one's jobs.
    with nullcontext() if dry_run else alone(plan.workspace, plan.run):
        found = submissions(plan.workspace, plan.run)
        require_owner(found)
        refuse_beside_run(plan.workspace, plan.run)
        # Before the queue is looked at: a job whose answer was lost counts as queued from here on.
        for line in [] if dry_run else settle(found):
            say(line)
        queued = queued_tasks(plan)
        if plan.share and not dry_run:
            share_finished(plan, queued, say)
        todo, live, words = _sort_out(plan, queued, only)
        say(words)
        size = max_array_size(cluster)
        batches = make_batches(plan, todo, {key: item.element for key, item in live.items()}, size)
        if not batches:
            if not dry_run:  # all may have been taken from other runs: this one is there all the same
                _record(plan)
            say("nothing to submit")
            return
        for note in not_taken_along(cluster, os.environ):
            say(note)
        draft = _draft(pipeline, plan, source, cluster, batches, dry_run)
        arrays = _arrays(draft, plan, batches, pipeline, cluster, size)
        jobs = {item.element[0]: item.whole for item in live.values()}
        calls = list(_calls(draft, arrays, batches, jobs, cluster))
        texts = {call.array.script: call.text for call in calls} | _healer_text(draft, cluster)
        if dry_run:
            _show(draft, calls, texts, say)
            return
        # With kill-on-invalid-dep=no Slurm never removes these, and new jobs would stand beside them.
        stuck = [item.element for key, item in queued.items() if key not in live]
        if stuck and not slurm.cancel(stuck):
            raise PipelineError(
                "Slurm does not cancel jobs that can never run", got=stuck, fix="scancel these elements"
            )
        _write(replace(draft, noted=_noted(plan, todo)), plan, arrays, texts)
        _send(draft, calls, say)


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
                f"{task.key} reads an input that nothing makes", got=f"{min(missing)}: neither complete nor queued",
                fix="leave --only out, or submit that stage first",
            )  # fmt: skip
        live.pop(task.key, None)
        anew.add(task.key)
        todo.append(task)
    complete = len(plan.tasks) - len(todo) - len(live) - len(left_out)
    stuck = len(queued) - len(live)
    words = f"run {plan.run}: {complete} tasks complete, {len(live)} queued or running, {len(todo)} to submit"
    return todo, live, words + (f" ({stuck} that could never run as they were)" if stuck else "")


def _noted(plan: Plan, todo: Sequence[PlannedTask]) -> dict[str, str]:
    """What the tasks read that nobody in the plan makes, as it is now; a file that all shards read is read once."""
    made, found = {str(task.output) for task in plan.tasks}, dict[str, str]()
    for task in todo:
        found.update(read_outside(task, lambda path: path not in made and path not in found))
    return found


def _draft(
    pipeline: PipelineFile, plan: Plan, source: Path, cluster: ClusterFile, batches: Sequence[TaskBatch], dry_run: bool
) -> Submission:
    if dry_run:
        number = next_number(plan.workspace, plan.run)
        folder = submissions_folder(plan.workspace, plan.run) / f"{number:04d}"
    else:
        number, folder = claim_folder(plan.workspace, plan.run)
    values = freeze(pipeline, plan, source)
    shown = cluster.model_dump(mode="json")
    wanted = tuple((batch.stage, batch.chunk, batch.indices) for batch in batches)
    about = (values, str(source), shown, code_version(), user_name(), wanted)
    return Submission(folder, number, plan.run, plan.workspace, *about)


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
    """Every sbatch call for an array, in order."""
    whole = {**jobs, **{batch.name: batch.indices for batch in batches}}
    for batch in batches:
        same = [other for other in batches if (other.stage, other.chunk) == (batch.stage, batch.chunk)]
        array = arrays[batch.stage, batch.chunk]
        resources = validate(Resources, array.resources)
        indices = [index for other in same for index in other.indices]
        # One script serves both calls of a chunk, and every retry: what runs is an option of the call.
        text = array_script(cluster, resources, f"{draft.run}.{batch.stage}", indices, array.path, draft.code_folder)
        yield Call(batch, array, text, resources.max_concurrent, partial(dependency, batch, whole))


def _healer_text(draft: Submission, cluster: ClusterFile) -> dict[Path, str]:
    """The follow-up job's script, where the site wants that job."""
    if not cluster.advance:
        return {}
    where = (draft.run, draft.workspace, draft.code_folder)
    return {script_of(draft): healer_script(cluster, _small(cluster), *where)}


def _small(cluster: ClusterFile) -> Resources:
    """What the repair job gets: little, where the site's defaults run, unless its file says otherwise."""
    # A site's GPUs, nodes and memory are for trainings: this job needs Python and a place to run.
    shared = {key: value for key, value in cluster.resources.items() if key in ("partition", "python", "setup")}
    defaults = {"time_limit_minutes": _ADVANCE_MINUTES, **shared}
    return resources_for(cluster.model_copy(update={"resources": defaults}), ADVANCE)


def _show(draft: Submission, calls: Sequence[Call], texts: Mapping[Path, str], say: Say) -> None:
    for call in calls:
        order = call.order(draft, {})
        say(shlex.join(["sbatch", *order.arguments(f"{draft.run}.{order.stage}.NAME"), str(order.script)]))
    for script, text in texts.items():
        say(f"\n# {script}\n{text}")


def _record(plan: Plan) -> None:
    """Write that by which `prefmill status` and `logs` find the run."""
    point_latest(plan)
    write_plan(plan)


def _write(
    draft: Submission, plan: Plan, arrays: Mapping[tuple[str, int], ArrayFile], texts: Mapping[Path, str]
) -> None:
    # Before the first job: the run is then found, even if this process is killed halfway.
    _record(plan)
    snapshot(draft.code_folder)
    logs = plan.workspace / "logs" / plan.run
    (logs / ADVANCE).mkdir(exist_ok=True)
    for array in arrays.values():
        (logs / array.stage / "slurm").mkdir(parents=True, exist_ok=True)
        write_array(array)
    for script, text in texts.items():
        script.write_text(text, encoding="utf-8")
    (logs / ADVANCE / f"{ADVANCE}.out").touch()  # a full disk then has room for its lines, or loses only those
    # Last: until then a process that is killed leaves a folder that counts for nothing.
    write_submission(draft)


def _send(draft: Submission, calls: Sequence[Call], say: Say) -> None:
    """Submit all that there is room for. The follow-up job comes first: it submits the rest, whatever ends this."""
    healer = _first_follow_up(draft, say)
    ids: dict[str, str] = {}
    try:
        for call in calls:
            order = call.order(draft, ids)
            record = send_fitting(order)
            if record is not None:
                ids[call.batch.name] = record.job_id
                after = f", after {order.dependency}" if order.dependency else ""
                say(f"+ {order.stage} chunk {order.chunk}: {len(record.indices)} tasks as job {record.job_id}{after}")
            if record is None or len(record.indices) < len(order.indices):
                who = "the job that looks after the run submits" if healer else "`prefmill advance` submits"
                say(f"no more jobs may be submitted now: {who} the rest when some have ended")
                break
    except SbatchRefusedError:
        # Nothing was sent, so nothing has to be looked after.
        if healer and not ids:
            slurm.cancel([(healer, -1)])
            healer = ""
        raise
    finally:
        # After a failure as well: what was sent until then has to be looked after.
        if healer:
            postpone(healer, Wait(tuple(ids.values())) if ids else Wait(minutes=LOOK_MINUTES), has_run=False)
    say(f"submission {draft.number:04d}: {len(ids)} of {len(calls)} arrays; `prefmill status` shows how it goes")


def _first_follow_up(draft: Submission, say: Say) -> str:
    """The job that looks after the run from now on, with this submission's code; "" where there is none."""
    if not script_of(draft).is_file():
        return ""
    before = submissions(draft.workspace, draft.run)[:-1]
    # An older one would go on to look with the code of its own submission.
    slurm.cancel([(job_id, -1) for job_id in live_follow_ups(before) or {}])
    try:
        return send_follow_up(draft, Wait(minutes=_SUBMITTING_MINUTES)).job_id
    except FullError as error:
        say(f"no job looks after the run yet, the first task to start submits it: {error.details['got']}")
        return ""
