"""`prefmill run`: a plan on this machine, every task in a process of its own, slow imports done once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefmill.core.errors import PrefmillError
from prefmill.core.files import write_atomic
from prefmill.core.stage import PROGRESS
from prefmill.distributed.isolation import end_with_parent
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.pipeline.preload import collect_from_now_on
from prefmill.pipeline.state import TaskState, inspect_task
from prefmill.pipeline.worker import EXIT_BUG, EXIT_USER_ERROR, STATUS, execute, write_status
from prefmill.store.artifacts import read_manifest

_POLL_SECONDS = 0.2
Say = Callable[[str], None]


def run_plan(plan: Plan, only: str | None = None, force: bool = False, say: Say = print) -> int:
    """Run what is not up to date, upstream first; returns the exit code.

    A failed task stops what reads from it and nothing else. `only` limits the work to a stage or task and
    `force` remakes what is selected even if it is up to date.
    """
    selected = plan.select(only) if only else list(plan.tasks)
    point_latest(plan)
    write_plan(plan)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_preload(selected))
    codes: list[int] = []
    lost: dict[str, list[str]] = {}  # for each task that is not done, the tasks whose failure that is due to
    for task in selected:
        causes = sorted({cause for other in plan.upstream(task) for cause in lost.get(other.key, ())})
        if causes:
            lost[task.key] = causes
            codes.append(EXIT_USER_ERROR)
            say(f"- {task.key} left out: {', '.join(causes)} failed")
            continue
        code = _run_task(task, force, server, say)
        if code:
            lost[task.key] = [task.key]
            codes.append(code)
    if not lost:
        _show_results(plan, selected, say)
    return max(codes, default=0)


def point_latest(plan: Plan) -> None:
    """Point `data/latest`, `checkpoints/latest` and `logs/latest` at this run."""
    for root in ("data", "checkpoints", "logs"):
        folder = plan.workspace / root
        (folder / plan.run).mkdir(parents=True, exist_ok=True)
        link = folder / f".latest.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(plan.run)
        os.replace(link, folder / "latest")


def write_plan(plan: Plan) -> None:
    """Record the tasks of this run for `prefmill status`, which reads no configuration."""
    tasks = [
        {
            "key": task.key,
            "output": str(task.output),
            "logs": str(task.logs),
            "needs": [other.key for other in plan.upstream(task)],
        }
        for task in plan.tasks
    ]
    path = plan.workspace / "logs" / plan.run / "plan.json"
    write_atomic(path, json.dumps({"run": plan.run, "tasks": tasks}, indent=1) + "\n")


def _run_task(task: PlannedTask, force: bool, server: Any, say: Say) -> int:
    try:
        state = inspect_task(task)
    except PrefmillError as error:
        say(f"x {task.key} cannot start\n{error}")
        return EXIT_USER_ERROR
    if state.freshness == "complete" and not force:
        say(f"= {task.key} {state.reasons[0]}")
        return 0
    say(f"> {task.key} {_why(state, force)}")
    started = time.monotonic()
    write_status(task, "running")  # nothing said by an earlier attempt may be taken for this one's
    process = server.Process(target=_child, args=(task, force), name=task.key)
    process.start()
    code = _wait(process, task)
    if code == 0:
        say(f"+ {task.key} done in {time.monotonic() - started:.1f} s")
        return 0
    say(f"x {task.key} failed\n{_failure(task, code)}\n  log:      {log_path(task)}")
    return code if code > 0 else EXIT_BUG


def log_path(task: PlannedTask) -> Path:
    """The log of a task: what it printed, all attempts appended."""
    return task.logs.parent / f"{task.name}.log"


def _show_results(plan: Plan, tasks: Iterable[PlannedTask], say: Say) -> None:
    """Print what the pipeline was run for: the conclusions and files of the tasks that nothing else reads."""
    read = {other.key for task in plan.tasks for other in plan.upstream(task)}
    for task in tasks:
        manifest = read_manifest(task.output)
        if task.key in read or task.stage.result is None or manifest is None:
            continue
        for line in manifest.metrics.get("conclusion", []):
            say(line)
        say(str(task.output / task.stage.result))


def _child(task: PlannedTask, force: bool) -> None:
    """The process of one task: its output goes to the task's log, and it does not outlive its parent."""
    collect_from_now_on()
    end_with_parent()
    _end_with_command()
    log_path(task).parent.mkdir(parents=True, exist_ok=True)
    with log_path(task).open("ab", buffering=0) as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        execute(task, force)
    except PrefmillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _end_with_command() -> None:
    """Kill this process when the command that started it dies, whose fork server would live on with it."""
    command = multiprocessing.parent_process()
    assert command is not None

    def watch() -> None:
        wait([command.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _wait(process: ForkServerProcess, task: PlannedTask) -> int:
    """Show the task's progress until its process ends; an interrupt ends the process first, then passes on."""
    progress = task.logs / PROGRESS
    try:
        with tqdm(desc=task.key, leave=False, disable=not sys.stderr.isatty()) as bar:
            while process.is_alive():
                process.join(_POLL_SECONDS)
                _show(bar, progress)
    except BaseException:
        process.terminate()
        process.join()
        raise
    assert process.exitcode is not None
    if process.exitcode < 0:
        write_status(task, "killed", signal=signal.Signals(-process.exitcode).name)
    return process.exitcode


def _show(bar: Any, progress: Path) -> None:
    try:
        record = json.loads(progress.read_text())
    except FileNotFoundError:
        return
    bar.total, bar.unit, bar.n = record["total"], f" {record['unit']}", record["done"]
    bar.refresh()


def _failure(task: PlannedTask, code: int) -> str:
    """What the user needs to know about a failure: the task's own explanation, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return (
            f"ended by {name}\n  fix:      run again: it resumes where it stopped (SIGKILL is often memory running out)"
        )
    status = json.loads(path.read_text()) if (path := task.logs / STATUS).is_file() else {}
    if status.get("state") != "failed":  # it ended before the worker could say anything
        return f"its process ended with exit code {code} before the task began\n  fix:      read its log, run again"
    return str(status["error"])


def _why(state: TaskState, force: bool) -> str:
    return "remade as asked (--force)" if force and state.freshness == "complete" else "; ".join(state.reasons)


def _preload(tasks: Iterable[PlannedTask]) -> list[str]:
    modules = {module for task in tasks for module in task.stage.preload}
    return ["prefmill.pipeline.preload_without_gc", "prefmill.pipeline.worker", *sorted(modules)]
