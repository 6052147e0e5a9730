"""Inside a job: one task from beginning to end, its warnings, its requeue.

python -m prefmill.slurm.job ARRAY.json                                 an element of a submission
python -m prefmill.slurm.job --stage NAME [CONFIG] [key=value ...]      sbatch/NAME.sbatch, by hand
python -m prefmill.slurm.job --stages A,B PIPELINE [key=value ...]      sbatch/train_pipeline.sbatch
python -m prefmill.slurm.job --pipeline PIPELINE [key=value ...]        sbatch/run_pipeline.sbatch
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefmill.core.config import validate
from prefmill.core.errors import AttemptError, PipelineError, PrefmillError, explained
from prefmill.core.stage import Metrics, Task
from prefmill.pipeline.attempts import MAX_IDLE_ATTEMPTS, idle_attempts
from prefmill.pipeline.manual_submission import (
    ask_slurm,
    give_back_until_ready,
    pipeline_stage,
    stage_task,
    training_task,
)
from prefmill.pipeline.oom_backoff import read_smaller, start_over_when_smaller
from prefmill.pipeline.plan import PipelineFile, PlannedTask, plan_task
from prefmill.pipeline.subprocess_runner import REQUEUED, TERMINATED, Layout, SignalWatcher, run_elsewhere
from prefmill.pipeline.task_status import write_status
from prefmill.pipeline.worker import EXIT_BUG, EXIT_USER_ERROR, execute, log_path, print_into_log
from prefmill.slurm.cluster import SIGNAL_SECONDS, ClusterFile, Resources, read_secrets
from prefmill.slurm.follow_up import book_again, release_when_task_ends
from prefmill.slurm.jobs import ask
from prefmill.slurm.submission import read_array, read_submission

EXIT_TERMINATED, EXIT_NOT_REQUEUED = 143, 3
_REQUEUE_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class JobTask:
    """A task as its job knows it; `secrets` are read only when its processes start, `workspace` its submission's.

    `smaller` are keys with which it runs instead of its own, since its GPU's memory ran out; its identity stays.
    """

    task: PlannedTask
    signal_seconds: int = SIGNAL_SECONDS
    processes: int | None = None
    secrets: Callable[[], Mapping[str, str]] = dict
    smaller: Mapping[str, Any] = field(default_factory=dict)
    workspace: Path | None = None
    noted: Mapping[str, str] = field(default_factory=dict)  # as in `Submission`


def main(argv: Sequence[str]) -> int:
    """Run the element this job is; returns its exit code: 0 done, 1 a bug, 2 something the user can fix."""
    # Before anything is read: without a handler the first warning would end this process, and nothing be requeued.
    warnings = SignalWatcher(SIGNAL_SECONDS)
    warnings.listen()
    try:
        with explained():
            return next((code for job in _find(argv) if (code := _begin(job, warnings))), 0)
    except PrefmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _begin(job: JobTask, warnings: SignalWatcher) -> int:
    warnings.seconds = job.signal_seconds
    redirect(job.task)
    with _looked_after(job):
        return run(job, warnings)


def run(job: JobTask, warnings: SignalWatcher) -> int:
    """Bring the task to completion, or save and requeue this very element when the job is about to end."""
    layout = Layout.of_job(os.environ, job.task.stage.trains, job.processes or job.task.processes)

    def in_children(context: Task) -> Metrics:
        config = job.task.config.model_copy(update=job.smaller)
        # Checkpoints made with other microbatches hold random states that do not fit these.
        start_over_when_smaller(context, job.smaller)
        metrics = run_elsewhere(replace(job.task, config=config), context, layout, warnings, job.secrets())
        # These are no part of the identity, so only the manifest's metrics say what the task ran with.
        return {**metrics, **job.smaller}

    try:
        execute(job.task, run=in_children, noted=job.noted)
    except AttemptError as error:
        print(f"prefmill: {error}", file=sys.stderr, flush=True)
        if error.state == REQUEUED:
            return _requeue(job.task)
        if error.state == TERMINATED:
            return EXIT_TERMINATED
        return EXIT_BUG if error.record.get("kind") not in _MENDABLE else EXIT_USER_ERROR
    return 0


@contextmanager
def _looked_after(job: JobTask) -> Iterator[None]:
    """Have a job look after the run, where one should and none does, before the task begins and when it has ended."""
    if job.workspace is None:
        yield
        return
    where = (job.workspace, job.task.run, job.task.key)
    book_again(*where)
    try:
        yield
    finally:
        book_again(*where)
        release_when_task_ends(job.workspace, job.task.run)


def leave_array_of_submitter() -> None:
    """Drop the array element that this process's environment names where Slurm shows that its job is no array.

    sbatch hands on the variables of an element that submits: a job would take that one's task, and requeue it.
    """
    shown = ask(["scontrol", "-o", "show", "job", os.environ.get("SLURM_JOB_ID", "")])
    if shown and "ArrayJobId=" not in shown:
        for name in [name for name in os.environ if name.startswith("SLURM_ARRAY_")]:
            del os.environ[name]


def element_id(environment: Mapping[str, str]) -> str | None:
    """The id of this very element: with SLURM_JOB_ID alone, requeueing one may requeue its whole array."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def redirect(task: PlannedTask) -> None:
    """Have this process and its children print into the task's log; Slurm's own file says where that is."""
    print(f"{task.key}: see {log_path(task)}", flush=True)
    print_into_log(task)
    print(f"--- {task.key} in job {element_id(os.environ)} on {os.uname().nodename}", flush=True)


