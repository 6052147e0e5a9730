"""`prefmill advance`: looks at ended tasks, resubmits those that can be retried, and re-points what waits for them.

It may run at any time, any number of times, by the run's follow-up job, by cron or by hand: two at once take turns,
and what one has done the next one sees. Submissions are never rewritten; their lists of jobs only grow.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefmill.core.config import validate
from prefmill.core.errors import PipelineError
from prefmill.core.terminal import Say, say_on
from prefmill.pipeline.decisions import AGAIN, CANCEL, RETRY, STOP, alone, show
from prefmill.pipeline.oom_backoff import read_smaller, write_smaller
from prefmill.pipeline.plan import PlannedTask
from prefmill.pipeline.task_status import is_running
from prefmill.slurm import jobs as slurm
from prefmill.slurm.cluster import ClusterFile, Resources
from prefmill.slurm.elements import Tried, collect_evidence, has_room
from prefmill.slurm.failures import POLICIES, Decision, Evidence, Failure, RetryOptions, classify, decide, several
from prefmill.slurm.follow_up import book, me, release_held
from prefmill.slurm.intents import Order, SbatchRefusedError, send_fitting
from prefmill.slurm.jobs import Element, JobState, element_name
from prefmill.slurm.notify import announce
from prefmill.slurm.partitions import Partition, offer_of, partitions
from prefmill.slurm.sightings import told
from prefmill.slurm.submission import JobRecord, require_owner, submissions
from prefmill.slurm.task_batches import TaskBatch, dependency
from prefmill.slurm.view import View, going_on, look, next_look
from prefmill.training.config import needs_less


@dataclass(frozen=True)
class Retry:
    """A task to submit again; `needs` are live elements it has to wait for, `row` what is noted of it."""

    task: PlannedTask
    tried: Tried
    needs: frozenset[Element]
    row: Mapping[str, object]
    memory_gb: float | None = None


def advance(workspace: Path, run: str, say: Say = say_on, again: Collection[str] = ()) -> View:
    """Retry failed tasks of `run`; those in `again` are submitted anew whatever was decided about them.

    Raises PipelineError where the run was never submitted or Slurm does not answer: then nothing is touched.
    """
    with alone(workspace, run):
        require_owner(submissions(workspace, run))
        # Under the lock, or two looks could each submit the same retry.
        view = look(workspace, run, say)
        # On disk before anything is sent: retries are counted from this line on, also by the next look.
        for key in sorted(again):
            tried = view.tried[key]
            view.decisions.record(key, tried.name, AGAIN, submission=tried.submission.number)
        for line in told(view.unknown, view.tried):
            say(line)
        release_held(view.tried, view.queue, view.decisions, say)
        retries = list(_judge(view, set(again), say))
        sent = _submit(view, retries, say)
        _repoint(view, say)
        _see_to_next_look(view, say)
        _tell(view, say)
        say(f"run {run}: {len(view.open)} tasks open, {len(view.live)} queued or running, {sent} resubmitted")
    return view


def _judge(view: View, again: Collection[str], say: Say) -> Iterable[Retry]:
    """What to submit again, upstream first; a task whose upstream is being made is told to wait for it."""
    ended = [
        task
        for key, task in view.open.items()
        if key in view.tried and key not in view.live and not view.undecided(key)
        # By a `prefmill run`, say: a job would find it taken.
        if key in again or not is_running(task.logs)
    ]
    ids = sorted({view.tried[task.key].job.job_id for task in ended if view.tried[task.key].sent})
    accounts = slurm.accounting(ids) if ids else {}
    limits = partitions() if ended else None
    going: set[str] = set()
    for task in ended:
        upstream = [other.key for other in view.plan.upstream(task) if other.key in view.open]
        if any(key not in view.live and key not in going for key in upstream):
            continue  # somebody has to fix what it reads first
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
    if asked or waits or not tried.sent:
        why = "asked for" if asked else "what it reads is being made" if waits else "not submitted before"
        return Retry(task, tried, frozenset(), {"kind": "again", "reason": why}, memory)
    evidence = collect_evidence(tried, task.logs, accounts.get(tried.element), view.queue.get(tried.element))
    failure = classify(evidence)
    means = _means(task, tried, evidence, memory, limits, read_smaller(task.logs, tried.submission.number))
    decision = decide(task.key, failure, evidence, past, means)
    row = _row(failure, decision)
    if decision.action == RETRY:
        return Retry(task, tried, frozenset(), row, decision.memory_gb or memory)
    # Looks come every few minutes: the same decision would be told and written at each of them.
    if before.get("action") != decision.action:
        view.decisions.record(task.key, tried.name, decision.action, submission=tried.submission.number, **row)
        say(show(task.key, {**row, "action": decision.action}))
    return None


def _row(failure: Failure, decision: Decision) -> dict[str, object]:
    # Where Slurm names several nodes and nothing tells which has failed, leaving out all would cost healthy ones.
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
    partition = offer_of(resources.partition, limits)
    further = needs_less(task.config.model_copy(update=shrunk))
    limit = partition.memory_gb if partition else None
    return RetryOptions(known, limit, has_room(task.output), {**shrunk, **further} if further else {})


def _submit(view: View, retries: Iterable[Retry], say: Say) -> int:
    """One sbatch call for all elements of a chunk that go the same way; what reads from them comes after."""
    groups: dict[tuple[str, int, int, float | None, bool], list[Retry]] = {}
    for retry in retries:
        # An array has one dependency: elements with nothing to wait for would be held back by the others'.
        waits = any(other.key in view.open for other in view.plan.upstream(retry.task))
        where = retry.tried.array
        key = (where.stage, retry.tried.submission.number, where.chunk, retry.memory_gb, waits)
        groups.setdefault(key, []).append(retry)
    return sum(_submit_group(view, group, say) for group in groups.values())


def _submit_group(view: View, group: list[Retry], say: Say) -> int:
    """Submit those whose inputs are being made, as far as there is room; returns how many."""
    ready = sorted((one for one in group if view.needs(one.task) is not None), key=lambda one: one.tried.index)
    try:
        record = send_fitting(_order(view, ready)) if ready else None
    except SbatchRefusedError as error:
        _stop(view, ready, error, say)
        return 0
    except PipelineError as error:  # no clear answer: the next look finds the job or submits it
        say(str(error))
        record = None
    sent = [one for one in ready if record is not None and one.tried.index in record.indices]
    for retry in sent:
        assert record is not None
        _note(view, retry, record, say)
    view.postponed |= {one.task.key for one in group} - {one.task.key for one in sent}
    if len(sent) < len(group):
        say(f"{group[0].task.stage.name}: {len(group) - len(sent)} tasks wait until more jobs may be submitted")
    return len(sent)


def _order(view: View, group: list[Retry]) -> Order:
    first = group[0].tried
    indices = tuple(retry.tried.index for retry in group)
    needs = {retry.tried.index: view.needs(retry.task) or frozenset() for retry in group}
    waits = dependency(TaskBatch(first.array.stage, first.array.chunk, indices, needs), _whole(view), {})
    resources = validate(Resources, first.array.resources)
    options = retry_options(resources, group[0].memory_gb, _excluded(view, resources, group))
    for retry in group:
        # Before sbatch is called: the job may start at once, and reads its keys from this file.
        if isinstance(keys := retry.row.get("smaller"), Mapping):
            write_smaller(retry.task.logs, first.submission.number, keys)
    where = (first.array.stage, first.array.chunk, first.array.script)
    return Order(first.submission, "array", *where, indices, options, waits, resources.max_concurrent)


def retry_options(resources: Resources, memory_gb: float | None, excluded: Sequence[str]) -> tuple[str, ...]:
    """Options of sbatch that a retry has beside its script's: more memory, and nodes to leave out."""
    # In MB, as sbatch takes no fractions.
    memory = [f"--mem={round(memory_gb * 1024)}M"] if memory_gb else []
    # An option of the command takes the place of the script's: the site's own nodes are named again.
    nodes = [str(resources.options["exclude"]), *excluded] if "exclude" in resources.options else excluded
    return (*memory, *([f"--exclude={','.join(nodes)}"] if excluded else []))


