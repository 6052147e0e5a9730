"""Inside a job, without Slurm: layouts, commands, attempts, how endings are told apart."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toys import STAGES, toy_plan

from prefmill.core.config import StrictConfig
from prefmill.core.errors import AttemptError, PrefmillError
from prefmill.core.records import Modality
from prefmill.core.stage import Task
from prefmill.distributed.torchrun import arguments
from prefmill.pipeline import attempts, launched, manual_submission
from prefmill.pipeline import subprocess_runner as children
from prefmill.pipeline.manual_submission import stage_plan
from prefmill.pipeline.rank_entrypoint import run_rank
from prefmill.pipeline.subprocess_runner import Layout, SignalWatcher
from prefmill.pipeline.task_status import read_status
from prefmill.slurm import job
from prefmill.slurm.job import element_id

ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "10"}


@pytest.mark.parametrize(
    ("environment", "trains", "processes", "expected"),
    [
        ({}, True, None, Layout(1, 1, 1)),
        ({"SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "96"}, True, None, Layout(4, 8, 96)),
        ({"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}, True, 2, Layout(2, 2, 1)),
        ({"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "4"}, False, None, Layout(1, 1, 4)),
    ],
)
def test_a_layout_follows_from_what_the_job_has(
    environment: dict[str, str], trains: bool, processes: int | None, expected: Layout
) -> None:
    assert Layout.of_job(environment, trains, processes) == expected


def test_one_process_needs_no_torchrun_and_one_node_no_srun() -> None:
    spec = Path("/w/spec.json")
    assert Layout().command(spec) == [sys.executable, "-m", "prefmill.pipeline.rank_entrypoint", "/w/spec.json"]
    assert "srun" not in Layout(1, 8, 8).command(spec)
    wide = Layout(2, 8, 96).command(spec)
    assert wide[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=96", "--export=ALL"} <= set(wide)


def test_the_rendezvous_of_one_node_is_its_own_in_a_job_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "20005"}
    given = arguments(job, 1, 4)
    assert {"--nnodes=1", "--node-rank=0", "--nproc-per-node=4", "--master-addr=127.0.0.1"} <= set(given)
    assert set(arguments(job, 1, 4)) != set(given)
    # Two containers on a node, whose processes have one number; and a port that is in use.
    monkeypatch.setattr(os, "getpid", lambda: 99)
    with socket.socket() as taken:
        taken.bind(("", 0))
        ports = iter([taken.getsockname()[1] - 10_000, 104])
        monkeypatch.setattr(secrets, "randbelow", lambda _: next(ports))
        taken.listen()
        assert "--master-port=10104" in arguments(job, 1, 4)


@pytest.mark.parametrize(
    ("environment", "expected"), [(ARRAY, "7_3"), ({"SLURM_JOB_ID": "10"}, "10"), ({}, None)]
)  # fmt: skip
def test_only_this_element_is_requeued(environment: dict[str, str], expected: str | None) -> None:
    assert element_id(environment) == expected


@pytest.mark.parametrize(
    ("answer", "code", "printed"),
    [("kill -TERM $$", 0, "requeued 7_3"), ("echo 'Requested operation is disabled' >&2; exit 1", 3, "is disabled")],
)
def test_slurm_may_end_scontrol_while_it_requeues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    answer: str, code: int, printed: str,
) -> None:  # fmt: skip
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in ARRAY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(job, "_REQUEUE_PATIENCE_SECONDS", 0)
    (task,) = stage_plan("make", [f"workspace={tmp_path}", "run=r"])[0].tasks
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert job._requeue(task) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert printed in "".join(capfd.readouterr())


def collect(folder: Path, code: int, warnings: SignalWatcher | None = None, log: str = "") -> Any:
    """What is made of a child that has ended with `code`."""
    (folder / "x.log").write_text(log)
    return children._collect(folder, code, warnings or SignalWatcher(100), folder / "x.log", 0)


def test_a_result_counts_only_with_exit_code_zero(tmp_path: Path) -> None:
    (tmp_path / children.RESULT).write_text(json.dumps({"metrics": {"a": 1}}))
    assert collect(tmp_path, 0) == {"a": 1}
    with pytest.raises(AttemptError, match="exit code 1"):
        collect(tmp_path, 1)


def test_an_ending_without_a_result_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(AttemptError):
        collect(tmp_path, 0)


def test_the_stages_own_explanation_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / children.FAILURE).write_text(json.dumps({"kind": "ConfigError", "error": "the fault\n  fix: that"}))
    with pytest.raises(AttemptError, match="the fault") as caught:
        collect(tmp_path, 2)
    assert caught.value.record["kind"] == "ConfigError"


def reported(second: int, host: str, code: int) -> str:
    """A failure as torchrun's own formatter shows it."""
    from string import Template

    from torch.distributed.elastic.multiprocessing import errors

    return Template(errors._FAILURE_FORMAT_TEMPLATE).substitute(
        idx=0, time=f"2026-11-21_07:00:{second:02}", hostname=host, rank=3, local_rank=1, exitcode=code, pid=41,
        signal_name="", error_file="<N/A>", message="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "log", "host"),
    [
        (-9, "", None),
        (1, reported(5, "n1", -9), "n1"),
        # Each node's torchrun tells of its own first failure: the one that lost its peer is not the one that failed.
        (1, reported(5, "n2", -9) + reported(7, "n1", 1), "n2"),
        (1, reported(7, "n1", 1) + reported(5, "n2", -9), "n2"),
        (1, reported(5, "n1", 1) + reported(5, "n2", -9), "n2"),
    ],
)
def test_a_signal_is_named_also_beneath_torchrun(tmp_path: Path, code: int, log: str, host: str | None) -> None:
    with pytest.raises(AttemptError, match="SIGKILL") as caught:
        collect(tmp_path, code, log=log)
    record = {"exit_code": -9, "signal": "SIGKILL", "kind": "ProcessEnded", "failed_on": host}
    assert caught.value.record == record
    assert caught.value.state == "failed"


