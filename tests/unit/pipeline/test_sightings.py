"""Evidence, not absence: what no command of Slurm shows is neither dead nor submitted again."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_slurm import pretend
from toys import toy_plan

from prefmill.cli.main import main
from prefmill.core.errors import PipelineError
from prefmill.pipeline.local import write_plan
from prefmill.pipeline.plan import PipelineFile, Plan
from prefmill.pipeline.task_status import at_work
from prefmill.pipeline.worker import locked
from prefmill.slurm import status
from prefmill.slurm import view as views
from prefmill.slurm.advance import advance
from prefmill.slurm.follow_up import LOOK_MINUTES, Wait
from prefmill.slurm.rerun import cancel, rerun
from prefmill.slurm.sightings import queued_tasks
from prefmill.slurm.submission import (
    ArrayFile,
    Submission,
    array_path,
    claim_folder,
    user_name,
    write_array,
    write_submission,
)
from prefmill.slurm.view import next_look
from prefmill.store.artifacts import remaking

ME = user_name()
RUNNING = f"41|0|41|RUNNING|None|n1|1700000000|{ME}|gpu|(null)"
WAITS = f"42|0|42|PENDING|Dependency||N/A|{ME}|gpu|afterok:41_0(unfulfilled)"
STUCK = WAITS.replace("Dependency|", "DependencyNeverSatisfied|")
HEALER = f"43|N/A|43|PENDING|Dependency||N/A|{ME}|gpu|afterany:41_*(unfulfilled)"
PURGED = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'


class Run:
    """Toy stages `make` and `use`, submitted as jobs 41 and 42, and commands that pretend to be Slurm's."""

    def __init__(self, folder: Path) -> None:
        self.workspace, self.programs = folder / "work", folder / "bin"
        self.programs.mkdir()
        self.plan: Plan = toy_plan(self.workspace)
        values = {"name": "toy", "workspace": str(self.workspace), "stages": {"make": {}, "use": {}}}
        pipeline = PipelineFile.model_validate(values).model_dump(mode="json")
        number, submitted = claim_folder(self.workspace, "toy")
        source = str(folder / "toy.yaml")
        self.submission = Submission(submitted, number, "toy", self.workspace, pipeline, source, {}, "", ME)
        write_submission(self.submission)
        write_plan(self.plan)
        for stage in ("make", "use"):
            write_array(ArrayFile(array_path(submitted, stage, 0), stage, 0, ("all",), {"nodes": 1}))
        self.record(age=1000.0)
        self.slurm()

    def record(self, age: float) -> None:
        """Have both jobs, and the one that looks after them, be this many seconds old."""
        rows = [("array", "make", "41", [0]), ("array", "use", "42", [0]), ("advance", "advance", "43", [])]
        keys = ("kind", "stage", "job_id", "indices")
        given = {"chunk": 0, "dependency": "", "time": time.time() - age}
        lines = [json.dumps({**dict(zip(keys, row, strict=True)), **given}) for row in rows]
        (self.submission.folder / "jobs.jsonl").write_text("\n".join(lines) + "\n")

    def slurm(self, squeue: str = "", sacct: str | None = None, show_job: str = "exit 1", code: int = 0) -> None:
        """What each command prints from now on; without `sacct` there is no accounting."""
        pretend(self.programs, "squeue", squeue, code=code)
        pretend(self.programs, "sacct", sacct or "", code=int(sacct is None))
        self.script("scontrol", f'case "$2" in config) echo "MinJobAge               = 300 sec";; *) {show_job};; esac')
        self.script("sbatch", f'echo "$@" >> {self.programs}/sent; echo "Submitted batch job 99"')

    def script(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def advance(self) -> str:
        said: list[str] = []
        advance(self.workspace, "toy", said.append)
        return "\n".join(said)

    @property
    def sent(self) -> int:
        """How often sbatch was called."""
        path = self.programs / "sent"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def finish(self, *stages: str) -> None:
        """Have these tasks' output be there, as far as `status` looks."""
        for task in self.plan.tasks:
            if task.stage.name in stages:
                task.output.mkdir(parents=True)
                (task.output / "manifest.json").write_text('{"content_digest": ""}')

    def left(self, state: str) -> None:
        """Have `make` leave a status of its job 41."""
        record = {"state": state, "time": time.time(), "error": "ValueError: a bug", "kind": "ValueError",
                  "job": {"array_job_id": "41", "array_task_id": "0"}}  # fmt: skip
        logs = self.plan.tasks[0].logs
        logs.mkdir(parents=True)
        (logs / "status.json").write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = Run(tmp_path)
    monkeypatch.setenv("PATH", str(made.programs))
    monkeypatch.setattr(views, "_SECONDS_BETWEEN_TRIES", (0,))
    return made


ABSENT = "neither squeue nor sacct shows its job; nothing is done about it"


@pytest.mark.parametrize(
    ("slurm", "said"),
    [
        ({}, f"make:all (41_0): {ABSENT}"),  # empty, exit code 0
        ({"squeue": WAITS}, f"make:all (41_0): {ABSENT}"),  # a part of the answer
        ({"squeue": f"{WAITS}\n41|0|41|RUNN"}, f"make:all (41_0): {ABSENT}"),
        ({"squeue": RUNNING.replace(ME, "eve")}, f"make:all (41_0): job 41_0 belongs to eve, not to {ME}"),
        ({"sacct": "41_0|RUNNING|0:0|n1|1700000000||"}, "2 tasks open, 1 queued or running, 0 resubmitted"),
        ({"sacct": "41_0|REQUEUED|0:0|n1|1700000000||"}, "2 tasks open, 1 queued or running, 0 resubmitted"),
    ],
)
def test_what_slurm_does_not_show_is_left_alone_and_told(run: Run, slurm: dict[str, Any], said: str) -> None:
    run.slurm(**slurm)
    assert said in run.advance()
    assert run.sent == 0
    assert not (run.submission.folder.parent / "decisions.jsonl").exists()


def test_a_queue_that_fails_changes_nothing(run: Run) -> None:
    run.slurm(code=1)
    with pytest.raises(PipelineError, match="Slurm does not answer"):
        run.advance()
    with pytest.raises(PipelineError, match="Slurm does not list its queue"):
        queued_tasks(run.plan)
    assert run.sent == 0


def test_with_evidence_it_is_submitted_again(run: Run) -> None:
    run.slurm(sacct="41_0|NODE_FAIL|0:0|n1|1700000000||", squeue=WAITS)
    assert "1 resubmitted" in run.advance()
    assert run.sent == 1


@pytest.mark.timing
@pytest.mark.parametrize(
    ("show_job", "age", "decided"),
    [
        (PURGED, 1000.0, True),
        ('echo "Job $3 not found"; exit 1', 1000.0, True),
        (PURGED, 100.0, False),  # no job of this age can have been purged
        ('echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1', 1000.0, False),
        ('echo "JobId=41 ArrayJobId=41"', 1000.0, False),
    ],
)
def test_a_job_id_that_slurm_no_longer_knows_has_ended(run: Run, show_job: str, age: float, decided: bool) -> None:
    run.record(age)
    run.slurm(show_job=show_job, squeue=WAITS)
    assert ("make:all stop: unknown" in run.advance()) == decided
    row = status.read_rows(run.workspace, "toy").rows[0]
    assert row.state == ("stopped" if decided else "unknown")
    assert run.sent == 0


@pytest.mark.parametrize(("state", "said"), [("failed", "make:all retry: bug"), ("requeued", ABSENT)])
def test_a_tasks_own_end_record_is_evidence(run: Run, state: str, said: str) -> None:
    run.left(state)
    run.slurm(squeue=WAITS)
    assert said in run.advance()


def test_submit_and_rerun_wait_for_an_answer(run: Run) -> None:
    with pytest.raises(PipelineError, match="says nothing of a job that may still run"):
        queued_tasks(run.plan)
    with pytest.raises(PipelineError, match="says nothing of the job of make:all"):
        rerun(run.workspace, "toy", "make", lambda _: None)
    run.slurm(squeue=f"{RUNNING}\n{WAITS}")
    assert sorted(queued_tasks(run.plan)) == ["make:all", "use:all"]


def test_somebody_elses_run_is_looked_at_only(run: Run) -> None:
    write_submission(replace(run.submission, owner="eve"))
    run.slurm(squeue=RUNNING.replace(ME, "eve"))
    for act in (advance, cancel, rerun):
        with pytest.raises(PipelineError, match=r"belongs to another user[\s\S]*expected: eve"):
            act(run.workspace, "toy", *([None] if act is cancel else ["make"] if act is rerun else []))
    assert status.read_rows(run.workspace, "toy").rows[0].state == "running"


class Looks:
    """Ends a watch that goes on: `then` is called between two looks, the last of which must not be reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *then: Any) -> None:
        self.then = list(then)
        monkeypatch.setattr(status, "time", SimpleNamespace(sleep=self.sleep, time=time.time))

    def sleep(self, _: float) -> None:
        assert self.then, "it should have ended"
        self.then.pop(0)()


def test_a_watch_goes_on_while_somebody_is_going_to_act(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a failure and its retry only the healer is queued; a queue that is silent says nothing."""
    failed = {"sacct": "41_0|NODE_FAIL|0:0|n1|1700000000||"}
    looks = Looks(
        monkeypatch,
        lambda: run.slurm(squeue=f"{HEALER}\n{STUCK}", **failed),
        lambda: run.slurm(),
        lambda: run.slurm(code=1),
        lambda: (run.finish("make"), run.slurm(squeue=WAITS)),
        lambda: run.finish("use"),
    )
    run.slurm(squeue=f"{RUNNING}\n{WAITS}")
    assert status.watch_status(run.workspace, "toy", 1.0) == 0
    assert looks.then == []


@pytest.mark.parametrize(
    ("finished", "slurm"),
    [
        (["make"], {"sacct": "42_0|FAILED|1:0|n1|1700000000||"}),  # nobody looks after it
        ([], {"squeue": STUCK, "sacct": "41_0|FAILED|1:0|n1|1||"}),
    ],
)
def test_a_watch_ends_with_1_where_something_is_open_that_nobody_acts_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, finished: list[str], slurm: dict[str, str]
) -> None:
    Looks(monkeypatch)
    run.finish(*finished)
    run.slurm(**slurm)
    assert status.watch_status(run.workspace, "toy", 1.0) == 1


