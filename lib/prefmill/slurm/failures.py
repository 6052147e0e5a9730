"""Why a task's last attempt ended, judged by evidence, and what may be done about it.

Evidence counts in this order: the task's own status file, signatures in its log, sacct, squeue. A finished manifest
comes before all of it and is no failure. What nothing explains is UNKNOWN: never a success, never retried by itself.
"""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prefmill.core.files import digest_bytes
from prefmill.pipeline.attempts import MAX_IDLE_ATTEMPTS
from prefmill.slurm.jobs import JobState

# As sacct writes them, exit code and signal.
_CODES: Mapping[tuple[int, int], str] = {
    (0, 53): "Slurm could not open its log on that node: the folder is missing there, or not writable",
    (126, 0): "a program cannot be run on that node",
    (127, 0): "a program is missing on that node, such as the interpreter in the cluster file's `python`",
    (1, 0): "its shell or python broke off",
}


def why_no_task(job: JobState, log: str) -> str:
    """The words for the code of a job whose task did not begin, its node, and the last line of `log`."""
    code = _CODES.get((job.exit_code, job.signal), "")
    where = f" on {job.node}" * bool(job.node)
    # squeue alone knows no code; sacct may be some seconds late.
    how = f" with {job.exit_code}:{job.signal}" * bool(job.exit_code or job.signal)
    ended = f"its job ended{where}{how} before the task began"
    return ": ".join(part for part in (ended, code, last_words(log)) if part)


def last_words(log: str) -> str:
    """The last line that says something; an error of prefmill's own by its first."""
    lines = list(_lines(log))
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1][:200]


def _lines(log: str) -> Iterator[str]:
    for line in log.splitlines():
        # What the job itself prints at its start: where its log is, and where it runs.
        if line.strip() and not line.startswith("--- ") and ": see /" not in line:
            yield line.strip()


Kind = Literal[
    "preempted", "time_limit", "no_progress", "node", "gpu", "nccl", "host_memory", "gpu_memory", "disk", "killed",
    "refused", "bug", "launch", "early", "stale", "cancelled", "unknown",
]  # fmt: skip
MEMORY_FACTOR = 1.5
# How a reader's error begins where the input's maker is at fault: it has finished, or been made anew, since.
INPUT_ERRORS = (
    "no finished artifact here",
    "artifact is damaged",
    "artifact's content has changed",
    "unreadable manifest",
)


@dataclass(frozen=True)
class Policy:
    """How often a kind of failure is retried (None: as long as that leads on), and what to do after that."""

    retries: int | None
    todo: str
    excludes_node: bool = False