def _note(view: View, retry: Retry, record: JobRecord, say: Say) -> None:
    before = retry.tried
    tried = Tried(before.submission, before.array, record, before.index)
    if before.sent:
        noted = {**retry.row, "job": tried.name, "submission": before.submission.number}
        view.decisions.record(retry.task.key, before.name, RETRY, **noted)
    say(show(retry.task.key, {**retry.row, "action": RETRY}) + f"; now {tried.name}")
    view.tried[retry.task.key], view.live[retry.task.key] = tried, tried.element


def _stop(view: View, group: list[Retry], error: SbatchRefusedError, say: Say) -> None:
    """Slurm's refusal is final for these tasks; asked again it would say the same."""
    for retry in group:
        row = {"kind": "refused", "why": f"Slurm refuses its job: {error.details['got']}", "source": "sbatch",
               "reason": "it would be refused again", "todo": error.details["fix"]}  # fmt: skip
        tried = retry.tried
        view.decisions.record(retry.task.key, tried.name, STOP, submission=tried.submission.number, **row)
        say(show(retry.task.key, {**row, "action": STOP}))


def _excluded(view: View, resources: Resources, group: list[Retry]) -> list[str]:
    """Nodes not to use, these failures' own among them; at most half of the partition's, the latest."""
    own = [str(retry.row["exclude"]) for retry in group if retry.row.get("exclude")]
    nodes = list(dict.fromkeys([*own, *view.decisions.excluded_nodes(time.time())]))
    partition = offer_of(resources.partition, partitions() or {}) if nodes else None
    return nodes[: (partition.nodes if partition else 2) // 2]


def _whole(view: View) -> dict[str, tuple[int, ...]]:
    return {job.job_id: job.indices for one in view.submissions for job in one.jobs() if job.kind == "array"}


def _repoint(view: View, say: Say) -> None:
    """Have every pending element wait for the elements that now make what it reads."""
    whole, going = _whole(view), going_on(view)
    stuck = {element[0] for key, element in view.live.items() if key not in going}
    for key, element in view.live.items():
        job = view.queue.get(element)
        wanted = view.needs(view.open[key]) if job is not None and job.state == "PENDING" else None
        if job is None or wanted is None:
            continue
        current, broken = slurm.waits_for(job)
        # An array has one dependency: elements wait for jobs that they do not need, which may never run.
        needless = {job_id for job_id, _ in current} - {job_id for job_id, _ in wanted}
        frees = key in going and bool(needless & stuck)
        if not broken and not frees and all(item in current or (item[0], -1) in current for item in wanted):
            continue
        text = dependency(TaskBatch("", 0, (element[1],), {element[1]: wanted}), whole, {}) if wanted else ""
        text = text.replace("aftercorr:", "afterok:")  # of a single element they say the same
        done = slurm.set_dependency(element, text)
        say(f"{key} ({element_name(element)}) {'now waits' if done else 'could not be made to wait'} for {text or '-'}")


def _see_to_next_look(view: View, say: Say) -> None:
    """Have the follow-up job look again; where this is that job, it does so itself."""
    wait = next_look(view)
    if wait is None or me() in [job_id for one in view.submissions for job_id in one.advance_ids()]:
        return
    if said := book(view.submissions, wait):
        say(said)


def _tell(view: View, say: Say) -> None:
    """Announce the end of the run, well or not, where the cluster file asks for it."""
    latest = view.submissions[-1]
    if next_look(view) is not None:
        return
    stopped = sorted(key for key in view.decisions.stopped() if key in view.open)
    outcome = {
        "run": view.plan.run, "submission": latest.number, "state": "stopped" if view.open else "complete",
        "tasks": len(view.plan.tasks), "open": len(view.open), "stopped": stopped,
    }  # fmt: skip
    said = announce(latest.folder.parent, validate(ClusterFile, latest.cluster, where=latest.folder), outcome)
    if said is not None:
        say(said)
