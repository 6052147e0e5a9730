"""`prefmill advance`: looks at what has ended, resubmits what can be mended, and re-points what waits for it.

It may run at any time, any number of times, by a job after each array, by cron or by hand: two at once take turns,
and what one has done the next one sees. Submissions are never rewritten; their lists of jobs only grow.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefmill.core.config import validate
from prefmill.core.errors import PipelineError
from prefmill.pipeline.decisions import AGAIN, CANCEL, RETRY, STOP, WAIT, Decisions, alone, show
from prefmill.pipeline.oom_backoff import read_smaller, write_smaller
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask, make_plan
from prefmill.pipeline.state import inspect
from prefmill.slurm import jobs as slurm
from prefmill.slurm.cluster import ClusterFile, Resources
from prefmill.slurm.elements import Tried, collect_evidence, has_room, newest
from prefmill.slurm.failures import POLICIES, Decision, Evidence, Failure, RetryOptions, classify, decide, several
from prefmill.slurm.jobs import Element, JobState, Partition, element_name
from prefmill.slurm.notify import announce
from prefmill.slurm.script import array_spec, sbatch
from prefmill.slurm.sightings import Sightings, sight, told
from prefmill.slurm.submission import ARRAYS, Submission, require_owner, submissions
from prefmill.slurm.submit import ADVANCE, Say
from prefmill.slurm.task_batches import TaskBatch, dependency
from prefmill.training.config import needs_less

WAIT_MINUTES = 10
_SECONDS_BETWEEN_TRIES = (0, 5, 20)


@dataclass(frozen=True)
class Retry:
    """A task to submit again; `needs` are live elements it has to wait for, `row` what is noted of it."""

    task: PlannedTask
    tried: Tried
    needs: frozenset[Element]
    row: Mapping[str, object]
    memory_gb: float | None = None


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

    def needs(self, task: PlannedTask) -> frozenset[Element] | None:
        """The elements that are going to make what `task` reads; None where something is made by nobody."""
        makers = [self.live.get(other.key) for other in self.plan.upstream(task) if other.key in self.open]
        return None if None in makers else frozenset(maker for maker in makers if maker is not None)

    def undecided(self, key: str) -> bool:
        """Whether nobody can say if the task's newest element lives."""
        return key in self.tried and self.tried[key].element in self.unknown


def advance(workspace: Path, run: str, say: Say = print, again: Collection[str] = ()) -> View:
    """Mend what can be mended in `run`; tasks in `again` are submitted anew whatever was decided about them.

    Raises PipelineError where the run was never submitted or Slurm does not answer: then nothing is touched.
    """
    with alone(workspace, run):
        require_owner(submissions(workspace, run))
        view = look(workspace, run)
        for key in sorted(again):
            tried = view.tried[key]
            view.decisions.record(key, tried.name, AGAIN, submission=tried.submission.number)
        for line in told(view.unknown, view.tried):
            say(line)
        retries = list(_judge(view, set(again), say))
        ids = _submit(view, retries, say)
        _repoint(view, say)
        _look_again(view, ids, say)
        _tell(view, say)
        say(f"run {run}: {len(view.open)} tasks open, {len(view.live)} queued or running, {len(retries)} resubmitted")
    return view


def look(workspace: Path, run: str) -> View:
    """The run as manifests and Slurm show it; asks Slurm once."""
    found = submissions(workspace, run)
    if not found:
        raise PipelineError(f"run {run} has no submission", where=workspace, fix="submit it with `prefmill submit`")
    latest = found[-1]
    plan = make_plan(validate(PipelineFile, latest.pipeline, where=latest.folder), Path(latest.source))
    states = inspect(plan)
    tried = newest(found)
    open_tasks = {task.key: task for task in plan.tasks if states[task.key].freshness != "complete"}
    wanted = [one for key, one in tried.items() if key in open_tasks]
    others = [one.job.job_id for one in tried.values()] + [job_id for one in found for job_id in one.advance_ids()]
    answers = (_sight_after(seconds, wanted, others) for seconds in _SECONDS_BETWEEN_TRIES)
    seen = next((answer for answer in answers if answer is not None), None)
    if seen is None:
        raise PipelineError("Slurm does not answer", fix="try again when `squeue` does; nothing was touched")
    live = {key: tried[key].element for key in tried if key in open_tasks and seen.live(tried[key].element)}
    return View(plan, found, tried, dict(seen.queue), open_tasks, Decisions(workspace, run), live, seen.unknown)


def _sight_after(seconds: float, wanted: Sequence[Tried], others: Sequence[str]) -> Sightings | None:
    time.sleep(seconds)  # a controller that restarts answers again soon
    return sight(wanted, others)


