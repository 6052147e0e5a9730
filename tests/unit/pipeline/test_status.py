"""The table: manifests first, then the queue, then what the tasks left; what is blocked names its cause."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from prefmill.cli.housekeeping import age
from prefmill.pipeline.task_status import at_work
from prefmill.slurm import jobs as slurm
from prefmill.slurm import status
from prefmill.slurm.jobs import JobState
from prefmill.slurm.status import Row, read_rows, render


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three tasks in a row, b behind a and c behind b, submitted as arrays 1, 2 and 3 on 8 GPUs."""
    keys = ["a:all", "b:all", "c:all"]
    logs = tmp_path / "logs" / "r"
    tasks = [
        {"key": key, "output": str(tmp_path / "data/r" / key[0] / "all"), "logs": str(logs / key[0] / "all"),
         "needs": keys[max(0, place - 1) : place]}
        for place, key in enumerate(keys)
    ]  # fmt: skip
    write(logs / "plan.json", {"run": "r", "tasks": tasks})
    folder = logs / "submissions" / "0001"
    values = {"number": 1, "run": "r", "workspace": str(tmp_path), "pipeline": {}, "source": "", "cluster": {}}
    write(folder / "submission.json", {**values, "code": ""})
    for number, key in enumerate(keys, 1):
        array = {"stage": key[0], "chunk": 0, "tasks": ["all"], "resources": {"nodes": 1, "gpus": 8}}
        write(folder / "arrays" / f"{key[0]}.0.json", array)
        job = {"kind": "array", "stage": key[0], "chunk": 0, "job_id": str(number), "indices": [0]}
        with (folder / "jobs.jsonl").open("a") as stream:
            stream.write(json.dumps({**job, "dependency": "", "time": float(number)}) + "\n")
    return tmp_path


def rows(run: Path, monkeypatch: pytest.MonkeyPatch, queue: dict[Any, JobState] | None) -> tuple[dict[str, Row], int]:
    asked: list[int] = []
    monkeypatch.setattr(slurm, "queue", lambda ids: asked.append(1) or queue)
    monkeypatch.setenv("PATH", str(run))  # a Slurm of this machine has jobs of these numbers too, or takes 5 s to say
    return {row.key[0]: row for row in read_rows(run, "r").rows}, len(asked)


