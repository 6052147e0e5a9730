"""What each training of a plan needs: memory of each GPU and of each node, optimizer steps; and how that is told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefmill.core.errors import PrefmillError
from prefmill.core.files import read_record
from prefmill.core.places import RUN_RECORD
from prefmill.core.terminal import Say
from prefmill.families.mdlm.config import DiffusionTrainingConfig
from prefmill.pipeline.plan import Plan, PlannedTask
from prefmill.pipeline.task_status import manifest_fault
from prefmill.slurm.cluster import Resources
from prefmill.slurm.forecast import rows_of
from prefmill.slurm.host_memory import Given, host_need
from prefmill.slurm.memory import (
    GIGABYTE,
    NUMBER_BYTES,
    ORIGINS,
    GpuMemory,
    gpu_memory,
    host_memory,
    model_size,
    sharding,
)
from prefmill.training.config import TrainingConfig, accumulation, weights_precision
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
    on_host: float = 0.0  # GB that a rank holds in its node's memory, for its GPU


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
    held = max(offloaded, _while_loading(size.parameters, config))
    return Training(world, f"{name} ({size.parameters / 1e9:.2f}B)", memory, steps, tuple(notes), held)


def _while_loading(parameters: int, config: TrainingConfig) -> float:
    """GB of the weights that each rank reads before they are on its GPU; those that are shared are read in parts."""
    whole = sharding(config).stage < 3 and getattr(config, "quantization", None) is None
    return parameters * NUMBER_BYTES[weights_precision(config)] / GIGABYTE if whole else 0.0


def _image_training(config: TrainingConfig, world: int, name: str, steps: int | None, told: list[str]) -> Training:
    from prefmill.slurm.image_memory import count, image_memory, notes  # torch takes seconds

    try:
        counted = count(name, config)
    except PrefmillError as error:
        told.append(f"memory: {error.what}: {error.details['got']}")
        return Training(world, name, None, steps, tuple(told))
    model = f"{name} ({counted.numbers.parameters / 1e9:.2f}B)"
    memory = image_memory(counted, config, world)
    held = _while_loading(counted.numbers.parameters, config)
    return Training(world, model, memory, steps, (*told, *notes(counted, config)), held)


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


_CARDS_GB = (24, 80)
_SMALLER = {"text": "a shorter max_length", "images": "a smaller per_device_train_batch_size or resolution"}


def show_trainings(
    plan: Plan, tasks: Sequence[PlannedTask], resources: Resources, card_gb: float | None, given: Given | None, say: Say
) -> Iterator[str]:
    """Say what a stage's trainings need, equal ones once; yields what does not fit."""
    told = []
    for task in tasks if tasks[0].stage.trains else ():
        if not isinstance(task.config, TrainingConfig):
            continue
        # Elements that differ in their array's values alone need the same, unless each has a model of its own.
        kind = task.config.model_copy(update=dict.fromkeys(task.values)), _model_of(plan, task)
        if kind in told:
            continue
        told.append(kind)
        try:
            needs = training_needs(plan, task, resources)
        except PrefmillError as error:
            yield f"{task.stage.name}: {error.what} ({error.details['fix']})"
        else:
            yield from _show_training(task, task.config, needs, resources, card_gb, given, say)


def _show_training(
    task: PlannedTask, config: TrainingConfig, needs: Training, resources: Resources, card_gb: float | None,
    given: Given | None, say: Say,
) -> Iterator[str]:  # fmt: skip
    rows = f"up to {config.max_length} tokens, " if task.stage.on == "text" else ""
    ranks = "GPU" if resources.gpus else "CPU rank"
    say(
        f"  {needs.model or 'model'}, {needs.world} {ranks}{'s' * (needs.world != 1)}, "
        f"{sharding(config).name}, {rows}batch {config.effective_batch_size}: "
        f"{needs.steps if needs.steps is not None else '?'} steps"
    )
    for note in needs.notes:
        say(f"  {note}")
    if needs.memory is None:
        return
    if resources.gpus:
        yield from _show_card(task, needs.memory, card_gb, say)
    held = host_need(needs.memory, needs.on_host, needs.world // resources.nodes, bool(resources.gpus))
    say(f"  {held}")
    if peak := read_record(task.output / RUN_RECORD).get("peak_memory_gb"):
        told = f"the finished run's largest process held {peak:.2f}: the forecast of one is"
        say(f"  {told} {held.total / held.ranks / peak:.2f} times that")
    if given is not None and held.total > given.gb:
        yield (
            f"{task.key}: {held.total:.0f} GB of memory needed, {given.by} {given.gb:.0f}: more memory, fewer ranks "
            f"(`processes`), lora, a smaller model{'' if resources.gpus else f' or {_SMALLER[task.stage.on]}'}"
        )


def _show_card(task: PlannedTask, memory: GpuMemory, card_gb: float | None, say: Say) -> Iterator[str]:
    parts = {name: value for name, value in vars(memory).items() if value >= 0.05}
    say(f"  {memory.total:.1f} GB a GPU: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items()))
    for name in parts:
        say(f"    {name}: {ORIGINS[name]}")
    fits = (f"{size} GB: {'fits' if memory.total <= size else 'does not fit'}" for size in _CARDS_GB)
    say("  " + "; ".join(fits))
    if card_gb is None:
        say("  the GPUs' memory is not known: give --gpu-memory GB to have it checked")
    elif memory.total > card_gb:
        yield (
            f"{task.stage.name}: {memory.total:.0f} GB needed on each GPU, which has {card_gb:g}: a higher ZeRO "
            f"stage, more nodes, activation_checkpointing, lora or {_SMALLER[task.stage.on]}"
        )