_OF_A_FULL_DISK = ("disk", "launch", "killed", "bug", "unknown")  # where Slurm or the task could not write why
AGAIN = "then `prefmill rerun {task}`"
POLICIES: Mapping[Kind, Policy] = {
    "preempted": Policy(None, f"submit it where it is not preempted, or lower save_steps, {AGAIN}"),
    "time_limit": Policy(None, f"raise its `time_limit_minutes`, or lower save_steps, {AGAIN}"),
    "no_progress": Policy(0, f"raise its `time_limit_minutes`, or lower save_steps, {AGAIN}"),
    "node": Policy(5, f"tell the cluster's operators which nodes failed, {AGAIN}", excludes_node=True),
    "gpu": Policy(3, f"tell the cluster's operators which nodes failed, {AGAIN}", excludes_node=True),
    "nccl": Policy(1, f"check the network settings (NCCL_* in the cluster file's `setup`), {AGAIN}"),
    "host_memory": Policy(4, f"raise memory_gb, or lower what the stage keeps in memory, {AGAIN}"),
    "gpu_memory": Policy(
        None, "lower per_device_train_batch_size or max_length, set activation_checkpointing or a higher ZeRO stage "
        "(`prefmill estimate` says what fits), then submit again",
    ),
    "disk": Policy(3, f"free space, raise the quota or see why the disk fails, {AGAIN}"),
    "killed": Policy(3, f"find out who kills it: its log and the node's, {AGAIN}"),
    "refused": Policy(0, "correct what the error names, then submit again"),
    "bug": Policy(2, "fix what the traceback shows, then submit again: queued jobs run the code as it was"),
    "launch": Policy(1, "see its Slurm log: python, the environment or a path is missing on that node"),
    "early": Policy(2, f"see why its input was not there, or not as it was made, {AGAIN}"),
    "stale": Policy(2, "see `prefmill why` for what differs: a file outside the pipeline may be changing"),
    "cancelled": Policy(0, "if it was not meant to be cancelled: `prefmill rerun {task}`"),
    "unknown": Policy(0, "see its log and `sacct`; if it should run again: `prefmill rerun {task}`"),
}  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What is known of one ended element; `status` and `log` are this very attempt's, empty where it left none.

    `progressed` says whether it got further than every attempt before, `idle` how many in a row, it included, did not.
    """

    status: Mapping[str, Any] = field(default_factory=dict)
    log: str = ""
    account: JobState | None = None
    queued: JobState | None = None
    progressed: bool = False
    idle: int = 0


@dataclass(frozen=True)
class Failure:
    """A class of failure, the evidence for it in words, and a signature by which the same failure is known again."""

    kind: Kind
    why: str
    source: str
    node: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Decision:
    """`retry` now, `wait` until the disk has room, or `stop` until somebody does what `todo` says."""

    action: Literal["retry", "wait", "stop"]
    why: str
    todo: str = ""
    memory_gb: float | None = None
    smaller: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RetryOptions:
    """What a retry could get: memory asked for so far and the partition's limit; whether the disk has room again.

    `smaller` are the keys with which a training would need less GPU memory; empty where nothing is left.
    """

    memory_gb: float | None = None
    memory_limit_gb: float | None = None
    has_room: bool = True
    smaller: Mapping[str, Any] = field(default_factory=dict)


def classify(evidence: Evidence) -> Failure:
    """The failure that the evidence shows."""
    judges = (
        _by_status, _by_log, _by_accounting, lambda seen: _by_state(seen, seen.queued, "squeue"), _by_traces
    )  # fmt: skip
    return next(failure for judge in judges if (failure := judge(evidence)) is not None)


def decide(
    task: str, failure: Failure, evidence: Evidence, past: Sequence[Mapping[str, Any]], means: RetryOptions
) -> Decision:
    """What to do; `past` are the decisions on this task since somebody last asked for it, oldest first."""
    policy = POLICIES[failure.kind]
    todo = policy.todo.format(task=task)
    charged = [row for row in past if row["kind"] == failure.kind and row["action"] == "retry"]
    # Not counted: every retry is smaller than the one before, until nothing is left that could be.
    if failure.kind == "gpu_memory":
        return _smaller(means.smaller, todo)
    if policy.retries is None:
        if evidence.progressed or evidence.idle < MAX_IDLE_ATTEMPTS:
            return Decision("retry", "goes on from its newest checkpoint")
        return Decision("stop", f"{MAX_IDLE_ATTEMPTS} times in a row it has not got further", todo)
    if failure.kind in _OF_A_FULL_DISK and not means.has_room:
        return Decision("wait", "the disk is still full", todo)
    if failure.signature and any(row.get("signature") == failure.signature for row in charged):
        return Decision("stop", "the same error twice", todo)
    if len(charged) >= policy.retries:
        told = f"retried {policy.retries} times" if policy.retries else "a retry would end the same way"
        return Decision("stop", told, todo)
    if failure.kind == "host_memory":
        return _with_more_memory(means, todo)
    return Decision("retry", f"retry {len(charged) + 1} of {policy.retries}")


def several(nodes: str) -> bool:
    """Whether Slurm's text names more nodes than one: n[1-2], a1,b7."""
    return bool(re.search(r"[\[,]", nodes))


def signature(error: str) -> str:
    """The same for the same error, whatever the addresses, numbers and times in it."""
    last = [line.strip() for line in error.strip().splitlines() if line.strip()][-3:]
    return digest_bytes(re.sub(r"0x[0-9a-f]+|\d+", "#", "\n".join(last)).encode())[:16]


def _smaller(keys: Mapping[str, Any], todo: str) -> Decision:
    if not keys:
        return Decision("stop", "nothing is left that would make it smaller by itself", todo)
    return Decision("retry", "with " + ", ".join(f"{key}={value}" for key, value in keys.items()), smaller=keys)


def _with_more_memory(means: RetryOptions, todo: str) -> Decision:
    if means.memory_gb is None:
        return Decision("stop", "how much memory it had is not known", todo)
    wanted = math.ceil(means.memory_gb * MEMORY_FACTOR * 4) / 4
    limit = means.memory_limit_gb
    if limit is not None and means.memory_gb >= limit:
        return Decision("stop", f"it had {means.memory_gb:g} GB, all that a node of its partition has", todo)
    given = wanted if limit is None else min(wanted, limit)
    return Decision("retry", f"with {given:g} GB instead of {means.memory_gb:g}", memory_gb=given)


