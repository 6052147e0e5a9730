"""The record of a submission: what was asked for, the code as it was, every array and every job that came of it."""

from __future__ import annotations

import json
import os
import pwd
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from prefmill.core.errors import PipelineError
from prefmill.core.files import append_row, appended, as_form, read_record, write_json
from prefmill.pipeline.decisions import submissions_folder

T = TypeVar("T", bound="Intent")
ADVANCE = "advance"
RECORD, JOBS, INTENTS, CODE, ARRAYS = "submission.json", "jobs.jsonl", "intents.jsonl", "code", "arrays"
Kind = Literal["array", "advance"]
_SUBMIT_AGAIN = "end its jobs (in `squeue --me` they begin with the run's name), delete the folder {}, and submit again"


@dataclass(frozen=True)
class Intent:
    """An sbatch call about to be made, under a name that no other job has.

    `indices` are the array's elements it runs, `dependency` what it waits for.
    """

    kind: Kind
    stage: str
    chunk: int
    indices: tuple[int, ...]
    dependency: str
    time: float
    name: str = ""  # unknown of a job in a submission of an earlier version


@dataclass(frozen=True, kw_only=True)
class JobRecord(Intent):
    """A call that was made, and the job that came of it."""

    job_id: str


@dataclass(frozen=True)
class ArrayFile:
    """A chunk of a stage's tasks; a task's place in `tasks` is its array index."""

    path: Path
    stage: str
    chunk: int
    tasks: tuple[str, ...]
    resources: dict[str, Any]

    @property
    def script(self) -> Path:
        """What sbatch is given, byte for byte."""
        return self.path.with_suffix(".sbatch")

    @property
    def submission(self) -> Path:
        """The folder of the submission this belongs to."""
        return self.path.parents[1]


@dataclass(frozen=True)
class Submission:
    """A submission on disk: written once, before its first job; only `intents.jsonl` and `jobs.jsonl` grow.

    `wanted`: the elements to submit, as stage, chunk and indices. `noted`: what they read from outside, by its path.
    """

    folder: Path
    number: int
    run: str
    workspace: Path
    pipeline: dict[str, Any]
    source: str
    cluster: dict[str, Any]
    code: str
    owner: str = ""  # unknown in a submission of an earlier version
    wanted: tuple[tuple[str, int, tuple[int, ...]], ...] = ()
    noted: Mapping[str, str] = field(default_factory=dict)

    @property
    def code_folder(self) -> Path:
        """The code its jobs run, as it was when it was submitted."""
        return self.folder / CODE

    def arrays(self) -> list[ArrayFile]:
        """Every chunk of every stage."""
        return [read_array(path) for path in sorted((self.folder / ARRAYS).glob("*.json"))]

    def array(self, stage: str, chunk: int) -> ArrayFile:
        """Chunk `chunk` of `stage`."""
        return read_array(array_path(self.folder, stage, chunk))

    def jobs(self) -> list[JobRecord]:
        """Every job submitted so far, oldest first; a line torn by a crash is left out."""
        return [_as_call(row, JobRecord, where) for where, row in appended(self.folder / JOBS)]

    def advance_ids(self) -> list[str]:
        """The jobs that look after this submission's others."""
        return [job.job_id for job in self.jobs() if job.kind == "advance"]

    def record_intent(self, intent: Intent) -> None:
        """Note a call that is about to be made; on disk before this returns."""
        append_row(self.folder / INTENTS, vars(intent))

    def drop_intent(self, intent: Intent) -> None:
        """Note that no job came of a call."""
        # Added and not taken out: a file that only grows loses one line at most when a process is killed.
        append_row(self.folder / INTENTS, {"dropped": intent.name})

    def open_intents(self) -> list[Intent]:
        """The calls of which it is not noted what came of them."""
        rows = list(appended(self.folder / INTENTS))
        dropped = {where: row["dropped"] for where, row in rows if isinstance(row, dict) and row.keys() == {"dropped"}}
        # A job's own record settles its call: between the two files no kill can leave a call half settled.
        settled = {*dropped.values(), *(job.name for job in self.jobs())}
        found = [_as_call(row, Intent, where) for where, row in rows if where not in dropped]
        return [intent for intent in found if intent.name not in settled]

    def record_job(self, intent: Intent, job_id: str) -> JobRecord:
        """Note the job that came of a call; on disk before this returns."""
        values = vars(intent) | {"job_id": job_id, "time": time.time()}
        append_row(self.folder / JOBS, values)
        return JobRecord(**values)