@pytest.mark.parametrize("job", [RUNNING, WAITS, STUCK, HEALER])
def test_a_run_with_jobs_is_not_deleted_and_gc_leaves_what_they_go_on_from(run: Run, job: str) -> None:
    """Its jobs would be beyond `cancel`, and wait for ever where what they wait for has failed."""
    begun = remaking(run.plan.tasks[0].output)
    begun.mkdir(parents=True)
    words = ["toy", "--yes", "--workspace", str(run.workspace)]
    run.slurm(squeue=job)
    assert main(["rm", *words]) == 2
    assert main(["gc", *words]) == 0
    assert begun.is_dir()
    run.slurm(code=1)  # nobody knows
    assert [main([command, *words]) for command in ("rm", "gc")] == [2, 2]
    run.slurm(squeue=job.replace(f"|{ME}|", "|somebody|"))
    assert main(["gc", *words]) == 0
    assert not begun.is_dir()
    assert main(["rm", *words]) == 0
    assert not (run.workspace / "logs" / "toy").exists()


def test_what_a_local_run_is_at_is_looked_at_again_later(run: Run) -> None:
    """Its job found it taken: submitted again it would hold its GPUs, fail once more, and be given up."""
    run.slurm(squeue=WAITS, sacct="41_0|FAILED|2:0|n1|1700000000||")
    with locked(run.plan.tasks[0]):
        assert "0 resubmitted" in run.advance()
        assert next_look(views.look(run.workspace, "toy")) == Wait(minutes=LOOK_MINUTES)
    assert "1 resubmitted" in run.advance()