def _find(argv: Sequence[str]) -> list[JobTask]:
    """The tasks this job is to run, one after the other; none where it has given its node back to wait for others."""
    if argv[0] not in ("--stage", "--stages", "--pipeline"):
        return [submitted_task(Path(argv[0]), os.environ)]
    leave_array_of_submitter()
    if argv[0] == "--stage":
        return [JobTask(stage_task(argv[1], argv[2:], os.environ))]
    if argv[0] == "--pipeline":
        tasks, waits_for = pipeline_stage(argv[1:], os.environ)
    else:
        task, waits_for = training_task(argv[1].split(","), argv[2:], os.environ)
        tasks = [task]
    if waits_for:
        give_back_until_ready(str(element_id(os.environ)), waits_for)
        return []
    return [JobTask(task) for task in tasks]


def submitted_task(path: Path, environment: Mapping[str, str]) -> JobTask:
    """The element of a submission's array that SLURM_ARRAY_TASK_ID names."""
    array = read_array(path)
    submission = read_submission(array.submission)
    index = int(environment["SLURM_ARRAY_TASK_ID"])
    if index >= len(array.tasks):
        raise PipelineError(
            "this array has no such element", where=path, got=index, expected=f"0-{len(array.tasks) - 1}",
            fix="submit this script with an --array inside that range",
        )  # fmt: skip
    pipeline = validate(PipelineFile, submission.pipeline, where=submission.folder)
    cluster = validate(ClusterFile, submission.cluster, where=submission.folder)
    resources = validate(Resources, array.resources, where=path)
    task = plan_task(pipeline, Path(submission.source), array.stage, array.tasks[index])
    secrets = partial(read_secrets, cluster.secrets) if cluster.secrets else dict
    smaller = read_smaller(task.logs, submission.number)
    of_submission = (submission.workspace, submission.noted)
    return JobTask(task, cluster.signal_seconds, resources.processes, secrets, smaller, *of_submission)


def _requeue(task: PlannedTask) -> int:
    """Have Slurm start this element again; not when that has led nowhere so often that it never will."""
    me = element_id(os.environ)
    if idle_attempts(task.logs) >= MAX_IDLE_ATTEMPTS:
        text = f"stopped {MAX_IDLE_ATTEMPTS} times in a row without getting further"
        error = PipelineError(
            text, where=task.key, fix="raise its `time_limit_minutes`, or lower save_steps, and submit again"
        )
        return _given_up(task, "NoProgress", error)
    if me is None:
        return EXIT_NOT_REQUEUED
    # Slurm may end scontrol with the job before it has answered, which looked like a refusal; this is inherited by it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if refused := ask_slurm("scontrol", "requeue", me)[1]:
        error = PipelineError("Slurm does not requeue this job", got=refused, fix="submit again: it resumes")
        return _given_up(task, "NotRequeued", error)
    print(f"prefmill: requeued {me}", flush=True)
    time.sleep(_REQUEUE_PATIENCE_SECONDS)  # Slurm ends this process
    return 0


def _given_up(task: PlannedTask, kind: str, error: PipelineError) -> int:
    write_status(task, "failed", error=str(error), kind=kind)
    print(f"error: {error}", file=sys.stderr)
    return EXIT_NOT_REQUEUED


_MENDABLE = {"ConfigError", "InputError", "ArtifactError", "PipelineError", "PrefmillError"}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
