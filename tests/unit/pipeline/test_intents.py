"""One job for one intent, whatever sbatch answers; and submissions that were cut off are finished."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_sightings import RUNNING, Run

from prefmill.core.errors import PipelineError
from prefmill.slurm import intents
from prefmill.slurm.intents import FullError, Order, SbatchRefusedError, send, send_fitting, settle
from prefmill.slurm.status import read_rows
from prefmill.slurm.submission import read_submission, write_submission

TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
FULL = """sbatch: error: QOSMaxSubmitJobPerUserLimit
sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)"""
NO_PARTITION = "sbatch: error: Batch job submission failed: Invalid partition name specified"
# Keeps the names of the jobs it accepts, for squeue.
ACCEPT = 'for a in "$@"; do case $a in --job-name=*) echo "${a#--job-name=}|7" >> %s/accepted;; esac; done'


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = Run(tmp_path)
    monkeypatch.setenv("PATH", f"{made.programs}:/usr/bin:/bin")
    monkeypatch.setattr(intents, "_PAUSES", (0.01, 0.01, 0.01))
    (made.submission.folder / "jobs.jsonl").unlink()
    made.script("squeue", f"cat {made.programs}/accepted 2>/dev/null; exit 0")
    made.script("scontrol", "exit 0")
    return made


def sbatch(run: Run, *bodies: str) -> None:
    """What each call of sbatch does; the last body stands for all later calls."""
    count = f"echo x >> {run.programs}/sent; n=$(grep -c x {run.programs}/sent)"
    cases = "".join(f"{number}) {body};;\n" for number, body in enumerate(bodies, 1))
    run.script("sbatch", f"{count}\ncase $n in\n{cases}*) {bodies[-1]};;\nesac")


def fails(error: str, accepts: Run | None = None) -> str:
    accept = ACCEPT % accepts.programs + "; " if accepts else ""
    return f"{accept}printf '%s\\n' '{error}' >&2; exit 1"


def order(run: Run, *indices: int) -> Order:
    script = run.submission.folder / "arrays" / "make.0.sbatch"
    return Order(run.submission, "array", "make", 0, script, indices or (0,))


def test_what_was_accepted_but_reported_failed_is_found_by_its_name_and_not_sent_again(run: Run) -> None:
    for error in (TIMED_OUT, NO_PARTITION, "nonsense", FULL):
        sbatch(run, fails(error, accepts=run))
        record = send(order(run))
        assert record.job_id == "7"
        assert run.submission.open_intents() == []
    assert run.sent == 4
    assert [job.job_id for job in run.submission.jobs()] == ["7"] * 4


def test_a_transient_failure_is_tried_again_and_a_refusal_is_quoted(run: Run) -> None:
    sbatch(run, fails(TIMED_OUT), fails("nonsense"), "echo Submitted batch job 99")
    assert send(order(run)).job_id == "99"
    assert run.sent == 3
    sbatch(run, fails(NO_PARTITION))
    with pytest.raises(SbatchRefusedError, match="Invalid partition name specified"):
        send(order(run))
    assert run.sent == 4
    sbatch(run, fails('sbatch: option `--hold` takes no argument\nTry "sbatch --help" for more information'))
    with pytest.raises(SbatchRefusedError, match="takes no argument"):  # it was asked again for half a minute
        send(order(run))
    assert run.sent == 5
    assert run.submission.open_intents() == []


def test_nothing_is_sent_again_before_slurm_has_said_that_it_has_no_such_job(run: Run) -> None:
    sbatch(run, fails(TIMED_OUT, accepts=run))
    for silent in ("squeue", "scontrol"):  # an empty squeue alone is no evidence
        run.script("squeue", "exit 0")
        run.script(silent, "exit 1")
        with pytest.raises(PipelineError, match="Slurm takes no job now"):
            send(order(run))
    assert run.sent == 2
    assert len(run.submission.open_intents()) == 2
    assert list(settle([run.submission])) == []
    names = [intent.name for intent in run.submission.open_intents()]
    run.script("squeue", "exit 0")
    run.script("scontrol", f"echo 'JobId=9 ArrayJobId=8 ArrayTaskId=1 JobName={names[0]} UserId=x'")
    assert list(settle([run.submission])) == ["job 8 is make's: its submission was cut off before that was noted"]
    assert [(job.job_id, job.name) for job in run.submission.jobs()] == [("8", names[0])]
    assert run.submission.open_intents() == []  # of the other Slurm has said that there is no job


def test_of_two_jobs_of_one_call_that_was_cut_off_the_later_is_cancelled(run: Run) -> None:
    sbatch(run, fails(TIMED_OUT, accepts=run))
    run.script("squeue", "exit 1")
    run.script("scontrol", "exit 1")
    with pytest.raises(PipelineError, match="Slurm takes no job now"):
        send(order(run))
    (intent,) = run.submission.open_intents()
    jobs = [f"echo 'JobId={number} JobName={intent.name} UserId=x'" for number in (9, 8)]
    run.script("squeue", "exit 0")
    run.script("scontrol", "; ".join(jobs))
    run.script("scancel", f'echo "$@" >> {run.workspace}/cancelled')
    assert [line.split()[1] for line in settle([run.submission])] == ["8"]
    words = (run.workspace / "cancelled").read_text().split()
    assert "9" in words
    assert "8" not in words


def test_as_many_elements_are_sent_as_there_is_room_for(run: Run) -> None:
    few = 'case "$*" in *array=0-1*) echo Submitted batch job 5;; *) ' + fails(FULL) + ";; esac"
    sbatch(run, few)
    record = send_fitting(order(run, 0, 1, 2, 3, 4))
    assert record is not None
    assert record.indices == (0, 1)
    sbatch(run, fails(FULL))
    assert send_fitting(order(run, 0, 1)) is None
    with pytest.raises(FullError):
        send(order(run))


def test_a_submission_that_was_cut_off_is_told_and_finished_by_advance(run: Run) -> None:
    write_submission(replace(run.submission, wanted=(("make", 0, (0,)), ("use", 0, (0,)))))
    assert read_submission(run.submission.folder).wanted == (("make", 0, (0,)), ("use", 0, (0,)))
    sbatch(run, fails(FULL), fails(FULL), "echo Submitted batch job 41", fails(FULL))
    table = read_rows(run.workspace, "toy")
    assert [row.state for row in table.rows] == ["unsent", "unsent"]
    assert any("2 tasks are not submitted yet: `prefmill advance toy` does" in note for note in table.notes)
    assert "0 resubmitted" in run.advance()
    assert "make: 1 tasks wait until more jobs may be submitted" in run.advance()
    assert "1 resubmitted" in run.advance()
    run.slurm(squeue=RUNNING)
    run.script("sbatch", "echo Submitted batch job 42")
    assert "1 resubmitted" in run.advance()
    assert [(job.stage, job.dependency) for job in read_submission(run.submission.folder).jobs()] == [
        ("make", ""), ("use", "aftercorr:41"),
    ]  # fmt: skip


def test_a_refusal_stops_the_task_and_says_what_slurm_said(run: Run) -> None:
    write_submission(replace(run.submission, wanted=(("make", 0, (0,)),)))
    sbatch(run, fails(NO_PARTITION))
    assert "make:all stop: refused" in run.advance()
    row = read_rows(run.workspace, "toy").rows[0]
    assert row.state == "stopped"
    assert "Invalid partition name specified" in row.reason
    assert run.sent == 1
    run.advance()
    assert run.sent == 1