def _judge(view: View, again: Collection[str], say: Say) -> Iterable[Retry]:
    """What to submit again, upstream first; a task whose upstream is being made is told to wait for it."""
    ended = [
        task
        for key, task in view.open.items()
        if key in view.tried and key not in view.live and not view.undecided(key)
    ]
    accounts = slurm.accounting(sorted({view.tried[task.key].job.job_id for task in ended})) if ended else {}
    limits = slurm.partitions() if ended else None
    going: set[str] = set()
    for task in ended:
        upstream = [other.key for other in view.plan.upstream(task) if other.key in view.open]
        if any(key not in view.live and key not in going for key in upstream):
            continue  # somebody has to mend what it reads first
        retry = _decide(view, task, bool(upstream), task.key in again, accounts or {}, limits or {}, say)
        if retry is not None:
            going.add(task.key)
            yield retry


def _decide(
    view: View,
    task: PlannedTask,
    waits: bool,
    asked: bool,
    accounts: Mapping[Element, JobState],
    limits: Mapping[str, Partition],
    say: Say,
) -> Retry | None:
    tried = view.tried[task.key]
    before = view.decisions.last(task.key, tried.name)
    past = view.decisions.of(task.key, tried.submission.number)
    memory = next((row["memory_gb"] for row in reversed(past) if row.get("memory_gb")), None)
    if before.get("action") in (STOP, CANCEL):
        return None
    if asked or waits:
        why = "asked for" if asked else "what it reads is being made"
        return Retry(task, tried, frozenset(), {"kind": "again", "reason": why}, memory)
    evidence = collect_evidence(tried, task.logs, accounts.get(tried.element), view.queue.get(tried.element))
    failure = classify(evidence)
    means = _means(task, tried, evidence, memory, limits, read_smaller(task.logs, tried.submission.number))
    decision = decide(task.key, failure, evidence, past, means)
    row = _row(failure, decision)
    if decision.action == RETRY:
        return Retry(task, tried, frozenset(), row, decision.memory_gb or memory)
    if before.get("action") != decision.action:
        view.decisions.record(task.key, tried.name, decision.action, submission=tried.submission.number, **row)
        say(show(task.key, {**row, "action": decision.action}))
    return None


def _row(failure: Failure, decision: Decision) -> dict[str, object]:
    node = failure.node if POLICIES[failure.kind].excludes_node and not several(failure.node) else ""
    values = {"kind": failure.kind, "why": failure.why, "source": failure.source, "signature": failure.signature}
    asked = {key: value for key, value in asdict(decision).items() if key not in ("action", "why") and value}
    return {**values, "node": failure.node, "exclude": node, "reason": decision.why, **asked}


def _means(
    task: PlannedTask,
    tried: Tried,
    evidence: Evidence,
    raised: float | None,
    limits: Mapping[str, Partition],
    shrunk: Mapping[str, Any],
) -> RetryOptions:
    resources = validate(Resources, tried.array.resources)
    seen = evidence.account.memory_gb if evidence.account else None
    known = raised or resources.memory_gb or (seen / resources.nodes if seen else None)
    partition = limits.get(resources.partition or "")
    further = needs_less(task.config.model_copy(update=shrunk))
    limit = partition.memory_gb if partition else None
    return RetryOptions(known, limit, has_room(task.output), {**shrunk, **further} if further else {})


def _submit(view: View, retries: Iterable[Retry], say: Say) -> list[str]:
    """One sbatch call for all elements of a chunk that go the same way; what reads from them comes after."""
    groups: dict[tuple[str, int, int, float | None, bool], list[Retry]] = {}
    for retry in retries:
        waits = any(other.key in view.open for other in view.plan.upstream(retry.task))
        where = retry.tried.array
        key = (where.stage, retry.tried.submission.number, where.chunk, retry.memory_gb, waits)
        groups.setdefault(key, []).append(retry)
    return [_submit_group(view, group, say) for group in groups.values()]


