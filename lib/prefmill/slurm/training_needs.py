"""What a training task needs: memory of each GPU and optimizer steps, as far as both are known before it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prefmill.core.errors import PrefmillError
from prefmill.core.places import MANIFEST
from prefmill.families.mdlm.config import DiffusionTrainingConfig
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.slurm.cluster import Resources
from prefmill.slurm.forecast import rows_of
from prefmill.slurm.memory import GpuMemory, gpu_memory, host_memory, model_size, sharding
from prefmill.training.config import TrainingConfig, accumulation
from prefmill.training.preference_config import PreferenceConfig

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
        return Training(task, world, "", None, steps, (*notes, f"memory: {_UNKNOWN} its model is made"))
    if task.stage.on == "images":
        return _image_training(task, config, world, name, steps, notes)
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
        return Training(task, world, name, None, steps, (*notes, f"memory: {error.what}: {error.details['got']}"))
    if isinstance(config, DiffusionTrainingConfig) and (config.block_length or size.block_length):
        rows *= 2
        notes.append("block by block a text is run twice as long: once as it is, once with masks")
    offloaded = host_memory(size, config, world)
    if offloaded:
        notes.append(f"{offloaded * world:.0f} GB are offloaded to the hosts' memory, {offloaded:.1f} GB by each GPU")
    logits = _SCORER_LOGITS if pairs or diffusion else _TRL_LOGITS
    memory = gpu_memory(size, config, world, rows, logits, several_passes=diffusion)
    return Training(task, world, f"{name} ({size.parameters / 1e9:.2f}B)", memory, steps, tuple(notes))


def _image_training(
    task: PlannedTask, config: TrainingConfig, world: int, name: str, steps: int | None, told: list[str]
) -> Training:
    from prefmill.slurm.image_memory import count, image_memory, notes  # torch takes seconds

    try:
        counted = count(name, config)
    except PrefmillError as error:
        told.append(f"memory: {error.what}: {error.details['got']}")
        return Training(task, world, name, None, steps, tuple(told))
    model = f"{name} ({counted.numbers.parameters / 1e9:.2f}B)"
    memory = image_memory(counted, config, world)
    return Training(task, world, model, memory, steps, (*told, *notes(counted, config)))


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
