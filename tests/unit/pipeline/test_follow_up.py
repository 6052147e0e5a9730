# ruff: noqa: F811 - `run` is a fixture
"""The job that looks after a run is booked, told when to look and booked anew; `cancel` ends all there is."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_sightings import ME, RUNNING, WAITS, Run, run  # noqa: F401

from prefmill.cli.main import main
from prefmill.core.errors import PipelineError
from prefmill.pipeline import decisions
from prefmill.pipeline.decisions import Decisions
from prefmill.pipeline.runs import verify_run
from prefmill.pipeline.state import inspect
from prefmill.pipeline.worker import execute
from prefmill.slurm import advance
from prefmill.slurm.follow_up import Wait, book_again, release_when_task_ends
from prefmill.slurm.jobs import JobState
from prefmill.slurm.rerun import cancel, rerun
from prefmill.slurm.status import read_rows
from prefmill.slurm.submission import Intent
from prefmill.slurm.view import View, look, next_look

HEALER = f"43|N/A|43|PENDING|Dependency||N/A|{ME}|gpu|afterany:41_*(unfulfilled)"


def with_script(run: Run) -> None:
    (run.submission.folder / "arrays" / "advance.sbatch").write_text("#!/bin/sh\n")


def said_to_slurm(run: Run, program: str) -> list[str]:
    path = run.programs / f"{program}.said"
    return path.read_text().splitlines() if path.exists() else []


def listen(run: Run, program: str) -> None:
    run.script(program, f'echo "$@" >> {run.programs}/{program}.said')


def test_when_to_look_again(run: Run) -> None:
    run.slurm(squeue=f"{RUNNING}\n{WAITS}")
    wait = next_look(look(run.workspace, "toy"))
    assert wait == Wait(("41", "42"))
    assert (wait.dependency, wait.begin) == ("afterany:41?afterany:42", "now")
    run.slurm(squeue=WAITS)  # of 41 nobody knows: no job's end tells of it
    assert next_look(look(run.workspace, "toy")) == Wait(minutes=10)
    run.slurm(squeue=WAITS.replace("Dependency|", "DependencyNeverSatisfied|"), sacct="41_0|FAILED|1:0|n1|1||")
    assert next_look(look(run.workspace, "toy")) is None  # only what waits for nothing is left


def test_a_queued_follow_up_is_told_and_a_lost_one_submitted_again(run: Run) -> None:
    with_script(run)
    run.slurm(squeue=f"{RUNNING}\n{WAITS}\n{HEALER}")
    listen(run, "scontrol")
    run.advance()
    assert said_to_slurm(run, "scontrol") == ["update jobid=43 dependency=afterany:41?afterany:42"]
    assert run.sent == 0
    run.slurm(squeue=f"{RUNNING}\n{WAITS}")
    assert any("no job looks after this run" in note for note in read_rows(run.workspace, "toy").notes)
    held = HEALER.replace("Dependency|", "launch failed requeued held|")
    run.slurm(squeue=f"{RUNNING}\n{WAITS}\n{held}")
    listen(run, "scancel")
    assert "job 99 looks after the run" in run.advance()
    assert said_to_slurm(run, "scancel") == ["43"]
    assert run.sent == 1
    assert [job.job_id for job in run.submission.jobs()] == ["41", "42", "43", "99"]


def test_a_task_submits_it_again_unless_the_task_is_cancelled(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_script(run)
    run.slurm(squeue=f"{RUNNING}\n{HEALER}")
    book_again(run.workspace, "toy", "make:all")
    run.slurm(code=1)  # nobody knows
    book_again(run.workspace, "toy", "make:all")
    assert run.sent == 0
    run.slurm(squeue=RUNNING)
    book_again(run.workspace, "toy", "make:all")
    assert run.sent == 1
    assert "job 99 looks after the run" in capsys.readouterr().out
    Decisions(run.workspace, "toy").record("make:all", "41_0", "cancel")
    book_again(run.workspace, "toy", "make:all")
    assert run.sent == 1


def test_cancel_ends_every_job_of_a_run_and_reads_no_manifest(run: Run) -> None:
    """An earlier element of a task, the follow-up job, and a job of which only the intent was noted."""
    run.plan.tasks[0].output.mkdir(parents=True)
    (run.plan.tasks[0].output / "manifest.json").write_text('{"kind": "review_cor')
    (run.submission.folder / "jobs.jsonl").open("a").write(json.dumps(
        {"kind": "array", "stage": "make", "chunk": 0, "job_id": "50", "indices": [0], "dependency": "", "time": 2e9}
    ) + "\n")  # fmt: skip
    run.submission.record_intent(Intent("array", "use", 0, (0,), "", 0.0, "toy.use.1234"))
    again = RUNNING.replace("41|0|41", "50|0|50")
    lost = RUNNING.replace("41|0|41", "60|0|60")
    shown = f"{RUNNING}\n{WAITS}\n{HEALER}\n{again}\n{lost}"
    run.slurm(squeue=f"{shown}\ntoy.use.1234|60")
    listen(run, "scancel")
    said: list[str] = []
    cancel(run.workspace, "toy", None, said.append)
    assert said == ["job 60 is use's: its submission was cut off before that was noted", "run toy: 2 tasks cancelled"]
    assert sorted(said_to_slurm(run, "scancel")[0].split()) == ["41_0", "42_0", "43", "50_0", "60_0"]
    assert {row["task"] for row in Decisions(run.workspace, "toy").stopped().values()} == {"make:all", "use:all"}
    cancel(run.workspace, "toy", "use", said.append)
    assert sorted(said_to_slurm(run, "scancel")[1].split()) == ["42_0", "60_0"]


def test_an_unreadable_manifest_concerns_its_own_task_and_damage_is_found(
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, use = run.plan.tasks[0], next(task for task in run.plan.tasks if task.stage.name == "use")
    for task in run.plan.tasks:
        execute(task)
    assert verify_run(run.workspace, "toy") == 0
    (use.output / "manifest.json").write_text('{"kind"')
    states = inspect(run.plan)
    assert states[make.key].freshness == "complete"
    assert states[use.key].reasons[0].startswith("unreadable manifest: ")
    assert verify_run(run.workspace, "toy") == 1
    execute(use)
    assert verify_run(run.workspace, "toy") == 0
    payload = next(path for path in Path(make.output).iterdir() if path.suffix == ".jsonl")
    data = payload.read_bytes()
    payload.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    capsys.readouterr()
    assert verify_run(run.workspace, "toy") == 1
    assert f"DAMAGED  {make.key}: artifact's content has changed" in capsys.readouterr().out
    assert inspect(run.plan)[make.key].reasons[0].startswith("artifact's content has changed since it was made: ")


def test_what_slurm_holds_after_a_failed_launch_is_released_three_times(run: Run) -> None:
    """As after slurmctld was killed: it launched a job twice, and held it though its task had finished meanwhile."""
    run.finish("make")
    held = RUNNING.replace("RUNNING|None", "PENDING|launch failed requeued held")
    run.slurm(squeue=f"{held}\n{WAITS}\n{HEALER}")
    listen(run, "scontrol")
    told = [run.advance() for _ in range(4)]
    assert "make:all release: launch (1 of 3): Slurm says: launch failed requeued held" in told[0]
    assert "release" not in told[3]
    assert [line for line in said_to_slurm(run, "scontrol") if "release" in line] == ["release 41_0"] * 3
    assert run.sent == 0


def test_a_task_that_ends_releases_what_slurm_holds(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The follow-up job waits for the end of jobs, and a held one never ends."""
    run.slurm(squeue=RUNNING)
    listen(run, "scontrol")
    release_when_task_ends(run.workspace, "toy")
    assert said_to_slurm(run, "scontrol") == []
    run.slurm(squeue=RUNNING.replace("RUNNING|None", "PENDING|launch failed requeued held"))
    listen(run, "scontrol")
    for _ in range(4):
        release_when_task_ends(run.workspace, "toy")
    assert said_to_slurm(run, "scontrol") == ["release 41_0"] * 3
    assert "make:all release: launch (3 of 3)" in capsys.readouterr().out


