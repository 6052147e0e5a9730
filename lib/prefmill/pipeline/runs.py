"""The runs of a workspace: which there are, how far each is, how large, whether undamaged, and what can be deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Manifest
from prefmill.core.errors import ArtifactError, PipelineError
from prefmill.core.places import CACHE, CHECKPOINT_PREFIX, LATEST, MANIFEST, WANTED_AGAIN, WORK
from prefmill.core.terminal import Say
from prefmill.pipeline.run_record import ROOTS, closed_runs, run_names, run_tasks
from prefmill.pipeline.task_status import is_at_work, is_running, manifest_fault, read_status
from prefmill.pipeline.worker import clear_telemetry, set_aside, telemetry
from prefmill.store.artifacts import SUPERSEDED, read, read_manifest, remaking, superseded
from prefmill.store.stamps import stamp, verify


@dataclass(frozen=True)
class RunSummary:
    """A run as `prefmill runs` lists it; `changed` in seconds since the epoch, `size` in bytes."""

    name: str
    state: str
    done: int
    total: int
    changed: float
    size: int
    headline: str


@dataclass(frozen=True)
class Removal:
    """Something that can be deleted: a folder, the reason, and the bytes on the disk that it frees."""

    path: Path
    reason: str
    size: int


def list_runs(workspace: Path) -> list[RunSummary]:
    """Every run, the one changed last first; reads files alone and never asks Slurm."""
    found = [summarise(workspace, name) for name in run_names(workspace)]
    return sorted(found, key=lambda run: run.changed, reverse=True)


def summarise(workspace: Path, run: str) -> RunSummary:
    """One run: `running`, `failed`, `damaged` (a manifest, or its record), `complete` or `incomplete`."""
    folders = [workspace / root / run for root in ROOTS]
    try:
        tasks = run_tasks(workspace, run)
    except PipelineError as error:  # the others are listed all the same
        changed = (workspace / "logs" / run).stat().st_mtime
        return RunSummary(run, "damaged", 0, 0, changed, sum(map(size_of, folders)), str(error.details["where"]))
    faults = {task["key"]: manifest_fault(Path(task["output"])) for task in tasks}
    done = [task for task in tasks if faults[task["key"]] == ""]
    damaged = next(filter(None, faults.values()), "")
    logs = [Path(task["logs"]) for task in tasks]
    # Between two tasks a local run holds no task's lock; a task under Slurm has no lock of the run.
    if is_at_work(workspace, run) or any(map(is_running, logs)):
        state = "running"
    elif any(read_status(folder).get("state") in ("failed", "killed", "stopped") for folder in logs):
        state = "failed"
    else:
        state = "damaged" if damaged else "complete" if len(done) == len(tasks) else "incomplete"
    changed = max(path.stat().st_mtime for task in tasks for path in _marks(task, workspace / "logs" / run))
    return RunSummary(run, state, len(done), len(tasks), changed, sum(map(size_of, folders)), damaged or headline(done))


def headline(tasks: Iterable[dict[str, Any]]) -> str:
    """The first conclusion of the last task that has one; empty where there is none."""
    for task in reversed(list(tasks)):
        manifest = _manifest(Path(task["output"]))
        if manifest and manifest.metrics.get("conclusion"):
            return str(manifest.metrics["conclusion"][0])
    return ""


def removable(workspace: Path, runs: Iterable[str], queued: Collection[str] = ()) -> list[Removal]:
    """Finished tasks' checkpoints and scratch, superseded output and abandoned remakes of `runs`, and all caches.

    Nothing of a run at work is removable, and no cache while any run of the workspace is at work. Those in `queued`
    have jobs: a training that waits there goes on from what it has saved.
    """
    names = list(runs)
    found = [
        item for run in names if run not in queued and not _busy(workspace, run) for item in _of_run(workspace, run)
    ]
    # A cache belongs to the workspace: any of its runs may be reading it.
    if not queued and not closed_runs(workspace) and not any(_busy(workspace, run) for run in run_names(workspace)):
        found += _removals("cache, computed again when needed", (workspace / "data" / CACHE).glob("*"))
    return found


def remove(items: Iterable[Removal]) -> None:
    """Delete each of them; raises PipelineError at the first that may not be deleted."""
    for item in items:
        try:
            shutil.rmtree(item.path) if item.path.is_dir() and not item.path.is_symlink() else item.path.unlink()
        except OSError as error:
            # Python names a file below by its last part alone.
            raise PipelineError(
                f"cannot delete: {error.strerror}",
                where=item.path,
                fix="run the same command where that folder and all in it can be written, or as its owner; what was "
                "deleted before is gone",
            ) from error


def remove_run(workspace: Path, run: str) -> list[Removal]:
    """All folders of a run that is not at work, to be given to `remove`; raises PipelineError for one that is."""
    run_tasks(workspace, run)
    if _busy(workspace, run):
        raise PipelineError(f"run {run} is running", fix="wait for it, or end it: Ctrl-C, or `prefmill cancel`")
    return _removals("run", (path for root in ROOTS if (path := workspace / root / run).is_dir()))


def point_latest_away(workspace: Path, run: str) -> None:
    """Have the links `latest` that pointed at `run` point at the run changed last, or be gone."""
    left = [item.name for item in list_runs(workspace) if item.name != run]
    for link in (workspace / root / LATEST for root in ROOTS):
        if link.is_symlink() and os.readlink(link) == run:
            link.unlink()
            if left and (link.parent / left[0]).is_dir():
                link.symlink_to(left[0])


def restore(output: Path, logs: Path) -> None:
    """Exchange a task's output with the superseded one; a second time brings the first back.

    Raises PipelineError where none was kept or the task is running.
    """
    kept, kept_logs, aside = superseded(output), superseded(logs), remaking(output)
    if read_manifest(kept) is None:
        raise PipelineError(
            f"no superseded output of {output.parent.name}:{output.name} is kept", where=kept,
            fix="one generation is kept until `prefmill gc`; make it again with the keys it was made with",
        )  # fmt: skip
    if is_running(logs):
        raise PipelineError("the task is running", where=logs, fix="wait for it, or end it, and try again")
    (logs / WANTED_AGAIN).unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(kept, aside)  # out of the way of the present output, which takes its place
    if output.exists():
        set_aside(output)
    os.rename(aside, output)
    if kept_logs.is_dir():
        # Moved away first, as clear_telemetry empties the folder that it moves things to.
        earlier = kept_logs.rename(kept_logs.with_name(f".{kept_logs.name}"))
        clear_telemetry(logs, kept_logs)
        for path in telemetry(earlier):
            os.rename(path, logs / path.name)
        shutil.rmtree(earlier)


def size_of(path: Path) -> int:
    """Bytes that deleting `path` frees: files that other runs share by hard links count for nothing."""
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    stats = [item.lstat() for item in files]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def _busy(workspace: Path, run: str) -> bool:
    return is_at_work(workspace, run) or any(is_running(Path(task["logs"])) for task in run_tasks(workspace, run))


def _of_run(workspace: Path, run: str) -> Iterator[Removal]:
    for task in run_tasks(workspace, run):
        output = Path(task["output"])
        if _manifest(output) is not None:  # an unfinished task resumes from its checkpoints
            yield from _removals("intermediate checkpoint", output.glob(f"{CHECKPOINT_PREFIX}*"))
            yield from _removals("scratch", output.glob(WORK))
        yield from _removals("unfinished rerun", [path for path in [remaking(output)] if path.exists()])
    kept = (workspace / root / run / SUPERSEDED for root in ROOTS)
    yield from _removals("superseded output", (path for folder in kept for path in folder.glob("*/*")))


def _removals(reason: str, paths: Iterable[Path]) -> list[Removal]:
    return [_removal(reason, path) for path in sorted(paths)]


def _removal(reason: str, path: Path) -> Removal:
    # A run's folder may lie on another disk, or be another run's: what a link names is not ours to delete.
    if path.is_symlink():
        return Removal(path, f"{reason}: a link alone, {path.resolve()} stays", 0)
    return Removal(path, reason, size_of(path))


def _marks(task: dict[str, Any], logs: Path) -> list[Path]:
    marks = [logs / "plan.json", Path(task["output"]) / MANIFEST, Path(task["logs"]) / "status.json"]
    return [path for path in marks if path.is_file()]


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except (ArtifactError, PermissionError):  # one damaged output may not keep all runs from being listed
        return None


def verify_run(workspace: Path, run: str, say: Say = print) -> int:
    """Print a line for each task; returns 0 where all that is finished has the content it was made with, else 1."""
    damaged = 0
    for task in run_tasks(workspace, run):
        output = Path(task["output"])
        if not (output / MANIFEST).is_file():
            say(f"-        {task['key']}: not finished")
            continue
        try:
            artifact = read(output)
            verify(artifact)
            # What was hashed just now need not be hashed again before it is used.
            stamp(output, artifact.manifest.files)
        except ArtifactError as error:
            damaged += 1
            say(f"DAMAGED  {task['key']}: {error}")
            continue
        size = sum(entry.bytes for entry in artifact.manifest.files)
        say(f"ok       {task['key']}: {len(artifact.manifest.files)} files, {size / 1e6:.1f} MB")
    return int(damaged > 0)