def test_what_a_rank_says_whose_partner_was_killed_is_not_the_reason(tmp_path: Path) -> None:
    (tmp_path / children.FAILURE).write_text(json.dumps({"kind": "RuntimeError", "error": "closed by peer"}))
    with pytest.raises(AttemptError, match=r"^rank 3's process ended by SIGKILL\n(.*\n)*  got: *closed by peer"):
        collect(tmp_path, 1, log=reported(5, "n1", -9) + reported(5, "n1", 1))


def test_rank_0_leaves_what_the_rank_said_that_failed_first(tmp_path: Path) -> None:
    (tmp_path / children.FAILURE).write_text("{}")
    assert run_rank(tmp_path / "no_spec.json") == 1
    assert (tmp_path / children.FAILURE).read_text() == "{}"


@pytest.mark.parametrize("error", [RuntimeError("closed by peer"), KeyboardInterrupt()])
def test_under_torchrun_by_hand_the_status_tells_why_another_rank_failed(tmp_path: Path, error: BaseException) -> None:
    said = {"kind": "ValueError", "error": "a bug", "failed_on": "n2"}

    def run(_config: Any, task: Task) -> Any:
        (task.work / "attempt" / children.FAILURE).write_text(json.dumps(said))  # as rank 1 does
        raise error

    (task,) = stage_plan("make", [f"workspace={tmp_path}", "run=r"])[0].tasks
    task = replace(task, stage=replace(task.stage, run=run))
    context = Task("r", "make", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    specs: list[str] = []
    with pytest.raises(AttemptError, match="a bug") as caught:
        launched._lead(task, specs.append, lambda _: "", context)
    assert caught.value.record == {"kind": "ValueError", "failed_on": "n2"}
    assert len(specs) == 1


def test_under_torchrun_by_hand_the_status_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    """Rank 0 hears of it as of a closed connection, which the status told in its place."""

    def run(_config: Any, _task: Task) -> Any:
        raise RuntimeError("Connection closed by peer")

    (task,) = stage_plan("make", [f"workspace={tmp_path}", "run=r"])[0].tasks
    task = replace(task, stage=replace(task.stage, run=run))
    context = Task("r", "make", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    with pytest.raises(AttemptError, match=r"rank 1 ended before it could say why\n.*Connection closed by peer"):
        launched._lead(task, str, lambda _: "1", context)
    with pytest.raises(RuntimeError, match="closed by peer"):
        launched._lead(task, str, lambda _: "", context)


@pytest.mark.timing
def test_a_rank_that_was_killed_is_known_by_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(launched, "_ENDING_SECONDS", 0.0)
    here = socket.gethostname()
    with subprocess.Popen(["sleep", "60"]) as alive, subprocess.Popen(["sleep", "60"]) as killed:
        killed.kill()
        while not launched._has_ended(str(killed.pid)):  # a zombie, for which nobody has waited
            time.sleep(0.01)
        at = {"1": f"{here} {alive.pid}", "2": f"{here} {killed.pid}", "3": "elsewhere 1"}
        store = SimpleNamespace(get=lambda key: at[key.rpartition("/")[2]].encode(), check=lambda _: False)
        closed = RuntimeError("Connection closed by peer [10.0.0.2]:2945")
        before = signal.getsignal(signal.SIGTERM)
        try:
            assert launched._ended(store, closed) == "2"
            at["2"] = f"{here} {alive.pid}"
            assert launched._ended(store, closed) == "3 on elsewhere"
            assert launched._ended(store, ValueError("of rank 0's own")) == ""
            store.check = lambda keys: keys == ["prefmill/failed/3"]  # it says itself of what it failed
            assert launched._ended(store, closed) == ""
        finally:
            signal.signal(signal.SIGTERM, before)
            alive.kill()
    assert launched._has_ended(str(killed.pid))


@pytest.mark.parametrize(("number", "state"), [(signal.SIGUSR1, "requeued"), (signal.SIGTERM, "terminated")])
def test_a_warning_decides_between_requeue_and_the_end(tmp_path: Path, number: signal.Signals, state: str) -> None:
    with pytest.raises(AttemptError) as caught:
        collect(tmp_path, -15, SignalWatcher(100, [number]))
    assert caught.value.state == state


def test_a_real_failure_after_a_warning_stays_a_failure(tmp_path: Path) -> None:
    (tmp_path / children.FAILURE).write_text(json.dumps({"kind": "ValueError", "error": "a bug"}))
    with pytest.raises(AttemptError) as caught:
        collect(tmp_path, 1, SignalWatcher(100, [signal.SIGUSR1]))
    assert caught.value.state == "failed"


def end(logs: Path, taken: list[int], outcome: str) -> None:
    """An attempt that took these steps."""
    attempt = attempts.begin(logs, {})
    with (logs / "executed_steps.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"step": step}) + "\n" for step in taken)
    attempts.end(logs, attempt, outcome)


def test_attempts_know_their_steps_and_whether_they_got_further(tmp_path: Path) -> None:
    for taken in ([1, 2, 3], [3, 4], [3, 4], [], [4]):
        end(tmp_path, taken, "requeued")
    rows = attempts.read_attempts(tmp_path)
    assert [(row["first_step"], row["last_step"]) for row in rows] == [(1, 3), (3, 4), (3, 4), (None, None), (4, 4)]
    assert [row["progressed"] for row in rows] == [True, True, False, False, False]
    assert attempts.idle_attempts(tmp_path) == 3
    end(tmp_path, [5], "requeued")
    assert attempts.idle_attempts(tmp_path) == 0


def test_a_lost_attempt_is_recorded_by_the_next(tmp_path: Path) -> None:
    lost = attempts.begin(tmp_path, {})
    attempts.begin(tmp_path, {"state": "running", "time": 5.0, "attempt": lost})
    (row,) = attempts.read_attempts(tmp_path)
    assert (row["outcome"], row["ended"]) == ("lost", 5.0)


def test_a_torn_line_does_not_hide_the_others(tmp_path: Path) -> None:
    end(tmp_path, [1], "requeued")
    with (tmp_path / attempts.ATTEMPTS).open("a") as stream:
        stream.write('{"outcome": "requ')
    assert len(attempts.read_attempts(tmp_path)) == 1


def test_a_job_is_named_as_slurm_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in ARRAY.items():
        monkeypatch.setenv(name, value)
    assert attempts.this_job() == {"job_id": "10", "array_job_id": "7", "array_task_id": "3"}


class OfModality(StrictConfig):
    modality: Modality = "clean"


def test_an_array_by_hand_is_over_the_modalities_and_a_task_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefmill.pipeline.manual_submission import element, stage_task

    keys = [f"workspace={tmp_path}", "run=r", "array.shard=3"]
    plan, name = stage_plan("make", [*keys, "task=shard1"])
    assert (len(plan.tasks), name) == (3, "shard1")
    assert stage_task("make", keys, ARRAY | {"SLURM_ARRAY_TASK_ID": "2"}).name == "shard2"
    with pytest.raises(PrefmillError, match="no such element"):
        element(plan.tasks, ARRAY)
    monkeypatch.setitem(STAGES, "use", replace(STAGES["use"], config=OfModality))
    where = keys[:2]
    one = {"SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "1"}
    for count in ("1", "3"):  # submitted again alone, it is the element that it was
        again = stage_task("use", [*where, "inputs.numbers=n"], one | {"SLURM_ARRAY_TASK_COUNT": count})
        assert again.key == "use:clean_images"
    assert stage_task("use", [*where, "inputs.numbers=n", "modality=vision"], {}).config.modality == "vision"
    with pytest.raises(PrefmillError, match=r"modality is set, and has an array(.|\n)*command line(.|\n)*vision"):
        stage_task("use", [*where, "inputs.numbers=n", "modality=vision"], one)


SILENT = "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n"


@pytest.mark.parametrize("squeue", [None, SILENT], ids=["a container without Slurm", "a controller that restarts"])
def test_an_element_that_cannot_ask_slurm_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str | None
) -> None:
    """It ended in a traceback, or in `element 0 is not queued`, which was not so."""
    if squeue:
        (tmp_path / "squeue").write_text(squeue)
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(PrefmillError, match=r"(?s)does not say whether it is being made.*squeue cannot|contact slurm"):
        manual_submission._indices_queued("7", dict(os.environ))
    with pytest.raises(PrefmillError, match=r"(?s)take this element back.*scontrol cannot.*--dependency=afterok:7_0"):
        manual_submission.give_back_until_ready("7_3", ["7_0"])


def test_a_warning_without_scontrol_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container: what has saved is resumed by whoever submits it again, as is told."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (task,) = toy_plan(tmp_path, make={}).tasks
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert job._requeue(task) == job.EXIT_NOT_REQUEUED
    assert "scontrol cannot be run on" in capsys.readouterr().err
    assert read_status(task.logs)["kind"] == "NotRequeued"