_REFUSALS = {"ConfigError", "InputError", "ArtifactError", "PipelineError", "DivergedError", "PrefmillError"}
# The order matters: a rank that a broken GPU or full memory has ended gives all others NCCL errors.
_SIGNATURES: Sequence[tuple[Kind, re.Pattern[str]]] = [
    ("gpu", re.compile(r"NVRM: Xid|\bXid \(|uncorrectable (NVLink |ECC )?error|fallen off the bus|ECC error", re.I)),
    ("gpu_memory", re.compile(r"CUDA out of memory|torch\.(cuda\.)?OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED")),
    ("disk", re.compile(r"No space left on device|Disk quota exceeded|Stale file handle")),
    ("host_memory", re.compile(
        r"oom[-_ ]kill|exceeded (job |step )?memory limit|OUT_OF_MEMORY|Out Of Memory|^MemoryError|"
        r"Cannot allocate memory|can't allocate memory", re.M | re.I)),
    ("node", re.compile(r"DUE TO NODE FAILURE|Node failure on|NODE FAIL", re.I)),
    ("nccl", re.compile(r"NCCL error|ncclSystemError|ncclRemoteError|ncclInternalError|DistBackendError|"
                        r"Watchdog caught collective operation timeout")),
]  # fmt: skip
_NAMED_NODE = re.compile(r"Node failure on ([\w.-]+)|srun: error: ([\w.-]+): task")
_STATES: Mapping[str, Kind] = {
    "OUT_OF_MEMORY": "host_memory", "TIMEOUT": "time_limit", "DEADLINE": "time_limit", "NODE_FAIL": "node",
    "BOOT_FAIL": "node", "PREEMPTED": "preempted", "CANCELLED": "cancelled", "REVOKED": "cancelled",
}  # fmt: skip


def _by_status(evidence: Evidence) -> Failure | None:
    status = evidence.status
    state, kind, error = status.get("state"), status.get("kind"), str(status.get("error", ""))
    cancelled = any(job is not None and job.state == "CANCELLED" for job in (evidence.account, evidence.queued))
    # What had saved and waited to start again may have been cancelled since: its status is older than that.
    if state == "requeued" and not cancelled:
        return Failure("preempted", f"saved when warned by {status.get('signal')}", "status file")
    if state == "complete":
        return Failure("stale", "it had finished, but its output is not what is wanted now", "manifest")
    if state != "failed":
        return None
    causes: dict[Kind, bool] = {
        "no_progress": kind == "NoProgress",
        "preempted": kind == "NotRequeued",
        "disk": error.startswith(("cannot write:", "no access:", "the disk fails:")),
        "early": kind == "ArtifactError" and error.startswith(INPUT_ERRORS),
        "refused": kind in _REFUSALS,
    }
    return next((Failure(cause, _line(error), "status file") for cause, holds in causes.items() if holds), None)


def _by_log(evidence: Evidence) -> Failure | None:
    # The accounting comes after the log: without cgroups it calls a job that ran out of memory just FAILED.
    text = f"{evidence.status.get('error', '')}\n{evidence.log}"
    for kind, pattern in _SIGNATURES:
        match = pattern.search(text)
        if match:
            line = text[text.rfind("\n", 0, match.start()) + 1 :].splitlines()[0].strip()
            return Failure(kind, line[:200], "log", _node(evidence))
    return None


def _by_accounting(evidence: Evidence) -> Failure | None:
    job = evidence.account
    if job is not None and job.signal == signal.SIGKILL and (job.peak_gb or 0.0) > (job.memory_gb or math.inf):
        # Without cgroups Slurm kills what outgrows its memory, but calls the job FAILED.
        why = f"held {job.peak_gb:.2g} GB of {job.memory_gb:.2g} when it was killed"
        return Failure("host_memory", why, "sacct", _node(evidence))
    return _by_state(evidence, job, "sacct")


def _by_state(evidence: Evidence, job: JobState | None, source: str) -> Failure | None:
    if job is None or job.state not in _STATES:
        return None
    return Failure(_STATES[job.state], f"Slurm's state is {job.state}", source, _node(evidence))


def _by_traces(evidence: Evidence) -> Failure:
    """What is left: an error or a signal of the stage's own, a death without a word, a job that never began."""
    status, job = evidence.status, evidence.account or evidence.queued
    state, error = status.get("state"), str(status.get("error", ""))
    if state == "failed":
        if status.get("signal"):
            return Failure("killed", _line(error), "status file", _node(evidence))
        return Failure("bug", _line(error, -1), "status file", _node(evidence), signature(error))
    # A process that can still write changes this state: it was SIGKILL, or the node is lost.
    if state == "running":
        return Failure("killed", "it ended without a word", "status file", _node(evidence))
    if job is not None and job.state == "FAILED":
        return Failure("launch", why_no_task(job, evidence.log), "Slurm")
    shown = f"Slurm's state is {job.state}" if job else "Slurm has no record of its job"
    left = f"its status file says {state}" if state else "it left no status file"
    return Failure("unknown", f"{shown}, and {left}", "nothing")


def _node(evidence: Evidence) -> str:
    """The node that failed; of a job with several the one where it began, or all of them where nothing says which."""
    nodes = next((job.node for job in (evidence.account, evidence.queued) if job is not None and job.node), "")
    if nodes and not several(nodes):
        return nodes
    named = _NAMED_NODE.search(evidence.log)
    culprit = str(evidence.status.get("failed_on") or (named and (named[1] or named[2])) or "")
    short = culprit.partition(".")[0]  # Slurm's names are mostly without a domain
    return (culprit if culprit in nodes.split(",") else short) or nodes or str(evidence.status.get("host", ""))


def _line(error: str, number: int = 0) -> str:
    return (error.strip().splitlines() or ["(no error given)"])[number][:200]
