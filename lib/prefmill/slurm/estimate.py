"""`prefmill estimate`: what each stage asks for against what its partition has, and what training needs on each GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from prefmill.checklist.engine import TransformersConfig, VllmConfig
from prefmill.core.errors import PipelineError
from prefmill.core.terminal import Say
from prefmill.distributed.devices import visible_gpus
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.pipeline.task_status import manifest_fault
from prefmill.slurm.cluster import ClusterFile, Resources, not_taken_along, resources_for
from prefmill.slurm.forecast import is_measurable, stated
from prefmill.slurm.host_memory import given_by_job, given_here
from prefmill.slurm.partitions import Partition, fits_when_back, gpu_kind, gpu_memory_gb, offer_of, partitions
from prefmill.slurm.policy import SitePolicy, by_stage, objections, read_policy
from prefmill.slurm.script import refusal
from prefmill.slurm.training_needs import show_trainings
from prefmill.training.config import TrainingConfig

LOCAL_FILESYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", "f2fs"}
_MOUNTS = Path("/proc/self/mounts")


def filesystem(path: Path) -> str:
    """The kind of file system that holds `path` or will, as `ext4` or `nfs4`; "" where that is not known."""
    try:
        lines = [line.split(" ") for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    # The kernel writes a space in a path as \040, since spaces part its fields.
    mounts = {Path(fields[1].replace("\\040", " ")): fields[2] for fields in lines}
    absolute = path.absolute()
    return next((mounts[parent] for parent in (absolute, *absolute.parents) if parent in mounts), "")


def estimate(
    pipeline: PipelineFile, plan: Plan, cluster: ClusterFile, gpu_gb: float | None, say: Say = print, tiny: bool = False
) -> None:
    """Print what every stage asks for and training needs; raises PipelineError for what can never start, or fit.

    A `tiny` pipeline may train on CPUs.
    """
    offered = partitions()
    policy = read_policy() if offered else None
    if offered is None:
        say("Slurm does not answer here: requests are not checked against partitions")
    problems: list[str] = []
    for stage, tasks in by_stage(plan).items():
        resources = resources_for(cluster, stage, pipeline.stages[stage].resources)
        say(_request(stage, len(tasks), resources))
        found = list(objections(cluster, resources, offered, policy)) if offered else []
        found += [*([] if tiny else _without_gpu(tasks[0], resources, offered)), *_missing_inputs(plan, tasks)]
        if offered and not found:  # what the rules above do not say
            found += refusal(cluster, resources)
            # Slurm tells of nodes that are away for a day what it tells of those that no partition has.
            if found and "not available" in found[0] and fits_when_back(resources):
                say(f"{stage}: not now. {found.pop()} (with nodes that are away now it may start: `sinfo -R`)")
        problems += [f"{stage}: {text}" for text in found]
        given = given_by_job(resources, offered or {})
        problems += show_trainings(plan, tasks, resources, _card_gb(resources, offered or {}, gpu_gb), given, say)
        for line in _stated_hours(cluster, tasks[0], resources, offered or {}):
            say(line)
    about_site = (*not_taken_along(cluster, os.environ), *_place_notes(plan, cluster))
    for note in (*about_site, *_limit_notes(plan, cluster, policy)):
        say(note)
    _refuse(problems, "correct these in the cluster file, the pipeline's `resources` or the stage's configuration")
    say("every request can start" if offered else "no problems found (partition limits not checked: Slurm unreachable)")


def estimate_here(plan: Plan, gpu_gb: float | None, say: Say = print) -> None:
    """Print what trainings need that `prefmill run` runs here; raises PipelineError for one that does not fit."""
    here, given = Resources(gpus=len(visible_gpus())), given_here()
    problems: list[str] = []
    for stage, tasks in by_stage(plan).items():
        if tasks[0].stage.trains:
            say(f"{stage}:")
            problems += show_trainings(plan, tasks, here, gpu_gb, given, say)
    _refuse(problems, "correct these in the stage's configuration, or run on a larger machine")
    say(f"every training whose model is known fits ({given.by} {given.gb:.1f} GB)")


def _refuse(problems: Sequence[str], fix: str) -> None:
    if problems:
        listed = "\n".join(["", *(f"    {line}" for line in problems)])
        raise PipelineError("this would never start, or not fit", got=listed, fix=fix)


def _stated_hours(
    cluster: ClusterFile, task: PlannedTask, resources: Resources, offered: Mapping[str, Partition]
) -> Iterator[str]:
    """What the site's throughput table says of a task, where the kind of its GPUs is known, or the table has one."""
    known = gpu_kind(_gpu_name(resources, offered))
    kinds = [known] if known else list(cluster.throughput)
    if len(kinds) == 1 and is_measurable(task):
        yield from stated(task, resources, cluster.throughput.get(kinds[0], {}), kinds[0])