def _as_call(row: Any, form: type[T], where: str) -> T:
    # Never passed over: it may tell of a job that lives, and whose tasks would be submitted a second time.
    return as_form(row, form, where, "end its job, if `squeue --me` shows it, and delete that line")


def array_path(submission: Path, stage: str, chunk: int) -> Path:
    """Where chunk `chunk` of `stage` is described."""
    return submission / ARRAYS / f"{stage}.{chunk}.json"


def next_number(workspace: Path, run: str) -> int:
    """The number the next submission of this run gets."""
    folder = submissions_folder(workspace, run)
    return 1 + max((int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()), default=0)


def claim_folder(workspace: Path, run: str) -> tuple[int, Path]:
    """The next number and its new, empty folder; of two that ask at once each gets its own."""
    while True:
        number = next_number(workspace, run)
        folder = submissions_folder(workspace, run) / f"{number:04d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Of two processes mkdir succeeds for one alone; looking first would leave time for both.
            folder.mkdir()
        except FileExistsError:
            continue
        (folder / ARRAYS).mkdir()
        return number, folder


def write_submission(submission: Submission) -> None:
    """Write the record that makes the folder a submission: last, when code and arrays are there."""
    values = {key: value for key, value in vars(submission).items() if key != "folder"}
    write_json(submission.folder / RECORD, values | {"workspace": str(submission.workspace)})


def read_submission(folder: Path) -> Submission:
    """The submission in `folder`; raises PipelineError where there is none."""
    record = folder / RECORD
    if not record.is_file():
        raise PipelineError(
            "no submission here", where=folder, expected=f"a {RECORD}", fix="submit the pipeline with `prefmill submit`"
        )
    # Submissions of earlier versions do not say what they wanted: none of their tasks counts as unsent.
    values = {"folder": folder, **read_record(record)}
    return as_form(values, Submission, record, _SUBMIT_AGAIN.format(folder))


def submissions(workspace: Path, run: str) -> list[Submission]:
    """Every submission of a run, oldest first; one that was interrupted before its first job is left out."""
    folders = sorted(submissions_folder(workspace, run).glob("[0-9]*"))
    return [read_submission(folder) for folder in folders if (folder / RECORD).is_file()]


def require_owner(found: Sequence[Submission]) -> None:
    """Refuse to act on somebody else's run: their jobs are not ours to submit, to end or even to see."""
    owner = next((one.owner for one in reversed(found) if one.owner), "")
    if owner and owner != user_name():
        raise PipelineError(
            "this run belongs to another user", where=found[-1].folder, got=user_name(), expected=owner,
            fix="`prefmill status` and `prefmill logs` work for everybody; for jobs of your own give another run=NAME",
        )  # fmt: skip


def user_name() -> str:
    """Who this is, as Slurm shows it."""
    try:
        # Not $USER, which any shell can set: Slurm goes by the user id.
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container without this user
        return str(os.geteuid())


def write_array(array: ArrayFile) -> None:
    """Write a chunk's description."""
    values = {key: value for key, value in vars(array).items() if key != "path"}
    # Not atomic, and it need not be: without the record, which comes last, nobody reads this folder.
    array.path.write_text(json.dumps(values), encoding="utf-8")


def read_array(path: Path) -> ArrayFile:
    """The chunk described in `path`."""
    return as_form({"path": path, **read_record(path)}, ArrayFile, path, _SUBMIT_AGAIN.format(path.parents[1]))


def script_of(submission: Submission) -> Path:
    """The follow-up job's script; absent where the cluster file wants none."""
    return submission.folder / ARRAYS / f"{ADVANCE}.sbatch"
