"""Runs one task, the same way whoever started it: check inputs, resume or start over, run, publish."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefmill.core.errors import AttemptError, PipelineError, PrefmillError, explain_os_error, explained
from prefmill.core.files import read_record, write_json, write_record
from prefmill.core.graceful_stop import Stopped, clear_request
from prefmill.core.places import MANIFEST, RUN_RECORD, STARTED, STATUS, WANTED_AGAIN, WORK
from prefmill.core.revisions import models_changed, note_models
from prefmill.core.stage import Metrics, Stage, Task
from prefmill.distributed.devices import claim_device
from prefmill.distributed.launchers import TrainerKeys, refuse_settings_of_accelerate
from prefmill.pipeline import attempts
from prefmill.pipeline.checked_plan import require_asked
from prefmill.pipeline.oom_backoff import SMALLER
from prefmill.pipeline.plan import PlannedTask
from prefmill.pipeline.state import fingerprints, inspect_task, provenance, read_inputs
from prefmill.pipeline.task_status import INTERRUPTED, held, read_status, write_status
from prefmill.store.artifacts import publish, remaking, superseded
from prefmill.store.stamps import check_content

EXIT_USER_ERROR, EXIT_BUG = 2, 1
_LOCK_PATIENCE_SECONDS = 15.0


def execute(
    task: PlannedTask, force: bool = False, run: Callable[[Task], Metrics] | None = None, noted: Mapping[str, str] = {}
) -> None:
    """Bring `task` to completion in this process; nothing happens when its output is up to date.

    `run` takes the place of the stage's own, to have it run in other processes; `noted` is as in `Submission`. Resumes
    an interrupted attempt at the same content. Finished output of any other stays in its place until the new one is
    published. Raises PrefmillError for what the user can fix; the status file in the task's logs then says the same.
    """
    # The lock first: a second worker must not write its status over that of the one at work.
    with explained(task.output), locked(task), _reported(task):
        inputs = read_inputs(task)
        if not force and inspect_task(task).freshness == "complete":
            keep_finished(task)
            return
        for artifact in (item for items in inputs.values() for item in items):
            # Before any work: a flipped bit in an input would otherwise be trained on.
            check_content(artifact)
        origin = provenance(task, inputs, noted)  # before what was begun on other content is dropped
        making = _prepare(task, origin.identity, force)
        started = time.time()
        context = Task(task.run, task.stage.name, task.name, task.values, task.sizes, inputs, making, task.logs)
        metrics = run(context) if run else import_and_run(task.stage, task.config, context)
        publish(making, task.stage.writes, origin, metrics)
        # After the manifest, as times and hosts are no part of the content.
        write_json(making / RUN_RECORD, _run_record(started))
        # A kill before this line leaves scratch in a finished folder; the next look at the task removes it.
        _clear_work(making)
        if making != task.output:
            # Only now, and by rename: a rerun that fails leaves the old output where it was.
            put_in_place(making, task.output)
        # Last: a kill before this makes it once more, where the other order would make nothing.
        (task.logs / WANTED_AGAIN).unlink(missing_ok=True)


def import_and_run(stage: Stage[Any], config: Any, task: Task) -> Metrics:
    """The stage's own work, its slow imports first."""
    if isinstance(config, TrainerKeys):
        refuse_settings_of_accelerate(config, os.environ)
    import_now(stage.preload)
    if stage.trains and "torch" in sys.modules:  # preloaded by all that compute with it
        claim_device()
    require_asked(stage, config, task.inputs, task.key)  # a sweep's trials are in no plan
    config.tell_unread_with()
    return stage.run(config, task)


@contextlib.contextmanager
def locked(task: PlannedTask) -> Iterator[None]:
    """Hold the task's lock; waits a little, as a killed worker's children may take a moment to go.

    Raises PipelineError where another process keeps it.
    """
    task.logs.mkdir(parents=True, exist_ok=True)
    with held(task.logs / "lock", _LOCK_PATIENCE_SECONDS, already_running(task)):
        yield


def already_running(task: PlannedTask) -> PipelineError:
    """What a second command at the task is told."""
    return PipelineError(
        f"{task.key} is already running", where=task.logs / STATUS,
        fix="wait for it, or end the process or job named there",
    )  # fmt: skip


def log_path(task: PlannedTask) -> Path:
    """The log of a task: what it printed, all attempts appended."""
    return task.logs.parent / f"{task.name}.log"


def print_into_log(task: PlannedTask) -> None:
    """Have this process and its children print into the task's log."""
    log_path(task).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # Added to, so that what earlier attempts have written stays to be read.
    with log_path(task).open("ab", buffering=0) as log:
        # The descriptors and not sys.stdout: compiled libraries and child processes print to them as well.
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())


def require_free(task: PlannedTask) -> None:
    """Raise PipelineError where another process is at the task, before anything of its is written over."""
    with locked(task):
        pass


def announce(task: PlannedTask) -> None:
    """Have nothing that an earlier attempt said, or was asked, be taken for the one that begins."""
    attempts.note_lost(task.logs, read_status(task.logs))  # here, as its status is written over
    write_status(task, "running")
    clear_request(task.logs)


