"""The follow-up job of a run, which looks after all of its others: booked, told when to look again, booked anew."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefmill.core.errors import PipelineError, PrefmillError
from prefmill.core.terminal import Say
from prefmill.pipeline.decisions import CANCEL, RELEASE, Decisions, alone, show
from prefmill.slurm import jobs as slurm
from prefmill.slurm.elements import Tried, newest
from prefmill.slurm.intents import Order, send
from prefmill.slurm.jobs import Element, JobState, element_name
from prefmill.slurm.submission import ADVANCE, JobRecord, Submission, script_of, submissions

LOOK_MINUTES = 10
_JOBS_NAMED = 40  # those that end first; after each look they are named anew
# Six seconds. Where that is too short the job starts by itself, two minutes after its requeue.
_REQUEUE_TRIES = 60


@dataclass(frozen=True)
class Wait:
    """When to look again: when any of these jobs has ended, and not before `minutes` have passed."""

    job_ids: tuple[str, ...] = ()
    minutes: int = 0

    @property
    def dependency(self) -> str:
        """As Slurm writes it: one of them is enough. One that it has forgotten counts as ended."""
        return "?".join(f"afterany:{job_id}" for job_id in self.job_ids[:_JOBS_NAMED])

    @property
    def begin(self) -> str:
        """The earliest time to start."""
        return f"now+{self.minutes}minutes" if self.minutes else "now"


def send_follow_up(submission: Submission, wait: Wait) -> JobRecord:
    """Submit a follow-up job; raises PipelineError as `send` does."""
    options = (f"--begin={wait.begin}",)
    script = script_of(submission)
    return send(Order(submission, "advance", ADVANCE, 0, script, options=options, dependency=wait.dependency))


def live_follow_ups(found: Sequence[Submission]) -> dict[str, str] | None:
    """The state of every follow-up job of a run that is queued or running; None where Slurm does not answer.

    One that Slurm holds after a failed launch never starts by itself: it is as good as lost.
    """
    ids = [job_id for one in found for job_id in one.advance_ids()]
    shown = slurm.queue(ids) if ids else {}
    if shown is None:
        return None
    own = {job_id: job for (job_id, _), job in shown.items() if job_id in ids}
    return {job_id: job.state for job_id, job in own.items() if job.live and not job.held_after_launch}


def book(found: Sequence[Submission], wait: Wait) -> str:
    """Have the run's follow-up job look again as `wait` says, a new one where there is none; returns what to say."""
    if not script_of(found[-1]).is_file():
        return ""
    live = live_follow_ups(found)
    if live is None:
        return "Slurm does not say whether a job looks after the run"
    if live:  # one that runs looks when it has the lock, and then sees to itself
        for job_id in (job_id for job_id, state in live.items() if state == "PENDING"):
            postpone(job_id, wait)
        return ""
    slurm.cancel([(job_id, -1) for one in found[-1:] for job_id in one.advance_ids()])  # one that is held
    try:
        return f"job {send_follow_up(found[-1], wait).job_id} looks after the run"
    except PipelineError as error:
        return f"no job looks after the run now ({error.details['got']}): the next task to start or end books one"


def postpone(job_id: str, wait: Wait, has_run: bool = True) -> bool:
    """Have a pending follow-up job look when `wait` says; False where Slurm does not take that (yet).

    Slurm holds back a requeued job until its node has forgotten it (cred_expire). One that is started before is dropped
    there as "already killed": so the start of a job that has run is never brought forward.
    """
    words = [f"jobid={job_id}", f"dependency={wait.dependency}"]
    words += [f"StartTime={wait.begin}"] if wait.minutes or not has_run else []
    return slurm.ask(["scontrol", "update", *words]) is not None


def requeue(job_id: str, wait: Wait) -> bool:
    """Requeue this very follow-up job and have it look when `wait` says; False where Slurm refuses.

    First the requeue, which alone brings it back in two minutes; whatever stops this process then loses nothing.
    """
    if slurm.ask(["scontrol", "requeue", job_id]) is None:
        return False
    for _ in range(_REQUEUE_TRIES):  # accepted as soon as Slurm counts the job as pending again
        if postpone(job_id, wait):
            break
        time.sleep(0.1)
    return True


def book_again(workspace: Path, run: str, task: str) -> None:
    """Called where `task` starts or ends: have a follow-up job queued if there should be one. Its failure is told."""
    try:
        found = submissions(workspace, run)
        if not found or not script_of(found[-1]).is_file() or live_follow_ups(found) != {}:
            return
        # Only now the lock: hundreds of tasks may start at once, and nearly all have found nothing to do.
        with alone(workspace, run):
            found = submissions(workspace, run)
            # A task that `prefmill cancel` ends must not bring back a job that retries it.
            cancelled = Decisions(workspace, run).last(task).get("action") == CANCEL
            if not cancelled and (said := book(found, Wait(minutes=1))):
                print(f"prefmill: {said}", flush=True)
    except (PrefmillError, OSError) as error:
        print(f"prefmill: no job looks after the run: {error}", file=sys.stderr, flush=True)


def me() -> str:
    """The Slurm job this process is in; "" outside of any."""
    return os.environ.get("SLURM_JOB_ID", "")


# Slurm drains the node where a launch failed: a job that is at fault itself would drain them all.
_RELEASES = 3


def release_held(
    tried: Mapping[str, Tried], queue: Mapping[Element, JobState], decisions: Decisions, say: Say = print
) -> None:
    """Release those of `tried` that Slurm holds; a finished task's job too, for which others wait."""
    for key, one in tried.items():
        job = queue.get(one.element)
        past = [row for row in decisions.of(key) if (row["action"], row["element"]) == (RELEASE, one.name)]
        if job is None or not job.held_after_launch or len(past) >= _RELEASES:
            continue
        row = {"kind": "launch", "why": f"Slurm says: {job.reason}", "reason": f"{len(past) + 1} of {_RELEASES}"}
        decisions.record(key, one.name, RELEASE, submission=one.submission.number, **row)
        released = slurm.ask(["scontrol", "release", element_name(one.element)]) is not None
        say(show(key, {**row, "action": RELEASE}) + "; Slurm refused it" * (not released))


def release_when_task_ends(workspace: Path, run: str) -> None:
    """Called where a task ends: the follow-up job waits for the end of jobs, and a held one never ends."""
    try:
        tried = newest(submissions(workspace, run))
        queue = slurm.queue([one.job.job_id for one in tried.values()], states="PENDING") or {}
        if any(job.held_after_launch for job in queue.values()):
            with alone(workspace, run):
                release_held(tried, queue, Decisions(workspace, run))
    except (PrefmillError, OSError) as error:
        print(f"prefmill: held jobs were not looked for: {error}", file=sys.stderr, flush=True)
