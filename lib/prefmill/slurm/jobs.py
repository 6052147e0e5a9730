"""What Slurm says of jobs, read from the few outputs that are the same in every version, and why one is pending.

A question Slurm does not answer gives None, which is never the same as "no such job".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Element = tuple[str, int]  # an array's job id and the index; -1 for a job that is no array

LIVE_STATES = {
    # A job that is COMPLETING may still have processes that write.
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_FED", "RESIZING",
    "SIGNALING", "STAGE_OUT", "STOPPED", "POWER_UP_NODE", "EXPEDITING",
}  # fmt: skip
UNKNOWN = "UNKNOWN"
_HELD_BY_NAME = {"REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_QUEUE_FIELDS = "%F|%K|%A|%T|%r|%N|%S|%u|%P|%E"
_ACCOUNT_FIELDS = "JobID,State,ExitCode,NodeList,Start,ReqMem,MaxRSS"
_ARRAY_ID = re.compile(r"(\d+)(?:_(?:(\d+)|\[([^]%]*)(?:%\d+)?\]?.*))?")
_DEPENDENCY = re.compile(r"(\d+)(_\d+|_\*)?(?:\+\d+)?(?:\((\w+)\))?")
_SHOWN_JOB = re.compile(r"^JobId=(\d+) (?:ArrayJobId=(\d+) .*?)?JobName=(\S+)", re.M)
_SECONDS = 60.0
_CLOCKS_DIFFER_SECONDS = 600.0
_IDS_AT_ONCE = 500
_NO_SUCH_JOB = "Invalid job id specified"
# What a shell sets for a person: SQUEUE_PARTITION hides jobs, SCANCEL_INTERACTIVE waits for a yes, and SBATCH_...
# would win over a script's own options.
_PERSONAL = ("SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_", "SCANCEL_", "SBATCH_")
# Where Slurm is and what it speaks. All other SLURM_ variables are those of the job in which a command is given, and
# sbatch hands them on: a job had its submitter's memory, GPUs and array element.
_OF_SLURM = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}


@dataclass(frozen=True)
class JobState:
    """One element as squeue or sacct shows it; `dependency` are the jobs it still waits for, as squeue writes them.

    `memory_gb` is what the accounting says it had asked for, over all its nodes, and `peak_gb` what the largest of
    its steps' tasks held; `started` is in seconds since the epoch, and of a pending job when it may start.
    """

    state: str
    reason: str = ""
    exit_code: int = 0
    signal: int = 0
    node: str = ""
    dependency: str = ""
    raw_id: str = ""
    memory_gb: float | None = None
    peak_gb: float | None = None
    started: float | None = None
    user: str = ""
    partition: str = ""

    @property
    def live(self) -> bool:
        """Whether it is queued or running; an unknown state is neither alive nor ended well."""
        return self.state in LIVE_STATES

    @property
    def held_after_launch(self) -> bool:
        """Whether its node could not launch it, so that Slurm holds it: it is PENDING, and never starts by itself."""
        return self.state == "PENDING" and "requeued held" in self.reason


def queue(job_ids: Sequence[str], states: str = "all") -> dict[Element, JobState] | None:
    """Every element of these jobs that slurmctld shows, ended ones too; None when it does not answer.

    What is missing here may still run: a controller can answer partly, and some show nobody the jobs of others.
    """
    found: dict[Element, JobState] = {}
    for ids in _batches(list(dict.fromkeys(job_ids))):
        text = ask(["squeue", "-h", "-r", "-t", states, "-j", ids, "-o", _QUEUE_FIELDS])
        if text is None:
            return None
        found |= dict(_queue_rows(text))
    return found


def accounting(job_ids: Sequence[str]) -> dict[Element, JobState] | None:
    """The last record of every element of these jobs in the accounting; None where there is no accounting."""
    found: dict[Element, JobState] = {}
    for ids in _batches(job_ids):
        # Without -D, so that of a job that was requeued only its last start is shown.
        text = ask(["sacct", "-nP", "-j", ids, "-o", _ACCOUNT_FIELDS])
        if text is None:
            return None
        found |= dict(_account_rows(text))
    return found


def named(names: Sequence[str], since: float) -> dict[str, list[str]] | None:
    """The ids of the jobs with these names, by squeue, sacct or scontrol; None where squeue or scontrol do not answer.

    A name, as sacct keeps a job's comment only where that is configured. An empty squeue alone is no evidence.
    """
    found: dict[str, list[str]] = {}
    for batch in _batches(names):
        queued = ask(["squeue", "-h", "-t", "all", "--name", batch, "-o", "%j|%F"])
        if queued is None:
            return None
        # Not told when to begin, sacct looks for a name among the jobs of today alone. In seconds since the epoch:
        # an hour comes twice in the night in which clocks are set back.
        begin = f"uts{since - _CLOCKS_DIFFER_SECONDS:.0f}"
        ended = ask(["sacct", "-nXP", "--name", batch, "-S", begin, "-o", "JobName,JobID"]) or ""
        for name, _, job_id in (line.partition("|") for line in [*queued.splitlines(), *ended.splitlines()]):
            job = job_id.partition("_")[0]
            if name in names and job.isdigit() and job not in found.setdefault(name, []):
                found[name].append(job)
    if set(names) <= found.keys():
        return found
    # Asked last: it lists the jobs of everybody. -a, as it leaves out those in hidden partitions.
    shown = ask(["scontrol", "-a", "-o", "show", "job"])
    # Here every element of an array has an id of its own; Slurm's other commands name them by the array's.
    more: dict[str, dict[str, None]] = {}
    for job, array, name in _SHOWN_JOB.findall(shown or ""):
        more.setdefault(name, {})[array or job] = None
    others = {name: list(more[name]) for name in names if name in more}
    return None if shown is None else {**others, **found}


def is_purged(name: str) -> bool:
    """Whether slurmctld says in words that it knows no such job or element, as it does MinJobAge after its end."""
    done = _call(["scontrol", "show", "job", name])
    # scontrol denies a job on stderr, but an element of an array that it knows on stdout, with exit code 0.
    return done is not None and (_NO_SUCH_JOB in done.stderr or f"Job {name} not found" in done.stdout)


def setting(name: str, default: int) -> int:
    """A number of Slurm's own configuration; `default` where Slurm does not say."""
    found = re.search(rf"^{name}\s*=\s*(\d+)", ask(["scontrol", "show", "config"]) or "", re.M)
    return int(found[1]) if found else default


