"""Which element of which job is a task's newest, and what it left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmill.core.disk import refusal
from prefmill.core.places import STATUS
from prefmill.pipeline.attempts import idle_attempts, progressed, read_attempts
from prefmill.pipeline.task_status import read_status
from prefmill.slurm import jobs as slurm
from prefmill.slurm.failures import Evidence
from prefmill.slurm.jobs import Element, JobState
from prefmill.slurm.submission import ArrayFile, JobRecord, Submission

_LOG_BYTES = 20_000
_CLOCKS_DIFFER_SECONDS = 2.0
_END_STATES = ("complete", "failed")  # who is terminated by a preemption may be queued again


@dataclass(frozen=True)
class Tried:
    """The newest element of a task: where it was submitted, in which job, under which index; `sent` unless it waits
    for its submission.
    """

    submission: Submission
    array: ArrayFile
    job: JobRecord
    index: int
    sent: bool = True

    @property
    def element(self) -> Element:
        """As Slurm knows it."""
        return (self.job.job_id, self.index)

    @property
    def name(self) -> str:
        """As Slurm's commands name it."""
        return slurm.element_name(self.element)

    @property
    def slurm_log(self) -> Path:
        """What the job printed before the task had a log of its own, and what Slurm said of it."""
        logs = self.submission.workspace / "logs" / self.submission.run
        return logs / self.array.stage / "slurm" / f"{self.name}.out"


def newest(submissions: Sequence[Submission]) -> dict[str, Tried]:
    """The newest element of every task that has ever had one."""
    jobs = [(job, one) for one in submissions for job in one.jobs() if job.kind == "array"]
    arrays = {(one.number, job.stage, job.chunk): one for job, one in jobs}
    read = {key: one.array(*key[1:]) for key, one in arrays.items()}
    found: dict[str, Tried] = {}
    for job, submission in sorted(jobs, key=lambda pair: pair[0].time):
        array = read[submission.number, job.stage, job.chunk]
        for index in job.indices:
            found[f"{job.stage}:{array.tasks[index]}"] = Tried(submission, array, job, index)
    return found


def unsent(submissions: Sequence[Submission]) -> dict[str, Tried]:
    """The tasks whose newest submission was to submit them and has not, as far as it noted."""
    found: dict[str, Tried] = {}
    for one in submissions:
        sent = {(job.stage, job.chunk, index) for job in one.jobs() for index in job.indices}
        for stage, chunk, indices in one.wanted:
            array = one.array(stage, chunk)
            nothing = JobRecord("array", stage, chunk, (), "", 0.0, job_id=f"unsent-{one.number}")
            for index in indices:
                key = f"{stage}:{array.tasks[index]}"
                # A newer submission counts for its tasks, whether it has sent them or not.
                found.pop(key, None)
                if (stage, chunk, index) not in sent:
                    found[key] = Tried(one, array, nothing, index, sent=False)
    return found


def elements_of(submission: Submission) -> Iterator[tuple[Element, str]]:
    """Every element a submission has ever had, whether another has taken its place or not, and its task's key."""
    for job in submission.jobs():
        tasks = submission.array(job.stage, job.chunk).tasks if job.kind == "array" else ()
        yield from (((job.job_id, index), f"{job.stage}:{tasks[index]}") for index in job.indices)


def collect_evidence(tried: Tried, logs: Path, account: JobState | None, queued: JobState | None) -> Evidence:
    """What is known of a task's newest element, now that it has ended; `logs` are the task's."""
    started = next((job.started for job in (account, queued) if job is not None and job.started), None)
    status = read_status(logs)
    if not _is_of(status, tried.element) or _is_of_earlier_start(logs, started):
        status = {}
    further, idle = _progress(logs, status)
    log = _own_part(logs.parent / f"{logs.name}.log", tried.name) + "\n" + read_tail(tried.slurm_log)
    return Evidence(status, log, account, queued, further, idle)


def left_end_record(tried: Tried) -> bool:
    """Whether this element's task has written how it ended; one that was requeued goes on."""
    logs = tried.submission.workspace / "logs" / tried.submission.run / tried.job.stage
    status = read_status(logs / tried.array.tasks[tried.index])
    return _is_of(status, tried.element) and status.get("state") in _END_STATES


def has_room(folder: Path) -> bool:
    """Whether something can be written there again: room for 64 MiB, or a twentieth of a smaller disk."""
    while not folder.is_dir():
        folder = folder.parent
    disk = os.statvfs(folder)
    wanted = min(64 << 20, disk.f_blocks * disk.f_frsize // 20)
    if disk.f_bavail * disk.f_frsize < wanted:
        return False
    return refusal(folder, max(wanted, 1)) is None


def _is_of(status: Mapping[str, Any], element: Element) -> bool:
    """Whether a status was written by this element, and not by another job."""
    job = status.get("job", {})
    return (job.get("array_job_id"), job.get("array_task_id")) == (element[0], str(element[1]))


def _is_of_earlier_start(logs: Path, started: float | None) -> bool:
    """Whether the status was written before Slurm last started its element: by the file's time, not by the node's.

    A node whose clock is minutes behind would otherwise seem to have written it before it began.
    """
    return started is not None and (logs / STATUS).stat().st_mtime < started - _CLOCKS_DIFFER_SECONDS


def _progress(logs: Path, status: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether the attempt got further, and how many in a row did not, this one included."""
    idle = idle_attempts(logs)
    if status.get("state") == "running" and "attempt" in status:  # it ended without a word: nobody has judged it yet
        further = progressed(logs, status["attempt"])
        return further, 0 if further else idle + 1
    ended = read_attempts(logs)
    return bool(status and ended and ended[-1]["progressed"]), idle if status else idle + 1


def _own_part(path: Path, name: str) -> str:
    """The end of a task's log, from where this very job began to write."""
    text = read_tail(path)
    # Where a long log has pushed our mark out of view and no other is in it, all of it is ours.
    begin = text.rfind(f" in job {name} on ")
    return text[begin:] if begin >= 0 or text.count("\n--- ") == 0 else ""


def read_tail(path: Path) -> str:
    """The end of a log; empty where there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _LOG_BYTES))
            return stream.read().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
