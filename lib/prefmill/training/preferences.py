"""What a preference training learns from, and the trainer made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from prefmill.core.stage import Task
from prefmill.distributed.devices import rank, world_size
from prefmill.training.batches import AnyGroup, Microbatch, one_by_one, plan_batches
from prefmill.training.config import TrainingConfig, accumulation
from prefmill.training.family import Family
from prefmill.training.objectives import Objective, Settings
from prefmill.training.telemetry import Telemetry
from prefmill.training.trainer import PreferenceData, PreferenceTrainer, plan_arguments


@dataclass(frozen=True)
class Preferences:
    """Groups of pairs in their batches, how a family scores them, and the loss; `arguments` unless the usual ones."""

    train: PreferenceData
    val: PreferenceData | None
    family: Family
    objective: Objective
    settings: Settings
    telemetry: Callable[[Path, int], Telemetry] = Telemetry
    arguments: TrainingArguments | None = None

    def trainer(
        self, model: Any, config: TrainingConfig, task: Task, callbacks: list[TrainerCallback]
    ) -> PreferenceTrainer:
        """The preference trainer of `model`."""
        args = self.arguments or plan_arguments(config, task, self.train.plan)
        telemetry = self.telemetry(task.logs, rank())
        return PreferenceTrainer(
            model, args, self.train, self.val, self.family, self.objective, self.settings, telemetry, callbacks
        )


def train_data(groups: Sequence[AnyGroup], config: TrainingConfig) -> PreferenceData:
    """Groups in the microbatches of all epochs."""
    # The reference is set later: it is scored by the model as the trainer has placed it.
    return PreferenceData(groups, None, plan_epochs(groups, config, config.num_train_epochs))


def plan_epochs(groups: Sequence[AnyGroup], config: TrainingConfig, num_epochs: int) -> list[Microbatch]:
    """The microbatches of so many epochs on the ranks that there are."""
    ranks = world_size()
    per_step = accumulation(config, ranks) * ranks
    return plan_batches(groups, num_epochs, config.effective_batch_size, per_step, config.seed)


def val_data(groups: Sequence[AnyGroup], config: TrainingConfig) -> PreferenceData | None:
    """Every validation pair once, in microbatches of the training size; None without pairs."""
    if not groups:
        return None
    return PreferenceData(groups, None, one_by_one(groups, config.per_device_train_batch_size, config.seed))