def test_cancel_ends_jobs_on_a_full_disk_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fill it, and went on: no note could be taken of their end."""
    run.slurm(squeue=RUNNING)
    listen(run, "scancel")

    def full(path: Path, *_rows: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(decisions, "append_row", full)
    with pytest.raises(PipelineError, match="cancelled, but the disk took no note of it"):
        cancel(run.workspace, "toy", None)
    assert said_to_slurm(run, "scancel") == ["41_0"]


@pytest.mark.parametrize("command", ["rm", "gc"])
def test_runs_of_a_cluster_that_is_gone_can_be_deleted(
    run: Run, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`squeue` is there and never answers again: both commands asked to wait for it."""
    run.slurm(squeue="", code=1)
    asked = [command, "toy", "--workspace", str(run.workspace)]
    assert main(asked) == 2
    assert "where that cluster is gone for good, add --without-slurm" in capsys.readouterr().err
    assert main([*asked, "--without-slurm"]) == 0
    assert {"rm": "logs/toy", "gc": "nothing to delete"}[command] in capsys.readouterr().out


@pytest.mark.parametrize("ends", ["made", "cancelled"])
def test_finished_output_stays_until_a_rerun_has_made_it_again(run: Run, ends: str) -> None:
    make, use = run.plan.tasks
    execute(make)
    execute(use)
    first = (make.output / "run.json").read_bytes()
    ended = "41_0|COMPLETED|0:0|n1|1700000000||\n42_0|COMPLETED|0:0|n1|1700000000||"
    run.slurm(sacct=ended)
    rerun(run.workspace, "toy", "make")
    assert run.sent == 2  # and what reads from it
    assert (make.output / "run.json").read_bytes() == first
    assert inspect(run.plan)["make:all"].reasons == ("asked for with `prefmill rerun`",)
    row, _ = read_rows(run.workspace, "toy").rows
    assert row.state != "complete"
    if ends == "cancelled":
        cancel(run.workspace, "toy", "make")
    else:
        execute(make)
        kept = run.workspace / "data/toy/.superseded/make/all/run.json"
        assert kept.read_bytes() == first != (make.output / "run.json").read_bytes()
    assert inspect(run.plan)["make:all"].freshness == "complete"


