"""`prefmill estimate`: what each stage asks for against what its partition has, and what training needs on each GPU."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from prefmill.checklist.engine import TransformersConfig, VllmConfig
from prefmill.core.errors import PipelineError, PrefmillError
from prefmill.core.terminal import Say
from prefmill.families.mdlm.config import DiffusionTrainingConfig
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.pipeline.task_status import manifest_fault
from prefmill.slurm.cluster import ClusterFile, Resources, not_taken_along, resources_for
from prefmill.slurm.forecast import is_measurable, rows_of, stated
from prefmill.slurm.memory import ORIGINS, GpuMemory, gpu_memory, host_memory, model_size, sharding
from prefmill.slurm.partitions import Partition, fits_when_back, gpu_kind, gpu_memory_gb, offer_of, partitions
from prefmill.slurm.policy import SitePolicy, by_stage, objections, read_policy
from prefmill.slurm.script import refusal
from prefmill.training.config import TrainingConfig, accumulation
from prefmill.training.preference_config import PreferenceConfig

_SCORER_LOGITS, _TRL_LOGITS = 256, 1024  # tokens whose logits exist together, in DPO's scorer and TRL's loss
_UNKNOWN = "not known before"


@dataclass(frozen=True)
class Training:
    """What a training task needs: memory of each GPU, optimizer steps; None with the reason where it is not known."""

    world: int
    model: str
    memory: GpuMemory | None
    steps: int | None
    notes: tuple[str, ...] = ()


def training_needs(plan: Plan, task: PlannedTask, resources: Resources) -> Training:
    """What a training task needs, as far as it is known now; raises ConfigError for a batch that does not divide."""
    config = task.config
    assert isinstance(config, TrainingConfig), f"{task.stage.name} trains, but not by a TrainingConfig"
    world = resources.ranks(task.processes)
    # For its error alone: a batch that does not divide among the ranks would end the job at its start.
    accumulation(config, world)
    name, revision = _model_of(plan, task)
    steps = _steps(task, config)
    notes = [] if steps is not None else [f"steps: {_UNKNOWN} its dataset is made"]
    if name is None:
        return Training(world, "", None, steps, (*notes, f"memory: {_UNKNOWN} its model is made"))
    if task.stage.on == "images":
        return _image_training(config, world, name, steps, notes)
    pairs, diffusion = isinstance(config, PreferenceConfig), isinstance(config, DiffusionTrainingConfig)
    rows = config.per_device_train_batch_size * (2 if pairs else 1)
    if isinstance(config, DiffusionTrainingConfig):
        rows = config.forward_batch_size
        notes.append(f"{rows} maskings run together and are recomputed: draws take time, not memory")
        if sharding(config).stage == 3 and config.deepspeed:  # as the trainer does
            config = config.model_copy(update={"activation_checkpointing": True})
    if isinstance(config, PreferenceConfig) and config.layout != "pairwise":
        notes.append("a group runs its prompt once: less than this, as each pair is counted as two whole sequences")
    try:
        size = model_size(name, revision, config.trust_remote_code)
    except PrefmillError as error:
        return Training(world, name, None, steps, (*notes, f"memory: {error.what}: {error.details['got']}"))
    if isinstance(config, DiffusionTrainingConfig) and (config.block_length or size.block_length):
        rows *= 2
        notes.append("block by block a text is run twice as long: once as it is, once with masks")
    offloaded = host_memory(size, config, world)
    if offloaded:
        notes.append(f"{offloaded * world:.0f} GB are offloaded to the hosts' memory, {offloaded:.1f} GB by each GPU")
    logits = _SCORER_LOGITS if pairs or diffusion else _TRL_LOGITS
    memory = gpu_memory(size, config, world, rows, logits, several_passes=diffusion)
    return Training(world, f"{name} ({size.parameters / 1e9:.2f}B)", memory, steps, tuple(notes))


def _image_training(config: TrainingConfig, world: int, name: str, steps: int | None, told: list[str]) -> Training:
    from prefmill.slurm.image_memory import count, image_memory, notes  # torch takes seconds

    try:
        counted = count(name, config)
    except PrefmillError as error:
        told.append(f"memory: {error.what}: {error.details['got']}")
        return Training(world, name, None, steps, tuple(told))
    model = f"{name} ({counted.numbers.parameters / 1e9:.2f}B)"
    memory = image_memory(counted, config, world)
    return Training(world, model, memory, steps, (*told, *notes(counted, config)))


def _model_of(plan: Plan, task: PlannedTask) -> tuple[str | None, str | None]:
    """The model a task starts from: its own, that of a finished input, or what the task before starts from."""
    config = task.config
    if isinstance(config, TrainingConfig) and config.model_name_or_path is not None:
        return config.model_name_or_path, config.revision
    folders = [
        path for name, paths in task.inputs.items() if task.stage.reads[name].kind == "checkpoint" for path in paths
    ]
    for folder in folders:
        if manifest_fault(folder) == "":
            return str(folder), None
    # Until then it has the shape of the model that its maker starts from: training changes no shape.
    makers = [other for other in plan.upstream(task) if other.output in folders]
    return _model_of(plan, makers[0]) if makers else (None, None)


def _steps(task: PlannedTask, config: TrainingConfig) -> int | None:
    """Optimizer steps, from the rows of a finished dataset; None where there is none yet."""
    given: int | None = getattr(config, "max_steps", None)
    if given is not None:
        return given
    rows = rows_of(task)
    return None if rows is None else math.ceil(rows / config.effective_batch_size) * config.num_train_epochs


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


_CARDS_GB = (24, 80)
_SMALLER = {"text": "a shorter max_length", "images": "a smaller per_device_train_batch_size or resolution"}


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
        if tasks[0].stage.trains and isinstance(tasks[0].config, TrainingConfig):
            problems += _show_training(plan, tasks[0], resources, offered or {}, gpu_gb, say)
        for line in _stated_hours(cluster, tasks[0], resources, offered or {}):
            say(line)
    about_site = (*not_taken_along(cluster, os.environ), *_place_notes(plan, cluster))
    for note in (*about_site, *_limit_notes(plan, cluster, policy)):
        say(note)
    if problems:
        raise PipelineError(
            "this would never start, or not fit", got="\n".join(["", *(f"    {line}" for line in problems)]),
            fix="correct these in the cluster file, the pipeline's `resources` or the stage's configuration",
        )  # fmt: skip
    say("every request can start" if offered else "no problems found (partition limits not checked: Slurm unreachable)")


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


def _show_training(
    plan: Plan,
    task: PlannedTask,
    resources: Resources,
    offered: Mapping[str, Partition],
    gpu_gb: float | None,
    say: Say,
) -> Iterator[str]:
    try:
        needs = training_needs(plan, task, resources)
    except PrefmillError as error:
        yield f"{task.stage.name}: {error.what} ({error.details['fix']})"
        return
    config = task.config
    assert isinstance(config, TrainingConfig)
    rows = f"up to {config.max_length} tokens, " if task.stage.on == "text" else ""
    say(
        f"  {needs.model or 'model'}, {needs.world} GPUs, {sharding(config).name}, {rows}"
        f"batch {config.effective_batch_size}: {needs.steps if needs.steps is not None else '?'} steps"
    )
    for note in needs.notes:
        say(f"  {note}")
    if needs.memory is None:
        return
    parts = {name: value for name, value in vars(needs.memory).items() if value >= 0.05}
    say(f"  {needs.memory.total:.1f} GB a GPU: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items()))
    for name in parts:
        say(f"    {name}: {ORIGINS[name]}")
    fits = (f"{size} GB: {'fits' if needs.memory.total <= size else 'does not fit'}" for size in _CARDS_GB)
    say("  " + "; ".join(fits))
    given = gpu_gb or gpu_memory_gb(_gpu_name(resources, offered))
    if resources.gpus and given is not None and needs.memory.total > given:
        yield (
            f"{task.stage.name}: {needs.memory.total:.0f} GB needed on each GPU, which has {given:g}: a higher ZeRO "
            f"stage, more nodes, activation_checkpointing, lora or {_SMALLER[task.stage.on]}"
        )
    elif resources.gpus and given is None:
        say("  the GPUs' memory is not known: give --gpu-memory GB to have it checked")


def _request(stage: str, count: int, resources: Resources) -> str:
    memory = f", {resources.memory_gb:g} GB" if resources.memory_gb else ""
    hours = count * resources.nodes * resources.gpus * resources.time_limit_minutes / 60
    cost = f"; at most {hours:.0f} GPU-hours" if hours else ""
    return (
        f"{stage}: {count} x {resources.nodes} nodes of {resources.gpus} GPUs, {resources.cpus} CPUs{memory} in "
        f"{resources.partition or 'the default partition'} for {resources.time_limit_minutes} minutes{cost}"
    )
