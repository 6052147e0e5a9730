"""`prefmill estimate`: what each stage asks for against what its partition has, and what training needs on each GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefmill.core.artifact import MANIFEST
from prefmill.core.errors import PipelineError, PrefmillError
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.slurm import jobs as slurm
from prefmill.slurm.cluster import ClusterFile, Resources, resources_for
from prefmill.slurm.jobs import Partition
from prefmill.slurm.memory import GpuMemory, gpu_memory, host_memory, model_size, sharding
from prefmill.slurm.submit import Say
from prefmill.store.artifacts import read_manifest
from prefmill.training.config import TrainingConfig, accumulation
from prefmill.training.preference_config import PreferenceConfig

_GPU_GB = {"h200": 141, "b200": 180, "h100": 80, "a100": 80, "l40s": 48, "a40": 48, "a6000": 48, "v100": 32, "l4": 24}
_SCORER_LOGITS, _TRL_LOGITS = 256, 1024  # tokens whose logits exist together, in DPO's scorer and TRL's loss
_UNKNOWN = "not known before"


@dataclass(frozen=True)
class Training:
    """What a training task needs: memory of each GPU, optimizer steps; None with the reason where it is not known."""

    task: PlannedTask
    world: int
    model: str
    memory: GpuMemory | None
    steps: int | None
    notes: tuple[str, ...] = ()


def estimate(pipeline: PipelineFile, plan: Plan, cluster: ClusterFile, gpu_gb: float | None, say: Say = print) -> None:
    """Print what every stage asks for and training needs; raises PipelineError for what can never start, or fit."""
    offered = slurm.partitions()
    if offered is None:
        say("Slurm does not answer here: requests are not checked against partitions")
    problems: list[str] = []
    for stage in dict.fromkeys(task.stage.name for task in plan.tasks):
        tasks = [task for task in plan.tasks if task.stage.name == stage]
        resources = resources_for(cluster, stage, pipeline.stages[stage].resources)
        say(_request(stage, len(tasks), resources))
        problems += [f"{stage}: {text}" for text in never_starts(resources, offered)] if offered else []
        if tasks[0].stage.trains and isinstance(tasks[0].config, TrainingConfig):
            problems += _show_training(plan, tasks[0], resources, offered or {}, gpu_gb, say)
    if problems:
        raise PipelineError(
            "this would never start, or not fit", got="\n".join(["", *(f"    {line}" for line in problems)]),
            fix="correct these in the cluster file, the pipeline's `resources` or the stage's configuration",
        )  # fmt: skip
    say("every request can start" if offered else "nothing against it that can be known without Slurm")


def check_requests(pipeline: PipelineFile, plan: Plan, cluster: ClusterFile) -> None:
    """Raise PipelineError for stages that Slurm would accept and never start; nothing is checked where it is silent."""
    offered = slurm.partitions() or {}
    stages = dict.fromkeys(task.stage.name for task in plan.tasks) if offered else {}
    problems = [
        f"{stage}: {text}"
        for stage in stages
        for text in never_starts(resources_for(cluster, stage, pipeline.stages[stage].resources), offered)
    ]
    if problems:
        raise PipelineError(
            "this would never start", got="\n".join(["", *(f"    {line}" for line in problems)]),
            fix="correct these in the cluster file or the pipeline's `resources`",
        )  # fmt: skip


def never_starts(resources: Resources, offered: Mapping[str, Partition]) -> Iterator[str]:
    """Why a task with these resources would wait for ever; Slurm itself accepts such jobs."""
    partition = offered.get(resources.partition or "")
    if partition is None:
        known = ", ".join(sorted(name for name in offered if name))
        yield f"there is no partition '{resources.partition or '(default)'}': {known}"
        return
    limits = [
        ("nodes", resources.nodes, min(partition.nodes, partition.max_nodes or partition.nodes), ""),
        ("time_limit_minutes", resources.time_limit_minutes, partition.max_minutes, ""),
        ("gpus", resources.gpus, partition.gpus, " a node"),
        ("cpus", resources.cpus, partition.cpus, " a node"),
        ("memory_gb", resources.memory_gb, partition.memory_gb, " a node"),
    ]
    if not partition.up:
        yield f"partition {partition.name} is down"
    for name, wanted, limit, of_what in limits:
        if wanted is not None and limit is not None and wanted > limit:
            yield f"{name}: {wanted:g} asked for, {partition.name} has {limit:g}{of_what}"


def training_needs(plan: Plan, task: PlannedTask, resources: Resources) -> Training:
    """What a training task needs, as far as it is known now; raises ConfigError for a batch that does not divide."""
    config = task.config
    assert isinstance(config, TrainingConfig), f"{task.stage.name} trains, but not by a TrainingConfig"
    world = resources.nodes * (resources.processes or max(resources.gpus, 1))
    accumulation(config, world)
    name, revision = _model_of(plan, task)
    steps = _steps(task, config)
    notes = [] if steps is not None else [f"steps: {_UNKNOWN} its dataset is made"]
    if name is None:
        return Training(task, world, "", None, steps, (*notes, f"memory: {_UNKNOWN} its model is made"))
    pairs = isinstance(config, PreferenceConfig)
    rows = config.per_device_train_batch_size * (2 if pairs else 1)
    if isinstance(config, PreferenceConfig) and config.layout != "pairwise":
        notes.append("a group runs its prompt once: less than this, as each pair is counted as two whole sequences")
    try:
        size = model_size(name, revision, config.trust_remote_code)
    except PrefmillError as error:
        return Training(task, world, name, None, steps, (*notes, f"memory: {error.what}: {error.details['got']}"))
    offloaded = host_memory(size, config, world)
    if offloaded:
        notes.append(f"{offloaded * world:.0f} GB are offloaded to the hosts' memory, {offloaded:.1f} GB by each GPU")
    memory = gpu_memory(size, config, world, rows, _SCORER_LOGITS if pairs else _TRL_LOGITS)
    return Training(task, world, f"{name} ({size.parameters / 1e9:.2f}B)", memory, steps, tuple(notes))


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
    say(
        f"  {needs.model or 'model'}, {needs.world} GPUs, {sharding(config).name}, up to {config.max_length} tokens, "
        f"batch {config.effective_batch_size}: {needs.steps if needs.steps is not None else '?'} steps"
    )
    for note in needs.notes:
        say(f"  {note}")
    if needs.memory is None:
        return
    parts = {name: value for name, value in vars(needs.memory).items() if value >= 0.05}
    say(f"  {needs.memory.total:.1f} GB a GPU: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items()))
    partition = offered.get(resources.partition or "")
    given = gpu_gb or (_GPU_GB.get(partition.gpu_type) if partition else None)
    if resources.gpus and given is not None and needs.memory.total > given:
        yield (
            f"{task.stage.name}: {needs.memory.total:.0f} GB needed on each GPU, which has {given:g}: a higher ZeRO "
            f"stage, more nodes, activation_checkpointing, lora or a shorter max_length"
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


def _model_of(plan: Plan, task: PlannedTask) -> tuple[str | None, str | None]:
    """The model a task starts from: its own, that of a finished input, or what the task before starts from."""
    config = task.config
    if isinstance(config, TrainingConfig) and config.model_name_or_path is not None:
        return config.model_name_or_path, config.revision
    folders = [
        path for name, paths in task.inputs.items() if task.stage.reads[name].kind == "checkpoint" for path in paths
    ]
    for folder in folders:
        if (folder / MANIFEST).is_file():
            return str(folder), None
    makers = [other for other in plan.upstream(task) if other.output in folders]
    return _model_of(plan, makers[0]) if makers else (None, None)


def _steps(task: PlannedTask, config: TrainingConfig) -> int | None:
    """Optimizer steps, from the rows of a finished dataset; None where there is none yet."""
    modality = getattr(config, "modality", "clean")
    wanted = f"{task.stage.name}_{modality}_train/data.jsonl"
    for folder in [path for paths in task.inputs.values() for path in paths]:
        rows = _rows(folder, wanted)
        if rows is not None:
            return math.ceil(rows / config.effective_batch_size) * config.num_train_epochs
    return None


def _rows(folder: Path, name: str) -> int | None:
    manifest = read_manifest(folder)
    files = manifest.files if manifest else []
    return next((entry.rows for entry in files if entry.path == name), None)