def _submit_group(view: View, group: list[Retry], say: Say) -> str:
    first = group[0].tried
    indices = tuple(sorted(retry.tried.index for retry in group))
    needs = {retry.tried.index: view.needs(retry.task) or frozenset() for retry in group}
    batch = TaskBatch(first.array.stage, first.array.chunk, indices, needs)
    waits = dependency(batch, _whole(view), {})
    resources = validate(Resources, first.array.resources)
    options = [f"--array={array_spec(indices, resources.max_concurrent)}"]
    if group[0].memory_gb:
        options.append(f"--mem={round(group[0].memory_gb * 1024)}M")
    excluded = _excluded(view, resources, group)
    options += [f"--exclude={','.join(excluded)}"] if excluded else []
    options += [f"--dependency={waits}"] if waits else []
    for retry in group:
        if isinstance(keys := retry.row.get("smaller"), Mapping):
            write_smaller(retry.task.logs, first.submission.number, keys)
    job_id = sbatch(first.array.script, options)
    record = first.submission.record_job("array", batch.stage, batch.chunk, job_id, indices, waits)
    for retry in group:
        tried = Tried(first.submission, first.array, record, retry.tried.index)
        noted = {**retry.row, "job": tried.name, "submission": first.submission.number}
        view.decisions.record(retry.task.key, retry.tried.name, RETRY, **noted)
        say(show(retry.task.key, {**retry.row, "action": RETRY}) + f"; now {tried.name}")
        view.tried[retry.task.key], view.live[retry.task.key] = tried, tried.element
    return job_id


def _excluded(view: View, resources: Resources, group: list[Retry]) -> list[str]:
    """Nodes not to use, these failures' own among them; at most half of the partition's, the latest."""
    own = [str(retry.row["exclude"]) for retry in group if retry.row.get("exclude")]
    nodes = list(dict.fromkeys([*own, *view.decisions.excluded_nodes(time.time())]))
    partition = (slurm.partitions() or {}).get(resources.partition or "") if nodes else None
    return nodes[: (partition.nodes if partition else 2) // 2]


def _whole(view: View) -> dict[str, tuple[int, ...]]:
    return {job.job_id: job.indices for one in view.submissions for job in one.jobs() if job.kind == "array"}


def _repoint(view: View, say: Say) -> None:
    """Have every pending element wait for the elements that now make what it reads."""
    whole = _whole(view)
    for key, element in view.live.items():
        job = view.queue.get(element)
        wanted = view.needs(view.open[key]) if job is not None and job.state == "PENDING" else None
        if job is None or wanted is None:
            continue
        current, broken = slurm.waits_for(job)
        if not broken and all(item in current or (item[0], -1) in current for item in wanted):
            continue
        text = dependency(TaskBatch("", 0, (element[1],), {element[1]: wanted}), whole, {}) if wanted else ""
        text = text.replace("aftercorr:", "afterok:")  # of a single element they say the same
        done = slurm.set_dependency(element, text)
        say(f"{key} ({element_name(element)}) {'now waits' if done else 'could not be made to wait'} for {text or '-'}")


def _look_again(view: View, ids: list[str], say: Say) -> None:
    """Have another advance follow what was submitted, or try again later where a disk is full."""
    script = view.submissions[-1].folder / ARRAYS / f"{ADVANCE}.sbatch"
    if not script.is_file():
        return
    if ids:
        after = "afterany:" + ":".join(ids)
        _submit_advance(view, script, [f"--dependency={after}"], after)
    waiting = [key for key in view.open if view.decisions.last(key).get("action") == WAIT]
    if waiting and not _is_due(view):
        _submit_advance(view, script, [f"--begin=now+{WAIT_MINUTES}minutes"], "")
        say(f"{', '.join(waiting)}: looked at again in {WAIT_MINUTES} minutes")


def _tell(view: View, say: Say) -> None:
    """Announce the end of the run, well or not, where the cluster file asks for it."""
    latest = view.submissions[-1]
    waiting = any(view.decisions.last(key).get("action") == WAIT for key in view.open)
    if waiting or not only_held(view):
        return
    stopped = sorted(key for key in view.decisions.stopped() if key in view.open)
    outcome = {
        "run": view.plan.run, "submission": latest.number, "state": "stopped" if view.open else "complete",
        "tasks": len(view.plan.tasks), "open": len(view.open), "stopped": stopped,
    }  # fmt: skip
    said = announce(latest.folder.parent, validate(ClusterFile, latest.cluster, where=latest.folder), outcome)
    if said is not None:
        say(said)


def only_held(view: View) -> bool:
    """Whether all that is left in the queue, if anything, waits for what nobody is going to make."""
    going: set[str] = set()
    for key, task in view.open.items():  # upstream first
        needed = {other.key for other in view.plan.upstream(task) if other.key in view.open}
        if (key in view.live and needed <= going) or view.undecided(key):
            going.add(key)
    return not going


def _submit_advance(view: View, script: Path, options: list[str], after: str) -> None:
    job_id = sbatch(script, options)
    view.submissions[-1].record_job("advance", ADVANCE, 0, job_id, (), after)


def _is_due(view: View) -> bool:
    """Whether an advance is already queued for later."""
    ids = [job_id for one in view.submissions for job_id in one.advance_ids()]
    jobs = [view.queue.get((job_id, -1)) for job_id in ids]
    return any(job is not None and job.state == "PENDING" and job.reason == "BeginTime" for job in jobs)