def environment() -> dict[str, str]:
    """This process' environment for Slurm's commands: they answer the same for everybody, in a job too."""
    own = {
        key: value for key, value in os.environ.items()
        if not key.startswith((*_PERSONAL, "SLURM_")) or key in _OF_SLURM
    }  # fmt: skip
    # Times are otherwise local and name no zone, and the C library's part of an error is translated.
    return own | {"SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}


def element_name(element: Element) -> str:
    """How Slurm's commands name an element."""
    job, index = element
    return job if index < 0 else f"{job}_{index}"


def expand(text: str) -> list[Element]:
    """The elements that a job id such as `41`, `41_3` or `41_[0-3,7%2]` stands for."""
    match = _ARRAY_ID.fullmatch(text.strip())
    if match is None:
        return []
    job, single, spans = match.groups()
    if single is not None:
        return [(job, int(single))]
    return [(job, index) for index in _indices(spans)] if spans else [(job, -1)]


def clean_state(text: str) -> str:
    """A state without what some are followed by: `CANCELLED by 0`, `RUNNING+`; PENDING for all that are held."""
    words = text.split()
    state = words[0].rstrip("+") if words else UNKNOWN
    # Pending too: by a name of its own squeue tells who holds it, as of `scontrol requeuehold state=SpecialExit`.
    return "PENDING" if state in _HELD_BY_NAME else state


def waits_for(job: JobState) -> tuple[set[Element], bool]:
    """The elements a pending job still waits for (index -1 for a whole array), and whether one of them has failed."""
    found = _DEPENDENCY.findall(job.dependency)
    # A whole array is shown as 41_*, an element as 41_3.
    elements = {(job_id, int(index[1:]) if index[1:].isdigit() else -1) for job_id, index, _ in found}
    broken = job.reason == "DependencyNeverSatisfied" or any(state == "failed" for _, _, state in found)
    return elements, broken


def set_dependency(element: Element, dependency: str) -> bool:
    """Have a pending element wait for something else; "" for nothing. False where Slurm refuses."""
    name = element_name(element)
    return ask(["scontrol", "update", f"jobid={name}", f"dependency={dependency}"]) is not None


def cancel(elements: Sequence[Element]) -> bool:
    """End these elements; False where Slurm refuses."""
    names = [element_name(element) for element in elements]
    batches = [names[start : start + _IDS_AT_ONCE] for start in range(0, len(names), _IDS_AT_ONCE)]
    answers = [ask(["scancel", *batch]) for batch in batches]  # every one is tried
    return None not in answers


def ask(command: Sequence[str]) -> str | None:
    """What a command of Slurm prints; None where it is missing, fails or does not answer in a minute."""
    done = _call(command)
    if done is None:
        return None
    # squeue fails for a job that has been purged: it has nothing to say, but it answers.
    return done.stdout if done.returncode == 0 or _NO_SUCH_JOB in done.stderr else None


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment())
    except subprocess.TimeoutExpired:
        return None


