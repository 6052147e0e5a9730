"""Jobs submitted by hand: which task an element of `sbatch --array=... sbatch/X.sbatch` is."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from prefmill.core.config import merge, split_override, validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.stage import load_stage
from prefmill.pipeline.checked_plan import plan_to_run
from prefmill.pipeline.overrides import joined, require_signs, with_stage_keys
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask, read_pipeline
from prefmill.pipeline.task_status import read_status
from prefmill.store.artifacts import read_manifest

_OWN_KEYS = ("run=", "workspace=", "mount_dir=", "task=", "array.", "inputs.", "processes=", "share=")
_DEFAULT_PIPELINE = Path("configs/pipelines/train.yaml")
_UPDATE_TRIES = 40
_SLURM_SECONDS = 120


def stage_plan(stage: str, arguments: Sequence[str], is_array: bool = False) -> tuple[Plan, str | None]:
    """The plan that `[CONFIG] [key=value ...]` gives for one stage, and the task it names, if any.

    An array without `array.KEY=` is over the modalities, in their order, where the stage has any. `mount_dir` is
    another name of `workspace`.
    """
    arguments = joined(arguments)
    config, overrides = (arguments[0], arguments[1:]) if arguments else (None, [])
    # A file may have `=` in its name, so what exists is taken for a file.
    if config is not None and "=" in config and not Path(config).exists():
        config, overrides = None, arguments
    require_signs(overrides)
    # Under the stage's name too, as in a pipeline: `dpo.beta=0.2`.
    overrides = [item.removeprefix(f"{stage}.") for item in overrides]
    where = [item for item in overrides if item.startswith(_OWN_KEYS)]
    names = [item.removeprefix("task=") for item in where if item.startswith("task=")]
    given = merge({}, [item for item in where if not item.startswith("task=")])
    if "mount_dir" in given:
        given = {"workspace": given.pop("mount_dir"), **given}
    field = load_stage(stage).config.model_fields.get("modality") if is_array else None
    array = given.pop("array", None) or ({"modality": list(get_args(field.annotation))} if field is not None else {})
    entry = {
        "config": config,
        "array": array,
        "inputs": given.pop("inputs", {}),
        "processes": given.pop("processes", None),
    }
    keys = [f"{stage}.{item}" for item in overrides if item not in where]
    values = with_stage_keys({"name": stage, "stages": {stage: entry}, **given}, keys)
    pipeline = validate(PipelineFile, values, where="the command line")
    # Errors then name the command line as the place of a wrong key: there is no pipeline file here.
    pipeline._overridden = frozenset(split_override(item)[0] for item in keys)
    # A bare name is a file of the stage's own folder, as it is in a pipeline.
    file = Path(config or ".")
    plan = plan_to_run(pipeline, file if file.suffix or not config else Path("configs", stage, config))
    return plan, names[-1] if names else None


def stage_task(stage: str, arguments: Sequence[str], environment: Mapping[str, str]) -> PlannedTask:
    """The element of one stage that this job is."""
    # An array of one too: `--array=1` is how one element is submitted again.
    plan, name = stage_plan(stage, arguments, "SLURM_ARRAY_TASK_ID" in environment)
    if name is not None:
        return plan.select(f"{stage}:{name}")[0]
    return element(plan.tasks, environment)


def training_task(
    stages: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[PlannedTask, list[str]]:
    """The element of several stages' tasks, one stage after the other, and the elements it has to wait for.

    Raises PipelineError where what it reads is missing and no element of this array is going to make it.
    """
    plan = _plan_of(arguments)[1]
    tasks = [task for stage in stages for task in plan.tasks if task.stage.name == stage]
    task = element(tasks, environment)
    missing = {tasks.index(other): other for other in plan.upstream(task) if other in tasks and not _made(other)}
    return task, _queued_elements(missing, environment) if missing else []


def pipeline_stage(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[PlannedTask], list[str]]:
    """All tasks of the stage that this element is, and the elements it has to wait for.

    Stages count from 0 in the order of the pipeline file. Raises ConfigError where there is no such stage,
    PipelineError where what it reads is missing and no element of this array is going to make it.
    """
    pipeline, plan = _plan_of(arguments)
    stages = list(pipeline.stages)
    index = int(environment.get("SLURM_ARRAY_TASK_ID", "-1"))
    if not 0 <= index < len(stages):
        numbered = ", ".join(f"{number} {stage}" for number, stage in enumerate(stages))
        raise ConfigError(
            "this pipeline has no such stage", got=f"SLURM_ARRAY_TASK_ID={environment.get('SLURM_ARRAY_TASK_ID')}",
            expected=numbered, fix=f"submit with --array=0-{len(stages) - 1}, or some of these numbers",
        )  # fmt: skip
    tasks = plan.select(stages[index])
    makers = [other for task in tasks for other in plan.upstream(task) if not _made(other)]
    missing = {stages.index(other.stage.name): other for other in makers}
    return tasks, _queued_elements(missing, environment) if missing else []


def _plan_of(arguments: Sequence[str]) -> tuple[PipelineFile, Plan]:
    """The pipeline that `[PIPELINE] [key=value ...]` names, and its plan."""
    path, overrides = (Path(arguments[0]), arguments[1:]) if arguments else (_DEFAULT_PIPELINE, [])
    if "=" in path.name and not path.exists():
        path, overrides = _DEFAULT_PIPELINE, arguments
    pipeline = read_pipeline(path, overrides)
    return pipeline, plan_to_run(pipeline, path)


def give_back_until_ready(me: str, waits_for: Sequence[str]) -> None:
    """Requeue this element behind those it waits for; Slurm ends this process while it does so.

    Held first, so that it cannot start again before the dependency is there, and released last.
    """
    print(f"prefmill: {me} waits for {', '.join(waits_for)}", flush=True)
    # Slurm's TERM reaches every process of the job; unlike a handler, this is inherited by the commands below.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # afterok and not afterany: without what those make, this element could only fail.
    dependency = f"dependency=afterok:{':'.join(waits_for)}"
    if refused := ask_slurm("scontrol", "requeuehold", me)[1]:
        raise PipelineError(  # sbatch --no-requeue, or no scontrol in its container
            "Slurm does not take this element back to wait", got=refused,
            expected=f"{', '.join(waits_for)} to have ended", fix=f"submit it again with --{dependency}",
        )  # fmt: skip
    for _ in range(_UPDATE_TRIES):  # accepted as soon as Slurm counts the job as pending again
        if not ask_slurm("scontrol", "update", f"jobid={me}", dependency)[1]:
            break
        time.sleep(0.1)
    else:
        raise PipelineError(f"{me} is held: Slurm did not take its dependency", fix=f"scontrol release {me}")
    if refused := ask_slurm("scontrol", "release", me)[1]:
        raise PipelineError(f"{me} is held: Slurm does not release it", got=refused, fix=f"scontrol release {me}")


def element(tasks: Sequence[PlannedTask], environment: Mapping[str, str]) -> PlannedTask:
    """The task whose place SLURM_ARRAY_TASK_ID names; raises ConfigError where there is none."""
    index = int(environment.get("SLURM_ARRAY_TASK_ID", "0"))
    # Without an index the first of several tasks would be a guess.
    if index >= len(tasks) or ("SLURM_ARRAY_TASK_ID" not in environment and len(tasks) > 1):
        raise ConfigError(
            "this array has no such element", got=f"SLURM_ARRAY_TASK_ID={environment.get('SLURM_ARRAY_TASK_ID')}",
            expected=f"0 to {len(tasks) - 1}: {', '.join(task.key for task in tasks)}",
            fix="submit with a matching --array, or give the array's keys, for example array.shard=8",
        )  # fmt: skip
    return tasks[index]


def _made(task: PlannedTask) -> bool:
    return read_manifest(task.output) is not None


def _queued_elements(makers: Mapping[int, PlannedTask], environment: Mapping[str, str]) -> list[str]:
    """The elements of this array that are to make what is missing, by their indices."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    alive = _indices_queued(str(array), environment)
    lost = [index for index in makers if array is None or index not in alive]
    if lost:
        job = _job_of(makers[lost[0]])
        # It may be another job's: of an array submitted before, or of `prefmill submit`.
        at_work = job is not None and bool(_indices_queued(job, environment))
        raise PipelineError(
            f"an input of this element is missing, and element {lost[0]} is not queued",
            got=f"{makers[lost[0]].key} is made by job {job}" if at_work else None,
            fix=f"submit this one again with --dependency=afterok:{job}" if at_work
            else "see why that one ended, then submit it and this one again",
        )  # fmt: skip
    return [f"{array}_{index}" for index in sorted(makers)]


