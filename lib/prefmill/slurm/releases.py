"""Jobs that Slurm holds since a node could not launch them, as after slurmctld was killed: they are started again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from prefmill.core.errors import PrefmillError
from prefmill.pipeline.decisions import RELEASE, Decisions, alone, show
from prefmill.slurm import jobs as slurm
from prefmill.slurm.elements import Tried, newest
from prefmill.slurm.jobs import Element, JobState, element_name
from prefmill.slurm.submission import submissions
from prefmill.slurm.view import Say

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