def test_an_element_is_freed_of_an_array_that_it_does_not_need_and_that_never_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `evaluate` of a base model, in one array with that of a training whose dataset could not be made."""
    upstream = {"broken": [], "held": ["broken"], "free": [], "waits": ["held"]}
    tasks: Any = {key: SimpleNamespace(key=key) for key in upstream}
    plan: Any = SimpleNamespace(upstream=lambda task: [tasks[key] for key in upstream[task.key]])
    live = {"held": ("2", 0), "free": ("3", 0), "waits": ("3", 1)}
    never, array = JobState("PENDING", "DependencyNeverSatisfied"), "afterok:2_*(unfulfilled)"
    queue = {("2", 0): never, **{("3", n): JobState("PENDING", "Dependency", dependency=array) for n in (0, 1)}}
    view = View(plan, [], {}, queue, tasks, Decisions(run.workspace, "toy"), live)
    told: list[Any] = []
    monkeypatch.setattr(advance.slurm, "set_dependency", lambda element, text: told.append((element, text)) or True)
    advance._repoint(view, lambda line: None)
    assert told == [(("3", 0), "")]


def test_a_reader_that_has_gone_leaves_no_command_half_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prefmill advance | head -1`: the first task was submitted again, and those after it were not."""
    run.slurm(sacct="41_0|NODE_FAIL|0:0|n1|1700000000||\n42_0|NODE_FAIL|0:0|n1|1700000000||")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        advance.advance(run.workspace, "toy")
    assert run.sent == 2