def _batches(job_ids: Sequence[str]) -> Iterator[str]:
    for start in range(0, len(job_ids), _IDS_AT_ONCE):
        yield ",".join(job_ids[start : start + _IDS_AT_ONCE])


def _queue_rows(text: str) -> Iterator[tuple[Element, JobState]]:
    for line in _whole_lines(text, _QUEUE_FIELDS.count("|")):
        job, index, raw_id, state, reason, node, started, user, partition, dependency = line.split("|", 9)
        element = (job, int(index) if index.isdigit() else -1)
        yield (
            element,
            JobState(
                clean_state(state), reason, node=node, raw_id=raw_id, started=_seconds(started), user=user,
                partition=partition, dependency="" if dependency == "(null)" else dependency,
            ),
        )  # fmt: skip


def _whole_lines(text: str, separators: int) -> Iterator[str]:
    """Without a line that was cut off, as happens where a controller ends in the middle of its answer."""
    return (line for line in text.splitlines() if line.count("|") >= separators)


def _account_rows(text: str) -> Iterator[tuple[Element, JobState]]:
    """Of every job its own line; those of its steps, which follow it, say what it held."""
    lines = [line.split("|", 6) for line in _whole_lines(text, _ACCOUNT_FIELDS.count(","))]
    peaks: dict[str, float] = {}
    for job_id, *_, held in lines:
        owner, _, step = job_id.partition(".")
        if step:
            peaks[owner] = max(peaks.get(owner, 0.0), gigabytes(held) or 0.0)
    for job_id, state, exit_code, node, started, memory, _ in lines:
        if "." in job_id:
            continue
        code, _, number = exit_code.partition(":")
        job = JobState(
            clean_state(state), exit_code=int(code or 0), signal=int(number or 0),
            node="" if node == "None assigned" else node, memory_gb=gigabytes(memory), peak_gb=peaks.get(job_id),
            started=_seconds(started),
        )  # fmt: skip
        yield from ((element, job) for element in expand(job_id))


def _indices(spans: str) -> Iterator[int]:
    for span in spans.split(","):
        first, _, last = span.partition("-")
        last, _, step = last.partition(":")
        if first.isdigit():  # a long list is cut off with "..."
            yield from range(int(first), int(last if last.isdigit() else first) + 1, int(step or 1))


def _seconds(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def gigabytes(text: str) -> float | None:
    """`64000M`, `1.50T` or, from older versions, `4Gn`."""
    match = re.match(r"([\d.]+)([KMGTP])", text)
    return float(match[1]) * 1024.0 ** ("KMGTP".index(match[2]) - 2) if match and float(match[1]) else None


_HELD: Sequence[tuple[str, str]] = [
    ("requeued held", "its node could not launch it; to do: `prefmill advance`, or `scontrol release {name}`"),
    ("JobHeldUser|requeued in held state", "somebody holds it; to do: `scontrol release {name}`"),
    ("JobHeldAdmin", "an operator holds it; to do: ask the cluster's operators to release {name}"),
    (r"Invalid(Account|QOS)", "to do: correct account and qos in the cluster file, `prefmill cancel`, submit again"),
]
# A limit on one job is for its own request: no other job's end makes room for it.
_TOO_MUCH = (
    r"Max\w*Per(Job|Node)|QOSMin|Partition(Time|Node)Limit|BadConstraints|AccountNotAllowed|QOSNotAllowed",
    "it asks for more than is allowed; to do: lower its resources (`prefmill estimate` names the limit), "
    "`prefmill cancel`, submit again",
)
_QUEUED: Sequence[tuple[str, str]] = [
    ("MaxSubmit|MaxJobs|Grp|PerUser|PerAccount|JobArrayTaskLimit", "it starts when other jobs have ended"),
    (
        "ReqNodeNotAvail|DOWN|Partition(Down|Inactive)|NodeDown|Reservation",
        "waits for nodes that are down, drained or reserved: see `sinfo -R`",
    ),
]


def held(job: JobState, name: str) -> str:
    """Why Slurm never starts pending `job` by itself, and what to do; "" where it will."""
    # Of several partitions Slurm shows the reason of one: the job starts in another.
    rules = _HELD if "," in job.partition else [*_HELD, _TOO_MUCH]
    return _explained(rules, job.reason, name)


def why_queued(job: JobState) -> str:
    """What a pending job that starts by itself waits for; Slurm's own word for the common reasons."""
    if job.reason in ("None", "Dependency"):
        return "waits for others" * (job.reason != "None")
    return _explained(_QUEUED, job.reason) or job.reason


def _explained(rules: Sequence[tuple[str, str]], reason: str, name: str = "") -> str:
    said = next((text for pattern, text in rules if re.search(pattern, reason)), "")
    return said and f"{reason}: {said.format(name=name)}"
