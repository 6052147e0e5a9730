"""What a task, and the run it is part of, say of themselves while they are at work: a status file and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from prefmill.core.errors import PipelineError
from prefmill.core.files import lacking, read_record, write_json
from prefmill.core.places import MANIFEST, STATUS, WANTED_AGAIN
from prefmill.pipeline import attempts

if TYPE_CHECKING:  # `prefmill status` reads these files, and no configuration
    from prefmill.pipeline.plan import PlannedTask

INTERRUPTED = "interrupted"
_ATTEMPT = {"job": dict, "node": str, "started": Real, "steps_before": int, "done_before": int}
_FRAME = re.compile(r'^  File ".*\n(?:    .*\n)*', re.MULTILINE)


def write_status(task: PlannedTask, state: str, **details: Any) -> None:
    """Record the state of this attempt in the task's logs, for `prefmill status`."""
    record = {"state": state, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    record |= {"job": attempts.this_job(), **details}
    write_json(task.logs / STATUS, record)


def read_status(logs: Path) -> dict[str, Any]:
    """The status last recorded in a task's logs; empty where there is none, or what is there is no such record."""
    status = read_record(logs / STATUS, state=str)
    return status if "attempt" not in status or not lacking(status["attempt"], _ATTEMPT) else {}


def in_short(error: str) -> str:
    """An error without the frames of its traceback, which the task's log has."""
    return _FRAME.split(error)[-1].strip() if error.startswith("Traceback ") else error


def manifest_fault(output: Path) -> str | None:
    """What is wrong with the manifest there, which is then no evidence: "" for a whole one, None where there is none.

    Its content is not looked at: that form takes a quarter of a second to import, and `status` answers at once.
    """
    path = output / MANIFEST
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"its manifest cannot be read: {path} ({error.strerror})"
    except ValueError:
        found = None
    if isinstance(found, dict) and "content_digest" in found:
        return ""
    return f"unreadable manifest: {path}; to do: `prefmill run`, or `rerun` of a submitted run, makes it again"


def is_finished(output: Path, logs: Path) -> bool:
    """Whether finished output is there, wanted as it is, and nothing is being made in its place.

    A run without logs, as another machine made it, counts too.
    """
    kept = manifest_fault(output) == "" and not (logs / WANTED_AGAIN).exists()
    return kept and bool(read_status(logs).get("state", "complete") == "complete")


def is_running(logs: Path) -> bool:
    """Whether a live process holds the task with these logs; its lock is released however that process ends."""
    # Shared, so that two who look at the same time do not take each other for the worker.
    return _is_held(logs / "lock", fcntl.LOCK_SH)


@contextlib.contextmanager
def at_work(workspace: Path, run: str) -> Iterator[None]:
    """Have `is_at_work` say so until the block ends or this process does, between two tasks too."""
    with _run_lock(workspace, run).open("a+b") as stream:
        _lock(stream, fcntl.LOCK_SH)
        yield


def is_at_work(workspace: Path, run: str) -> bool:
    """Whether a `prefmill run` on this machine goes through the tasks of this run."""
    return _is_held(_run_lock(workspace, run), fcntl.LOCK_EX)


def refuse_beside_run(workspace: Path, run: str) -> None:
    """Raise PipelineError where a `prefmill run` is at work: a job would hold its GPUs, and find its task taken."""
    if is_at_work(workspace, run):
        raise PipelineError(
            "a `prefmill run` on this machine is at work on this run", where=_run_lock(workspace, run),
            fix="wait for it, or end it with Ctrl-C: what it has finished and saved is kept",
        )  # fmt: skip


@contextlib.contextmanager
def held(lock: Path, patience_seconds: float, refusal: PipelineError) -> Iterator[None]:
    """Hold a lock alone; raises `refusal` where another process keeps it for longer than that."""
    deadline = time.monotonic() + patience_seconds
    with lock.open("a+b") as stream:
        while True:
            try:
                # Asked again and again, as flock itself knows no time limit.
                _lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise refusal from None
                time.sleep(0.1)
        yield


def _is_held(lock: Path, operation: int) -> bool:
    """Whether a process holds the lock so that `operation` would have to wait."""
    try:
        with lock.open("r+b" if os.access(lock, os.W_OK) else "rb") as stream:
            _lock(stream, operation | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lock(stream: IO[bytes], operation: int) -> None:
    """Take the lock; raises BlockingIOError where it is another's, PipelineError where the disk has no locks."""
    try:
        fcntl.flock(stream, operation)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise PipelineError(
                "this disk has no file locks", where=stream.name, got=error.strerror,
                fix="have it mounted with them (Lustre: -o flock), or set `workspace` to another disk",
            ) from None  # fmt: skip
        # NFS shows an exclusive lock to those alone who may write: who looks at another's run cannot know.
        if error.errno != errno.EBADF:
            raise


def _run_lock(workspace: Path, run: str) -> Path:
    return workspace / "logs" / run / "run.lock"