def test_the_queue_is_asked_once_and_only_when_something_is_open(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = rows(run, monkeypatch, {("1", 0): JobState("RUNNING", node="n3")})
    assert asked == 1
    assert (found["a"].state, found["a"].node) == ("running", "n3")
    for key in "abc":
        write(run / "data/r" / key / "all" / "manifest.json", {"content_digest": ""})
    found, asked = rows(run, monkeypatch, {})
    assert asked == 0
    assert {row.state for row in found.values()} == {"complete"}


def test_what_stopped_says_what_to_do_and_blocks_the_rest(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decision = {"time": 1.0, "task": "a:all", "element": "1_0", "action": "stop", "kind": "bug", "why": "ValueError",
                "reason": "the same error twice", "todo": "fix it"}  # fmt: skip
    write(run / "logs/r/submissions/decisions.jsonl", decision)
    waits = JobState("PENDING", "DependencyNeverSatisfied")
    found, _ = rows(run, monkeypatch, {("2", 0): waits, ("3", 0): JobState("PENDING", "Dependency")})
    assert found["a"].state == "stopped"
    assert found["a"].reason == "bug: ValueError (the same error twice); to do: fix it"
    assert [(found[key].state, found[key].reason) for key in "bc"] == [("blocked", "a:all has stopped")] * 2
    assert status.show_status(run, "r") == 1


@pytest.mark.parametrize(
    ("reason", "state", "said"),
    [
        ("JobHeldUser", "held", "to do: `scontrol release 1_0`"),
        ("job requeued in held state", "held", "to do: `scontrol release 1_0`"),
        ("JobHeldAdmin", "held", "ask the cluster's operators to release 1_0"),
        ("launch failed requeued held", "held", "could not launch it; to do: `prefmill advance`"),
        ("launch failure limit exceeded requeued held", "held", "could not launch it; to do: `prefmill advance`"),
        ("InvalidQOS", "held", "correct account and qos in the cluster file"),
        ("QOSMaxCpuPerJobLimit", "held", "lower its resources"),
        ("AssocMaxWallDurationPerJobLimit", "held", "lower its resources"),
        ("PartitionTimeLimit", "held", "lower its resources"),
        ("QOSMaxNodePerUserLimit", "queued", "it starts when other jobs have ended"),
        ("AssocGrpGRES", "queued", "it starts when other jobs have ended"),
        ("QOSMaxSubmitJobPerUserLimit", "queued", "it starts when other jobs have ended"),
        ("Nodes required for job are DOWN, DRAINED or reserved", "queued", "`sinfo -R`"),
        ("Priority", "queued", "Priority"),
    ],
)
def test_a_pending_job_says_why_and_what_to_do(
    run: Path, monkeypatch: pytest.MonkeyPatch, reason: str, state: str, said: str
) -> None:
    found, _ = rows(run, monkeypatch, {("1", 0): JobState("PENDING", reason)})
    assert found["a"].state == state
    assert found["a"].reason.startswith(reason)
    assert said in found["a"].reason


@pytest.mark.parametrize("named", ["SPECIAL_EXIT", "REQUEUE_HOLD"])
def test_a_job_that_is_held_by_another_name_does_not_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """As squeue shows a job after `scontrol requeuehold state=SpecialExit`."""
    line = f"1|0|1|{named}|job requeued in held state||1700000000|me|main|(null)"
    found, _ = rows(run, monkeypatch, dict(slurm._queue_rows(line)))
    assert found["a"].state == "held"
    assert "to do: `scontrol release 1_0`" in found["a"].reason


def test_a_suspended_job_is_no_running_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = {"started": time.time() - 100, "done_before": 0, "node": "n1", "steps_before": 0, "job": {}}
    write(run / "logs/r/a/all/status.json", {"state": "running", "time": 1.0, "host": "n1", "attempt": attempt})
    write(run / "logs/r/a/all/progress.json", {"done": 50, "total": 100, "unit": "steps", "time": time.time()})
    found, _ = rows(run, monkeypatch, {("1", 0): JobState("SUSPENDED", "None", node="n1")})
    assert (found["a"].state, found["a"].progress) == ("suspended", "50/100 steps")
    assert "`scontrol resume 1_0`" in found["a"].reason


def test_of_several_partitions_the_limit_of_one_holds_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = JobState(
        "PENDING", "PartitionTimeLimit", partition="short,main"
    )  # as a real Slurm shows one that waits for main
    found, _ = rows(run, monkeypatch, {("1", 0): job})
    assert (found["a"].state, found["a"].reason) == ("queued", "PartitionTimeLimit")


def test_no_answer_from_slurm_is_said_and_nothing_is_made_up(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "queue", lambda ids: None)
    table = read_rows(run, "r")
    assert table.notes == ["Slurm does not answer: states are those the tasks left themselves"]
    assert {row.state for row in table.rows} == {"waiting"}


@pytest.mark.timing
def test_progress_cost_and_restarts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    logs = run / "logs/r/a/all"
    write(
        logs / "attempts.jsonl", {"started": now - 7300, "ended": now - 3700, "outcome": "requeued", "progressed": True}
    )
    attempt = {"started": now - 100, "done_before": 100, "node": "n1", "steps_before": 0, "job": {}}
    write(logs / "status.json", {"state": "running", "time": now, "host": "n1", "attempt": attempt})
    write(logs / "progress.json", {"done": 150, "total": 200, "unit": "steps", "time": now})
    found, _ = rows(run, monkeypatch, {("1", 0): JobState("RUNNING", node="n1")})
    assert found["a"].progress == "150/200 steps, 100 s left"
    assert found["a"].restarts == 1
    assert found["a"].gpu_hours == pytest.approx(8 * 3700 / 3600, rel=0.01)
    text = render("r", list(found.values()))
    assert "cost so far: 8.2 GPU-hours, 8 GPUs at work" in text


def test_a_task_that_starts_again_shows_nothing_of_the_attempt_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = run / "logs/r/a/all"
    write(logs / "progress.json", {"done": 200, "total": 200, "unit": "steps", "time": 1.0})
    write(logs / "status.json", {"state": "running", "time": 2.0, "host": "n1"})  # as a local run leaves it first
    found, _ = rows(run, monkeypatch, {("1", 0): JobState("RUNNING", node="n1")})
    assert found["a"].progress == ""


def test_a_task_whose_process_is_starting_is_not_told_to_run_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run / "logs/r/a/all/status.json", {"state": "running", "time": 2.0, "host": "n1"})  # and no lock yet
    with at_work(run, "r"):
        found, _ = rows(run, monkeypatch, {})
    assert (found["a"].state, found["a"].reason) == ("running", "its process is starting")
    found, _ = rows(run, monkeypatch, {})
    assert found["a"].state != "running"


def test_a_clock_set_back_gives_no_negative_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = {"started": time.time() + 7200, "done_before": 0, "node": "n1", "steps_before": 0, "job": {}}
    write(run / "logs/r/a/all/status.json", {"state": "running", "time": 1.0, "host": "n1", "attempt": attempt})
    found, _ = rows(run, monkeypatch, {("1", 0): JobState("RUNNING", node="n1")})
    assert found["a"].seconds == 0
    assert age(-7200) == "0 min"


def test_a_large_stage_is_summed_up_and_its_troubles_listed() -> None:
    many = [Row(f"s:{n}", "complete", seconds=1.0) for n in range(998)]
    text = render("r", [*many, Row("s:998", "failed", "broken"), Row("s:999", "running")])
    assert "s (1000)" in text
    assert "998 complete, 1 failed, 1 running" in text
    assert "s:998" in text
    assert len(text.splitlines()) < 10