def _gpu_name(resources: Resources, offered: Mapping[str, Partition]) -> str:
    partition = offer_of(resources.partition, offered)
    return resources.gpu_type or (partition.gpu_type if partition else "")


def _without_gpu(task: PlannedTask, resources: Resources, offered: Mapping[str, Partition] | None) -> Iterator[str]:
    """A training or a judge takes days on CPUs; a site that has no GPU at all is there for small models."""
    if resources.gpus or not (offered is None or any(partition.gpus for partition in offered.values())):
        return
    does = "trains" if isinstance(task.config, TrainingConfig) and task.stage.trains else ""
    does = does or next((f"judges with {name}" for name in _judges(task.config)), "")
    if does:
        yield f"it {does} and gets no GPU: give it some as `gpus` under stages.{task.stage.name} of the cluster file"


def _judges(config: BaseModel) -> Iterator[str]:
    """The models that this process itself is to run as judges."""
    for value in vars(config).values():
        if isinstance(value, TransformersConfig | VllmConfig):
            yield value.model_name_or_path
        elif isinstance(value, BaseModel):
            yield from _judges(value)


def _missing_inputs(plan: Plan, tasks: Sequence[PlannedTask]) -> Iterator[str]:
    """Inputs from outside the pipeline that are not there."""
    made = {task.output for task in plan.tasks}
    wanted = dict.fromkeys(path for task in tasks for paths in task.inputs.values() for path in paths)
    missing = (path for path in wanted if path not in made and manifest_fault(path) != "")
    yield from (f"its input {path} is not finished" for path in missing)


def _place_notes(plan: Plan, cluster: ClusterFile) -> Iterator[str]:
    """Places that compute nodes may not see, by the kind of file system they are on here."""
    for what, path in (("the workspace", plan.workspace), ("the interpreter", Path(cluster.python or sys.executable))):
        kind = filesystem(path)
        # Only a note: a disk of this machine may be exported to the nodes under the same path.
        if kind in LOCAL_FILESYSTEMS:
            yield f"{what} {path} is on a disk of this machine ({kind}): nodes see it only if it is exported to them"


def _limit_notes(plan: Plan, cluster: ClusterFile, policy: SitePolicy | None) -> Iterator[str]:
    limit = policy.submit_limit(cluster) if policy else None
    taken = len(plan.tasks) + cluster.advance  # the job that looks after the run counts too
    if limit is not None and taken > limit:
        yield f"{limit} jobs may be submitted at once, this takes {taken}: the rest follows as jobs end"


def _card_gb(resources: Resources, offered: Mapping[str, Partition], given: float | None) -> float | None:
    return given or gpu_memory_gb(_gpu_name(resources, offered))


def _request(stage: str, count: int, resources: Resources) -> str:
    memory = f", {resources.memory_gb:g} GB" if resources.memory_gb else ""
    hours = count * resources.nodes * resources.gpus * resources.time_limit_minutes / 60
    cost = f"; at most {hours:.0f} GPU-hours" if hours else ""
    return (
        f"{stage}: {count} x {resources.nodes} nodes of {resources.gpus} GPUs, {resources.cpus} CPUs{memory} in "
        f"{resources.partition or 'the default partition'} for {resources.time_limit_minutes} minutes{cost}"
    )
