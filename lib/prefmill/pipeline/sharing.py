"""Finished tasks of other runs, taken instead of being made again: the same content lies once on the disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

from prefmill.core.errors import ArtifactError, PrefmillError
from prefmill.core.files import write_atomic
from prefmill.core.places import CHECKPOINT_PREFIX, MANIFEST, SHARED_FROM, WANTED_AGAIN, WORK
from prefmill.core.terminal import Say
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.pipeline.state import fingerprints, inspect_task, read_inputs, task_identity, written_since
from prefmill.pipeline.task_status import is_running, write_status
from prefmill.pipeline.worker import clear_telemetry, locked, put_in_place, telemetry
from prefmill.store.artifacts import read, remaking, superseded

TAKEN = "taken from run {}: the same configuration and inputs"
_FINGERPRINT = re.compile(rb'"fingerprint":\s*"([0-9a-f]+)"')
_HEAD_BYTES = 4096  # a manifest begins with what it is; those of large outputs have megabytes after it


def share(task: PlannedTask) -> str | None:
    """Take the output of `task` from another run of its workspace that has it; returns that run's name, or None.

    The same stage, configuration and input content make the same output. Files are linked, or copied to another disk.
    Raises PipelineError where another process is at the task.
    """
    if task.stage.names_run or is_running(task.logs) or (task.logs / WANTED_AGAIN).exists():
        return None
    wanted = fingerprints(task, task_identity(task, read_inputs(task)))
    for folder in _made(task, wanted):
        with locked(task):  # two commands at once would empty each other's folder
            if inspect_task(task).freshness != "complete":
                _take(folder, task)
        return folder.parents[1].name
    return None


def share_finished(plan: Plan, leave: Container[str], say: Say) -> None:
    """`share` of every task of `plan` that is not complete, upstream first; those in `leave` are on their way."""
    unknown: set[str] = set()
    for task in plan.tasks:
        try:
            ready = unknown.isdisjoint(other.key for other in plan.upstream(task)) and task.key not in leave
            complete = ready and inspect_task(task).freshness == "complete"
            run = share(task) if ready and not complete else None
        except PrefmillError:  # an input that is missing or damaged: whoever runs the task reports it
            complete, run = False, None
        if run:
            say(f"{task.key} {TAKEN.format(run)}")
        elif not complete:
            unknown.add(task.key)


def _made(task: PlannedTask, wanted: tuple[str, ...]) -> Iterator[Path]:
    root = task.output.parents[2]
    for path in sorted(root.glob(f"*/{task.stage.name}/{task.name}/{MANIFEST}")):
        if path.parent == task.output or path.parents[2].is_symlink():  # `latest` is one of the others
            continue
        try:
            same = _fingerprint(path) in wanted and not any(written_since(task, path.parent))
            if same and read(path.parent, task.stage.writes):
                yield path.parent
        except (ArtifactError, PermissionError):  # another run's damage, or another user's, is no concern of this one
            continue


def _fingerprint(manifest: Path) -> str:
    with manifest.open("rb") as stream:
        found = _FINGERPRINT.search(stream.read(_HEAD_BYTES))
    return found.group(1).decode() if found else ""


def _take(folder: Path, task: PlannedTask) -> None:
    made = remaking(task.output)
    shutil.rmtree(made, ignore_errors=True)
    left_out = shutil.ignore_patterns(WORK, f"{CHECKPOINT_PREFIX}*")
    shutil.copytree(folder, made, copy_function=_link, ignore=left_out)
    run = folder.parents[1].name
    task.logs.mkdir(parents=True, exist_ok=True)
    # Curves belong to content: those of the output that is replaced are kept with it.
    clear_telemetry(task.logs, superseded(task.logs) if task.output.exists() else None)
    for path in telemetry(task.logs.parents[2] / run / task.stage.name / task.name):
        shutil.copytree(path, task.logs / path.name) if path.is_dir() else shutil.copy2(path, task.logs)
    if not (task.logs / SHARED_FROM).exists():  # that run may have taken it as well
        write_atomic(task.logs / SHARED_FROM, f"{run}\n")
    # By rename, when all is there: until now the task has what it had before.
    put_in_place(made, task.output)
    write_status(task, "complete")


def _link(source: str, target: str) -> None:
    try:
        # Hard and not symbolic: deleting one run must not break another. No artifact is edited in place.
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copy2(source, target)