def test_a_task_is_not_submitted_again_beside_a_local_run(run: Run) -> None:
    with at_work(run.workspace, "toy"), pytest.raises(PipelineError, match="`prefmill run` on this machine"):
        rerun(run.workspace, "toy", "make")
    assert run.sent == 0


def test_a_watch_of_tasks_that_were_never_submitted_ends_with_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Looks(monkeypatch)
    (run.submission.folder / "jobs.jsonl").write_text("")
    assert status.watch_status(run.workspace, "toy", 1.0) == 1


def test_a_watch_of_a_local_run_goes_on_between_two_tasks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.submission.folder / "jobs.jsonl").write_text("")
    looks = Looks(monkeypatch, lambda: run.finish("make", "use"))
    with at_work(run.workspace, "toy"):
        assert status.watch_status(run.workspace, "toy", 1.0) == 0
    assert looks.then == []


SCRIPT = Path(__file__).resolve().parents[3] / "sbatch" / "dpo.sbatch"


@pytest.mark.parametrize("called_in", ["checkout", "elsewhere"])
def test_a_script_called_from_another_folder_finds_its_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called_in: str
) -> None:
    """Slurm runs a copy of the script, and says of an array's first job what every element was called with."""
    spool, elsewhere = tmp_path / "spool", tmp_path / "elsewhere"
    spool.mkdir()
    elsewhere.mkdir()
    copy = spool / "slurm_script"
    copy.write_text(SCRIPT.read_text())
    shown = [f"   Command={SCRIPT} configs/dpo/demo.yaml\n   WorkDir={elsewhere}", "   Command=/other/sbatch/x.sbatch"]
    pretend(tmp_path, "scontrol", "JobId=7 ArrayJobId=7\n" + "\n".join(shown))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(SCRIPT.parents[1] if called_in == "checkout" else elsewhere))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PREFMILL_PYTHON", "/bin/echo")
    import subprocess

    done = subprocess.run(["bash", str(copy), "some.yaml"], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.stdout == "-m prefmill.slurm.job --stage dpo some.yaml\n", done.stderr


def test_a_healer_that_is_held_is_told_and_ends_a_watch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scontrol hold` of a job that looks after a run: it was counted as going to act, for ever."""
    (run.submission.folder / "arrays/advance.sbatch").touch()
    held = HEALER.replace("Dependency|", "JobHeldUser|")
    run.slurm(squeue=f"{RUNNING}\n{held}")
    told = "the job that looks after this run does not start: JobHeldUser: somebody holds it; to do: `scontrol release"
    assert status.read_rows(run.workspace, "toy").notes == [f"{told} 43`"]
    run.slurm(squeue=f"{STUCK}\n{held}", sacct="41_0|FAILED|1:0|n1|1||")
    assert any("`prefmill advance toy` does" in note for note in status.read_rows(run.workspace, "toy").notes)
    Looks(monkeypatch)
    assert status.watch_status(run.workspace, "toy", 1.0) == 1
