"""A run on this machine says which failure keeps a task from being done, however far upstream it was."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing import popen_forkserver
from pathlib import Path
from threading import Timer

import pytest
from toys import toy_plan

from prefmill.cli.headlines import describe
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.graceful_stop import StopWatch, request_stop
from prefmill.pipeline import attempts, local, worker
from prefmill.pipeline.local import RunOptions, run_plan
from prefmill.pipeline.plan import PipelineFile
from prefmill.pipeline.slots import Slots
from prefmill.pipeline.task_status import read_status, write_status
from prefmill.pipeline.worker import EXIT_USER_ERROR
from prefmill.store.artifacts import read_manifest


def test_a_task_left_out_names_the_failure_and_not_the_others_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    plan = toy_plan(tmp_path, make={"set": {"fail": "bug"}}, use={}, pair={})
    assert run_plan(plan, say=said.append) != 0
    assert [line for line in said if line.startswith("- ")] == [
        "- use:all left out: make:all failed",
        "- pair:all left out: make:all failed",
    ]


def test_a_task_that_another_command_is_at_is_named_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = toy_plan(tmp_path, make={})
    task, said = plan.tasks[0], list[str]()
    request_stop(task.logs, 60.0)
    attempt = attempts.begin(task.logs, {})
    write_status(task, "running", attempt=attempt)
    monkeypatch.setattr(worker, "_LOCK_PATIENCE_SECONDS", 0.0)
    with worker.locked(task):
        assert run_plan(plan, say=said.append) == EXIT_USER_ERROR
    assert "make:all is already running" in "\n".join(said)
    assert read_status(task.logs)["attempt"] == attempt, "the status of the one at work"
    assert StopWatch(task.logs).due(1, 1), "and what it was asked"


def test_of_two_that_started_at_once_the_second_is_told_of_the_first(tmp_path: Path) -> None:
    (task,) = toy_plan(tmp_path, make={}).tasks
    with worker.locked(task):
        assert local._failure(task, EXIT_USER_ERROR).startswith("make:all is already running\n")


@pytest.mark.parametrize("workspace", ["$WORK/runs", "~nobody.here/runs"])
def test_a_workspace_that_only_a_shell_can_read_is_refused(workspace: str) -> None:
    with pytest.raises(ConfigError, match="write the path"):
        validate(PipelineFile, {"name": "toy", "stages": {"make": {}}, "workspace": workspace})


@pytest.fixture
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's own process finds the toys by their module's name, and their folder is not on its path."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.usefixtures("_anywhere")
def test_tasks_side_by_side_make_what_tasks_in_a_row_make(tmp_path: Path) -> None:
    def digests(jobs: int) -> list[str]:
        plan = toy_plan(tmp_path / str(jobs), make={"array": {"shard": 3}}, use={})
        said: list[str] = []
        assert run_plan(plan, say=said.append, options=RunOptions(jobs)) == 0, said
        first_end = next(n for n, line in enumerate(said) if line.startswith("+"))
        assert first_end == jobs, said  # so many had started
        return [manifest.content_digest for task in plan.tasks if (manifest := read_manifest(task.output))]

    assert len(one := digests(1)) == 4
    assert digests(3) == one


@pytest.mark.parametrize(("signalled", "raised"), [(True, KeyboardInterrupt), (False, PipelineError)])
def test_a_fork_server_that_ctrl_c_has_ended_first_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled: bool, raised: type[BaseException]
) -> None:
    def gone(*_: object) -> None:
        if signalled:  # Ctrl-C goes to every process of a terminal, and this one may be told last
            Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(popen_forkserver.Popen, "_launch", gone)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist takes no Ctrl-C
    try:
        with pytest.raises(raised):
            run_plan(toy_plan(tmp_path, make={}), say=lambda _: None)
    finally:
        signal.signal(signal.SIGINT, before)


_INTERRUPTED = """
import os, signal, sys, time
from multiprocessing import forkserver
from prefmill.pipeline.interruption import start_fork_server

signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist takes no Ctrl-C
forkserver.set_forkserver_preload(["prefmill.pipeline.in_fork_server"])
start_fork_server()
time.sleep(float(sys.argv[1]))
server = forkserver._forkserver._forkserver_pid
os.kill(server, signal.SIGINT)
time.sleep(1)
os.kill(server, signal.SIGKILL)  # once it runs, it ignores Ctrl-C
os.waitpid(server, 0)
"""


@pytest.mark.timing
def test_ctrl_c_while_the_fork_server_starts_is_no_traceback() -> None:
    commands = [[sys.executable, "-c", _INTERRUPTED, seconds] for seconds in ("0", "0.01", "0.02", "0.04")]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate(timeout=60)[1] for process in started] == [""] * 4
    assert [process.returncode for process in started] == [0] * 4


def test_gpus_are_given_to_tasks_and_come_back(tmp_path: Path) -> None:
    tasks = toy_plan(tmp_path, make={"array": {"shard": 3}}).tasks
    slots = Slots(None, ["0", "1"])
    places = [slots.take(task) for task in tasks]
    assert places == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}, None]
    training = replace(tasks[0], stage=replace(tasks[0].stage, trains=True))
    slots.give_back({"CUDA_VISIBLE_DEVICES": "0"})
    assert slots.take(training) is None
    slots.give_back({"CUDA_VISIBLE_DEVICES": "1"})
    assert slots.take(training) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    with pytest.raises(PipelineError, match="a rank needs a GPU"):
        slots.take(replace(training, processes=3))


@pytest.mark.usefixtures("_anywhere")
def test_what_a_stage_warns_of_stands_on_the_console(tmp_path: Path) -> None:
    said: list[str] = []
    options = RunOptions(describe=describe)
    assert run_plan(toy_plan(tmp_path, make={"set": {"rows": 0}}), say=said.append, options=options) == 0
    assert said[-1] == "! no rows"


@pytest.mark.usefixtures("_anywhere")
def test_after_a_failure_others_go_on_unless_told_otherwise(tmp_path: Path) -> None:
    def done(keep_going: bool) -> list[str]:
        array = {"array": {"shard": 2}, "set": {"fail": "bug"}}
        said: list[str] = []
        plan = toy_plan(tmp_path / str(keep_going), make=array)
        assert run_plan(plan, say=said.append, options=RunOptions(keep_going=keep_going)) != 0
        return [line.split()[1] for line in said if line[0] == "x"]

    assert done(True) == ["make:shard0", "make:shard1"]
    assert done(False) == ["make:shard0"]


@pytest.mark.usefixtures("_anywhere")
def test_a_bug_is_a_line_and_its_log_on_the_console(tmp_path: Path) -> None:
    said: list[str] = []
    plan = toy_plan(tmp_path, make={"set": {"fail": "bug"}})
    assert run_plan(plan, say=said.append, options=RunOptions(why="as a slice")) != 0
    assert said[0] == "> make:all as a slice"
    log = tmp_path / "logs" / "toy" / "make" / "all.log"
    assert said[1] == f"x make:all failed\nValueError: a bug\n  log:      {log}"
    assert "Traceback" in log.read_text()


def test_a_task_that_had_no_room_to_say_why_it_failed_is_told_of_the_disk(tmp_path: Path) -> None:
    task = replace(toy_plan(tmp_path, make={}).tasks[0], logs=tmp_path / "logs" / "r" / "sft" / "clean")
    assert "exit code 1 before it could say why" in local._failure(task, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # seen by writing only, as a quota is
    try:
        told = local._failure(task, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write: File too large" in told
    assert "run again: finished work is kept" in told
    assert list(tmp_path.glob("**/.room*")) == []


def test_an_attempt_that_was_killed_counts_where_the_next_is_a_local_run(tmp_path: Path) -> None:
    """Its time and restart were lost: the run wrote over the status that told of it."""
    plan = toy_plan(tmp_path, make={})
    task = plan.tasks[0]
    write_status(task, "running", attempt=attempts.begin(task.logs, {}))
    assert run_plan(plan, say=lambda _: None) == 0
    assert [row["outcome"] for row in attempts.read_attempts(task.logs)] == ["lost", "complete"]


_UNREAD = """
import os, sys
from prefmill.pipeline.interruption import interrupted_by_term

try:
    with interrupted_by_term():
        print("a line", flush=True)
except KeyboardInterrupt:
    print("what is said while tasks save", flush=True)
    print("interrupted", file=sys.stderr)
    sys.exit(130)
"""


@pytest.mark.parametrize(("stderr", "said"), [(subprocess.PIPE, "interrupted\n"), (subprocess.STDOUT, None)])
def test_a_reader_that_has_gone_is_taken_for_ctrl_c(stderr: int, said: str | None) -> None:
    """`prefmill run | tee log` on a full disk: trainings were ended at once, and nothing said so.

    With `2>&1` the command ended as a failed one, by the error of its own last word.
    """
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", _UNREAD], stdout=writer, stderr=stderr, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (130, said)
