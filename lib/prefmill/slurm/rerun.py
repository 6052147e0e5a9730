"""`prefmill rerun` and `prefmill cancel`: what a person decides about a submitted run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefmill.core.errors import PipelineError, select
from prefmill.core.places import MANIFEST, WANTED_AGAIN
from prefmill.core.terminal import Say, say_on
from prefmill.pipeline.decisions import CANCEL, Decisions, alone
from prefmill.pipeline.task_status import refuse_beside_run
from prefmill.slurm import jobs as slurm
from prefmill.slurm.advance import advance
from prefmill.slurm.elements import Tried, elements_of, newest, unsent
from prefmill.slurm.intents import settle
from prefmill.slurm.sightings import live_elements
from prefmill.slurm.submission import require_owner, submissions
from prefmill.slurm.view import look


def rerun(workspace: Path, run: str, selector: str, say: Say = say_on) -> None:
    """Submit the selected tasks again, whatever was decided about them, and have what reads from them wait.

    Finished output stays in its place until the new one is published. Tasks that are queued or running are left alone.
    """
    with alone(workspace, run):
        require_owner(submissions(workspace, run))
        refuse_beside_run(workspace, run)
        view = look(workspace, run)
        selected = view.plan.select(selector)
        never = [task.key for task in selected if task.key not in view.tried]
        if never:
            raise PipelineError(f"{never[0]} was never submitted", fix="submit it with `prefmill submit`")
        queued = [task.key for task in selected if (job := view.queue.get(view.tried[task.key].element)) and job.live]
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
            if (task.output / MANIFEST).is_file():
                (task.logs / WANTED_AGAIN).touch()
    # Outside of the lock, which `advance` takes itself.
    advance(workspace, run, say, [task.key for task in again])


def cancel(workspace: Path, run: str, selector: str | None, say: Say = say_on) -> None:
    """End every job of the run, or of the selected tasks, whichever command or attempt submitted it.

    They stay ended until `prefmill rerun` or `submit`. No output is looked at: nothing in it can be in the way. Nor is
    a full disk, which only cancelled jobs may stop filling; raises PipelineError where it took no note.
    """
    refused: list[OSError] = []
    with alone(workspace, run):
        found = submissions(workspace, run)
        require_owner(found)
        with _despite(refused):
            for line in settle(found):
                say(line)
        known = newest(found) | unsent(found)
        tried = {key: known[key] for key in (select(selector, known, "was submitted") if selector else known)}
        live = live_elements(found)
        if live is None:
            raise PipelineError("Slurm does not answer", fix="cancel again when `squeue` does")
        every = {element: key for one in found for element, key in elements_of(one)}
        ended = [element for element in live if (selector is None or every.get(element) in tried)]
        keys = {every[element] for element in ended if element in every} | {
            k for k, one in tried.items() if not one.sent
        }
        # Noted before scancel: no look retries what ends now, and no ending task books another follow-up job.
        with _despite(refused):
            for key in sorted(keys):
                _note_cancel(Decisions(workspace, run), key, tried[key])
            for key in tried:  # finished output that was to be made again is wanted as it is
                (workspace / "logs" / run / key.replace(":", "/", 1) / WANTED_AGAIN).unlink(missing_ok=True)
        if ended and not slurm.cancel(ended):
            raise PipelineError("Slurm did not cancel every job", fix="see `squeue --me`, then cancel again")
        say(f"run {run}: {len(keys)} tasks cancelled")
    if refused:
        raise PipelineError(
            "cancelled, but the disk took no note of it", where=refused[0].filename, got=refused[0].strerror,
            fix="make room, and cancel again: a job that looks after the run would submit these tasks again",
        )  # fmt: skip


@contextmanager
def _despite(refused: list[OSError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        refused.append(error)


def _note_cancel(decisions: Decisions, key: str, tried: Tried) -> None:
    decisions.record(
        key, tried.name, CANCEL, kind="cancelled", why="cancelled with `prefmill cancel`", reason="asked for",
        todo=f"`prefmill rerun {key}` when it is wanted again", submission=tried.submission.number,
    )  # fmt: skip
