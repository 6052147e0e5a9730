"""`prefmill run`: a plan on this machine, every task in a process of its own, slow imports done once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from prefmill.core.disk import refusal
from prefmill.core.errors import PipelineError, PrefmillError, explain_os_error, explained
from prefmill.core.graceful_stop import Stopped, request_stop
from prefmill.core.terminal import Say
from prefmill.distributed.isolation import end_with_parent, keep_socket_paths_short
from prefmill.pipeline.checked_plan import require_made
from prefmill.pipeline.interruption import interrupted_by_term, start_fork_server, wait_for_all
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.pipeline.progress_display import Bar
from prefmill.pipeline.run_record import point_latest, write_plan
from prefmill.pipeline.sharing import TAKEN, share
from prefmill.pipeline.slots import Slots
from prefmill.pipeline.state import TaskState, inspect_task
from prefmill.pipeline.subprocess_runner import run_ranks
from prefmill.pipeline.task_status import INTERRUPTED, at_work, in_short, is_running, read_status, write_status
from prefmill.pipeline.worker import (
    EXIT_BUG,
    EXIT_USER_ERROR,
    already_running,
    announce,
    collect_from_now_on,
    execute,
    keep_finished,
    log_path,
    print_into_log,
    require_free,
)
from prefmill.store.artifacts import read_manifest

_POLL_SECONDS = 0.2
_ROOM_FOR_A_STATUS = 64 * 1024  # bytes; with less left on a disk, a task cannot write why it failed
_SIGNAL_SECONDS = 1.0
_SAVE_SECONDS, _GRACE_SECONDS = 60.0, 3.0  # what an interrupted training gets to save in, and any other task to end in
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class RunOptions:
    """How a plan is run: `jobs` tasks side by side (none: one per GPU), and whether others go on after a failure.

    `describe` gives the lines to print of a task that is done, `why` the reason to start each in place of its own.
    """

    jobs: int | None = None
    keep_going: bool = True
    describe: Callable[[PlannedTask], Iterable[str]] = lambda _: ()
    why: str = ""


def run_plan(
    plan: Plan, only: str | None = None, force: bool = False, say: Say = print, options: RunOptions = RunOptions()
) -> int:
    """Run the tasks that are not up to date, upstream first; returns the exit code.

    A failed task stops what reads from it and, unless told otherwise, nothing else. `only` limits the work to a stage
    or task and `force` remakes what is selected even if it is up to date. Interrupted by Ctrl-C or SIGTERM, trainings
    save before they end.
    """
    selected = plan.select(only) if only else list(plan.tasks)
    point_latest(plan)
    write_plan(plan)
    keep_socket_paths_short()
    # Not spawn, which would pay for the imports in every task: 13 to 16 s of CPU for TRL.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_preload(selected))
    run = _Run(plan, list(selected), force, server, say, Slots(options.jobs), options)
    try:
        with at_work(plan.workspace, plan.run), interrupted_by_term():
            while run.waiting or run.running:
                run.start_ready()
                run.reap()
    except KeyboardInterrupt:
        run.save_and_end()
        raise
    except BaseException:
        run.end()
        raise
    if not run.lost:
        _show_results(plan, selected, say)
    return max(run.codes, default=0)


@dataclass
class _Running:
    task: PlannedTask
    process: ForkServerProcess
    started: float
    place: dict[str, str]
    bar: Bar
    ranks: int


@dataclass
class _Run:
    """Tasks on their way; `lost` has for each task that is not done those whose failure that is due to."""

    plan: Plan
    waiting: list[PlannedTask]
    force: bool
    server: Any
    say: Say
    slots: Slots
    options: RunOptions
    running: dict[str, _Running] = field(default_factory=dict)
    lost: dict[str, list[str]] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)

    def start_ready(self) -> None:
        """Start what waits for no other task, in the plan's order, as far as there are places."""
        for task in list(self.waiting):
            upstream = {other.key for other in self.plan.upstream(task)}
            if upstream & ({other.key for other in self.waiting} | set(self.running)):
                continue
            causes = sorted({cause for key in upstream for cause in self.lost.get(key, ())})
            if causes:
                self.waiting.remove(task)
                self._lose(task, causes, EXIT_USER_ERROR)
                self.say(f"- {task.key} left out: {', '.join(causes)} failed")
            elif not self._start(task):
                return  # a later task that needs less may not keep this one waiting for ever

    def _start(self, task: PlannedTask) -> bool:
        """Start `task` where it is not up to date; False while there is no place for it."""
        try:
            require_made(self.plan, task)
            state = inspect_task(task)
            stale = state.freshness != "complete" or self.force
            if stale:
                require_free(task)
            if stale and self.plan.share and not self.force and (run := share(task)):
                self.waiting.remove(task)
                self.say(f"= {task.key} {TAKEN.format(run)}")
                return True
            place = self.slots.take(task) if stale else None
        except PrefmillError as error:
            self.waiting.remove(task)
            self._lose(task, [task.key], EXIT_USER_ERROR)
            self.say(f"x {task.key} cannot start\n{error}")
            return True
        if stale and place is None:
            return False
        self.waiting.remove(task)
        if place is None:
            if not is_running(task.logs):
                keep_finished(task)
            self.say(f"= {task.key} {'; '.join(state.reasons)}")
            return True
        ranks = self.slots.ranks(task)
        self.say(
            f"> {task.key}{f' ({ranks} ranks)' if ranks > 1 else ''} {self.options.why or _why(state, self.force)}"
        )
        announce(task)
        process = self.server.Process(target=_child, args=(task, self.force, place, ranks), name=task.key)
        bar = Bar(task.key, task.logs, self.say)
        self.running[task.key] = _Running(task, process, time.monotonic(), place, bar, ranks)
        try:
            start_fork_server()
            process.start()
        except (EOFError, OSError) as error:
            time.sleep(_SIGNAL_SECONDS)  # Ctrl-C ends the fork server too, perhaps before it is known here
            raise PipelineError(
                "the process that starts tasks has ended", got=repr(error), fix="run again: finished tasks are kept"
            ) from error
        return True

    def reap(self) -> None:
        """Wait a little, show the progress, and report the tasks whose process has ended."""
        wait([item.process.sentinel for item in self.running.values()], _POLL_SECONDS)
        for item in list(self.running.values()):
            item.bar.show()
            if not item.process.is_alive():
                del self.running[item.task.key]
                item.bar.close()
                self.slots.give_back(item.place)
                self._report(item, _exit_code(item))

    def _report(self, item: _Running, code: int) -> None:
        if code == 0:
            self.say(f"+ {item.task.key} done in {time.monotonic() - item.started:.1f} s")
            for line in self.options.describe(item.task):
                self.say(line)
            return
        self._lose(item.task, [item.task.key], code if code > 0 else EXIT_BUG)
        self.say(f"x {item.task.key} failed\n{_failure(item.task, code)}\n  log:      {log_path(item.task)}")
        if not self.options.keep_going:
            for task in self.waiting:
                self._lose(task, [item.task.key], EXIT_USER_ERROR)
                self.say(f"- {task.key} left out: {item.task.key} failed (--no-keep-going)")
            self.waiting.clear()

    def _lose(self, task: PlannedTask, causes: list[str], code: int) -> None:
        self.lost[task.key] = causes
        self.codes.append(code)

    def save_and_end(self) -> None:
        """Have trainings save, as on Slurm's warning, then end; a second interruption ends all at once."""
        # Ctrl-C may come between the note of a process and its start.
        self.running = {key: item for key, item in self.running.items() if item.process.pid is not None}
        seconds = max((_SAVE_SECONDS if item.task.stage.trains else _GRACE_SECONDS for item in self.running.values()),
                      default=0.0)  # fmt: skip
        for item in self.running.values():
            self.say(f"- {item.task.key} is stopping; Ctrl-C again ends it at once")
            # Ranks have a parent of their own, which takes SIGTERM for a warning and asks them to save.
            item.process.terminate() if item.ranks > 1 else request_stop(item.task.logs, seconds)
        with contextlib.suppress(KeyboardInterrupt):
            wait_for_all([item.process for item in self.running.values()], seconds)
        for item in self.running.values():
            item.bar.close()
            kept = read_status(item.task.logs)
            self.say(f"- {item.task.key} {kept['error'] if kept.get('state') == INTERRUPTED else 'ended'}")
        self.end()

    def end(self) -> None:
        """End every process that runs: nothing outlives an interrupted command."""
        started = [item.process for item in self.running.values() if item.process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _exit_code(item: _Running) -> int:
    code = item.process.exitcode
    assert code is not None
    if code < 0:
        # A process that a signal ended could not say so itself.
        write_status(item.task, "killed", signal=signal.Signals(-code).name)
    return code


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


def _child(task: PlannedTask, force: bool, place: dict[str, str], ranks: int) -> None:
    """The process of one task: its output goes to the task's log, and it does not outlive its parent.

    Several ranks are processes of their own, as in a job.
    """
    # The terminal's Ctrl-C reaches every process: this one is to save, and its parent asks it to.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.set_start_method("fork", force=True)  # as in a job: what loads rows for a training is no pickle
    collect_from_now_on()
    end_with_parent()
    _end_with_command()
    try:
        with explained(task.output):
            print_into_log(task)
        os.environ.update(place)
        execute(task, force, run=partial(run_ranks, task, ranks) if ranks > 1 else None)
    except PrefmillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Stopped:
        sys.exit(EXIT_INTERRUPTED)


def _end_with_command() -> None:
    """Kill this process when the command that started it dies, whose fork server would live on with it."""
    command = multiprocessing.parent_process()
    assert command is not None

    def watch() -> None:
        wait([command.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _failure(task: PlannedTask, code: int) -> str:
    """What the user needs to know about a failure: the task's own explanation, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return (
            f"ended by {name}\n  fix:      run again: it resumes where it stopped (SIGKILL is often memory running out)"
        )
    if is_running(task.logs):  # both found it free when they looked: its process came second
        return str(already_running(task))
    status = read_status(task.logs)
    if status.get("state") != "failed":  # it ended before the worker could say anything, or had room to
        disk = next(folder for folder in (task.logs, *task.logs.parents) if folder.is_dir())
        if (refused := refusal(disk, _ROOM_FOR_A_STATUS)) and (told := explain_os_error(refused)):
            return str(told)
        return (
            f"its process ended with exit code {code} before it could say why\n  fix:      read its log, then run again"
        )
    return in_short(str(status["error"]))


def _why(state: TaskState, force: bool) -> str:
    return "remade as asked (--force)" if force and state.freshness == "complete" else "; ".join(state.reasons)


def _preload(tasks: Iterable[PlannedTask]) -> list[str]:
    modules = {module for task in tasks for module in task.stage.preload}
    # That module comes first: the collector is off, and Ctrl-C ends quietly, for the imports after it.
    return ["prefmill.pipeline.in_fork_server", "prefmill.pipeline.worker", *sorted(modules)]