@contextlib.contextmanager
def _reported(task: PlannedTask) -> Iterator[None]:
    """Keep the status file true, and turn a disk's refusal into an error that says what to do."""
    attempt = attempts.begin(task.logs, read_status(task.logs))
    write_status(task, "running", attempt=attempt)
    try:
        yield
    except Stopped as stopped:  # asked for, by Ctrl-C or a warning: what was done is kept
        _end(task, attempt, INTERRUPTED, error=str(stopped))
        raise
    except BaseException as error:
        # Ctrl-C and sys.exit too: a status left at `running` would count this attempt as lost.
        told = explain_os_error(error, task.output)
        shown = told or error
        text = str(shown) if isinstance(shown, PrefmillError) else traceback.format_exc()
        ended = shown if isinstance(shown, AttemptError) else AttemptError("", record={"kind": type(shown).__name__})
        with contextlib.suppress(OSError):  # on a full disk the error itself matters more than its record
            _end(task, attempt, ended.state, error=text, **ended.record)
        if told is not None:
            raise told from error
        raise
    _end(task, attempt, "complete")


def _end(task: PlannedTask, attempt: dict[str, Any], state: str, **details: Any) -> None:
    """Record the end of an attempt: the status first, as it is what tells a lost attempt from an ended one."""
    write_status(task, state, attempt=attempt, **details, **_usage())
    known = {key: details[key] for key in ("signal", "exit_code", "kind") if key in details}
    attempts.end(task.logs, attempt, state, **known)


def _prepare(task: PlannedTask, wanted: Mapping[str, Any], force: bool) -> Path:
    """The folder to work in, with only what an interrupted attempt at this very content left there."""
    same = fingerprints(task, wanted)
    finished = (task.output / MANIFEST).is_file()
    folder = remaking(task.output) if finished else task.output
    if folder.is_symlink():  # it is deleted and renamed as a whole, which a link cannot be
        raise PipelineError(
            "a task's output is a link", where=folder, got=folder.readlink(),
            fix=f"delete it, and link {folder.parents[1]}, or have `workspace` on that disk",
        )  # fmt: skip
    marker = folder / WORK / STARTED
    begun = read_record(marker)
    resumes = not force and begun.get("fingerprint") in same and not models_changed(task.config, begun)
    if folder.exists() and not resumes:
        shutil.rmtree(folder)
    if not marker.is_file():
        # Before anything else is made here: what lies in a folder without a mark is of unknown origin, and deleted.
        begun = {"fingerprint": same[0], "date": datetime.now(UTC).date().isoformat(), "identity": wanted}
        write_record(marker, begun)
    note_models(marker, task.config)
    if not resumes:
        clear_telemetry(task.logs, superseded(task.logs) if finished else None)
    return folder


def put_in_place(made: Path, place: Path) -> None:
    """Have finished output `made` take the place of that in `place`, which is set aside."""
    if place.exists():
        set_aside(place)
    os.rename(made, place)


def keep_finished(task: PlannedTask) -> None:
    """Drop what was begun in place of finished output that is wanted after all; its own telemetry comes back."""
    _clear_work(task.output)
    kept = superseded(task.logs)
    if remaking(task.output).exists():
        shutil.rmtree(remaking(task.output))
        clear_telemetry(task.logs)
        for path in telemetry(kept):
            os.rename(path, task.logs / path.name)
    if read_status(task.logs).get("state", "complete") != "complete":  # of the attempt that is dropped
        write_status(task, "complete")


def set_aside(folder: Path) -> None:
    """Move finished output that is to be replaced to `<run>/.superseded/`; one generation is kept."""
    kept = superseded(folder)
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, kept)


def telemetry(logs: Path) -> list[Path]:
    """What an attempt logged of its content, such as curves; the record of the attempts themselves is no part of it."""
    kept = ("lock", STATUS, WANTED_AGAIN, attempts.ATTEMPTS, SMALLER)
    return [path for path in logs.iterdir() if path.name not in kept] if logs.is_dir() else []


def clear_telemetry(logs: Path, keep_in: Path | None = None) -> None:
    """Move telemetry of other content to `keep_in`, or remove it; what was printed, in the log beside `logs`, stays."""
    if keep_in is not None:
        shutil.rmtree(keep_in, ignore_errors=True)
        keep_in.mkdir(parents=True)
    for path in telemetry(logs):
        if keep_in is not None:
            os.rename(path, keep_in / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _clear_work(folder: Path) -> None:
    assert (folder / MANIFEST).is_file()
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _run_record(started: float) -> dict[str, Any]:
    ended = time.time()
    return {
        "started": started,
        "ended": ended,
        "seconds": max(0.0, ended - started),  # a clock may be set back meanwhile
        "host": socket.gethostname(),
        "job": attempts.this_job(),
        **_usage(),
    }


def _usage() -> dict[str, float]:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # the largest process, children that have ended included
    kilobytes = max(resource.getrusage(item).ru_maxrss for item in who)
    return {"peak_memory_gb": round(kilobytes / 2**20, 3)}


def import_now(modules: Iterable[str]) -> None:
    """Import those of `modules` that are not there yet; what they make is never collected, nor looked at again."""
    missing = [name for name in modules if name not in sys.modules]
    if not missing:
        return
    gc.disable()
    try:
        for name in missing:
            importlib.import_module(name)
    finally:
        collect_from_now_on()


def collect_from_now_on() -> None:
    """Turn the collector on, for what is made from here on."""
    # Before the collector is on: its first pass would go through everything the imports made.
    gc.freeze()
    gc.enable()