def _indices_queued(job: str, environment: Mapping[str, str]) -> set[int]:
    """The indices of a job's elements that are queued or run; -1 of one that is no array."""
    # -r, as pending elements of an array otherwise share one row, whose %K is a range. SQUEUE_PARTITION and its like
    # come along from the shell that called sbatch, and would hide some.
    own = {key: value for key, value in environment.items() if not key.startswith("SQUEUE_")}
    shown, refused = ask_slurm("squeue", "-h", "-r", "-j", job, "-o", "%K", environment=own)
    if refused and "Invalid job id" not in refused:  # as of a job that has ended long ago
        raise PipelineError(
            "an input of this element is missing, and Slurm does not say whether it is being made", got=refused,
            fix="submit this one again with --dependency=afterok:JOB of what makes it",
        )  # fmt: skip
    return {int(word) if word.isdigit() else -1 for word in shown.split()}


def _job_of(task: PlannedTask) -> str | None:
    """The job that was at the task last, as Slurm's commands name it."""
    job = read_status(task.logs).get("job", {})
    in_array = f"{job['array_job_id']}_{job['array_task_id']}" if "array_job_id" in job else None
    return in_array or job.get("job_id")


def ask_slurm(*command: str, environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """What a command of Slurm prints, and why it failed, "" where it did not; a job's container may have none."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SLURM_SECONDS, check=False, env=environment
        )
    except OSError as error:
        return "", f"{command[0]} cannot be run on {os.uname().nodename}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} did not answer in {_SLURM_SECONDS} seconds"
    return done.stdout, (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
