"""`prefmill rerun` and `prefmill cancel`: what a person decides about a submitted run."""

from __future__ import annotations

from pathlib import Path

from prefmill.core.errors import PipelineError
from prefmill.pipeline.decisions import CANCEL, alone
from prefmill.pipeline.plan import PlannedTask
from prefmill.pipeline.worker import set_aside
from prefmill.slurm import jobs as slurm
from prefmill.slurm.advance import View, advance, look
from prefmill.slurm.jobs import Element
from prefmill.slurm.submission import require_owner, submissions
from prefmill.slurm.submit import Say
from prefmill.store.artifacts import read_manifest


def rerun(workspace: Path, run: str, selector: str, say: Say = print) -> None:
    """Submit the selected tasks again, whatever was decided about them, and have what reads from them wait.

    Finished output is set aside first. Tasks that are queued or running are left as they are.
    """
    with alone(workspace, run):
        require_owner(submissions(workspace, run))
        view = look(workspace, run)
        selected = view.plan.select(selector)
        never = [task.key for task in selected if task.key not in view.tried]
        if never:
            raise PipelineError(f"{never[0]} was never submitted", fix="submit it with `prefmill submit`")
        queued = [task.key for task in selected if _is_live(view, task)]
        nobody_knows = [task.key for task in selected if view.tried[task.key].element in view.unknown]
        if nobody_knows:
            raise PipelineError(
                f"Slurm says nothing of the job of {nobody_knows[0]}, which may still run",
                fix="try again in a few minutes; nothing was touched",
            )  # fmt: skip
        for key in queued:
            say(f"{key} is queued or running: left as it is")
        again = [task for task in selected if task.key not in queued]
        for task in again:
            if read_manifest(task.output) is not None:
                set_aside(task.output)
    advance(workspace, run, say, [task.key for task in again])


def cancel(workspace: Path, run: str, selector: str | None, say: Say = print) -> None:
    """End the selected tasks' jobs, or all of the run's; they stay ended until `prefmill rerun` or `submit`."""
    with alone(workspace, run):
        require_owner(submissions(workspace, run))
        view = look(workspace, run)
        selected = view.plan.select(selector) if selector else list(view.plan.tasks)
        tasks = [task for task in selected if _is_live(view, task)]
        for task in tasks:
            tried = view.tried[task.key]
            todo = f"`prefmill rerun {task.key}` when it is wanted again"
            number = tried.submission.number
            view.decisions.record(
                task.key, tried.name, CANCEL, kind="cancelled", why="cancelled with `prefmill cancel`",
                reason="asked for", todo=todo, submission=number,
            )  # fmt: skip
        elements = [view.tried[task.key].element for task in tasks] + ([] if selector else _advances(view))
        if elements and not slurm.cancel(elements):
            raise PipelineError("Slurm did not cancel every job", fix="see `squeue --me`, then cancel again")
        say(f"run {run}: {len(tasks)} tasks cancelled")


def _is_live(view: View, task: PlannedTask) -> bool:
    job = view.queue.get(view.tried[task.key].element) if task.key in view.tried else None
    return job is not None and job.live


def _advances(view: View) -> list[Element]:
    elements = [(job_id, -1) for one in view.submissions for job_id in one.advance_ids()]
    return [element for element in elements if (job := view.queue.get(element)) is not None and job.live]
