"""The one preference trainer: transformers' Trainer over a batch plan, a scorer and an objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefmill.core.stage import Task
from prefmill.distributed.collectives import from_all_ranks
from prefmill.distributed.devices import rank, world_size
from prefmill.distributed.sharding import fsdp_mixed_precision
from prefmill.training.arguments import made, trainer_arguments
from prefmill.training.batches import AnyGroup, GroupPart, Microbatch, one_by_one, plan_batches
from prefmill.training.callbacks import check_every_step
from prefmill.training.config import TrainingConfig, accumulation
from prefmill.training.family import Family, Reference, reference_of_pairs
from prefmill.training.objectives import Objective, PairScores, Settings
from prefmill.training.telemetry import Telemetry


@dataclass(frozen=True)
class PreferenceData:
    """Groups, the reference's scores of their samples (None without a reference), and the batch plan."""

    groups: Sequence[AnyGroup]
    reference: Reference | None
    plan: Sequence[Microbatch]


class PlannedBatches(Dataset[dict[str, Any]]):
    """The microbatches of a plan, encoded when they are asked for."""

    def __init__(self, data: PreferenceData, family: Family) -> None:
        self.data, self.family = data, family

    def __len__(self) -> int:
        return len(self.data.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        microbatch = self.data.plan[index]
        if microbatch.skipped:
            return {"skipped": True, "step_pairs": microbatch.step_pairs}
        # A rank without pairs still runs the model, on a pair whose loss is then left out.
        parts = microbatch.parts or (GroupPart(0, (0,)),)
        groups, reference = self.data.groups, self.data.reference
        sides: tuple[Tensor | None, Tensor | None] = (None, None)
        if reference:
            sides = reference_of_pairs(self.family, reference, groups, parts, microbatch.epoch)
        return {
            "batch": self.family.encode(groups, parts, microbatch.epoch),
            "pair_ids": pair_ids(groups, parts),
            "ref_chosen": sides[0],
            "ref_rejected": sides[1],
            "skipped": False,
            "num_pairs": microbatch.num_pairs,
            "step_pairs": microbatch.step_pairs,
            "epoch": microbatch.epoch,
        }


class PreferenceTrainer(Trainer):
    """Takes an optimizer step on the mean loss of its pairs, over microbatches and ranks.

    Its dataset is the plan of all epochs, so the Trainer sees one epoch, in order: resuming skips what was done.
    """

    control: TrainerControl

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train: PreferenceData,
        val: PreferenceData | None,
        family: Family,
        objective: Objective,
        settings: Settings,
        telemetry: Telemetry,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.family, self.objective, self.settings, self.telemetry = family, objective, settings, telemetry
        self._val = PlannedBatches(val, family) if val is not None else None
        self._epoch_of_step = {item.step + 1: item.epoch for item in train.plan}
        self._passes = passes_after(self._epoch_of_step)
        super().__init__(
            model=model,
            args=args,
            train_dataset=PlannedBatches(train, family),
            eval_dataset=self._val,
            # An item of the plan is a whole microbatch already.
            data_collator=lambda items: items[0],
            callbacks=[*callbacks, _StepTelemetry(telemetry, self._epoch_of_step)],
        )
        # The loss is divided by the step's pairs below, so nobody is to divide by the accumulation again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        check_every_step(self)

    def set_reference(self, train: Reference, val: Reference) -> None:
        """Give every sample its reference score."""
        self.train_dataset.data = replace(self.train_dataset.data, reference=train)
        if self._val is not None:
            self._val.data = replace(self._val.data, reference=val)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """The run's precision for whatever runs the model: reference and evaluation see what training sees.

        accelerate does this only to the model it was given, when training begins: too late for the reference.
        """
        return self.accelerator.autocast()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # The Trainer would shuffle: the plan has its order, and resuming skips along it.
        return SequentialSampler(self.train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        # The Trainer counts `labels`, which these batches do not have.
        return int(batch_samples[0]["step_pairs"])

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = self.args.device
        to_move = ("batch", "ref_chosen", "ref_rejected")
        moved = {key: inputs[key].to(device) for key in to_move if inputs.get(key) is not None}
        return {**inputs, **moved}

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a microbatch; nothing for one that the plan leaves empty on all ranks."""
        if inputs["skipped"]:
            return torch.zeros((), device=self.args.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The microbatch's share of its step's mean loss, a scalar; DDP averages over ranks, so it is scaled up."""
        scores = self.pair_scores(model, inputs)
        losses = self.objective.loss(scores, self.settings) + self.family.beside(model)
        if inputs["num_pairs"] == 0:
            # Times 0 rather than left out: the other ranks' gradient exchange waits for this backward pass.
            return losses.sum() * 0.0
        if model.training:
            self.telemetry.speed.add(*work_of(inputs["batch"]))
            self.telemetry.add(inputs["pair_ids"], scores, self.objective, self.settings)
        return losses.sum() * (self.args.world_size / inputs["step_pairs"])

    def pair_scores(self, model: Any, inputs: dict[str, Any]) -> PairScores:
        """The scores of a microbatch's pairs under `model` and the reference."""
        return self.family.pair_scores(model, inputs["batch"], inputs["ref_chosen"], inputs["ref_rejected"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the pairs since the last log, and how fast the ranks were; every rank logs.

        The epoch that is logged is the pass over the data: the Trainer's own is the share of the plan of all passes.
        """
        if "loss" in logs:
            logs = {**logs, **self.telemetry.means(), **self.telemetry.speed.window(self.state.global_step)}
        share, self.state.epoch = self.state.epoch, self._passes.get(self.state.global_step, 0.0)
        super().log(logs, start_time)
        # Callbacks tell an epoch that was broken off by the Trainer's own number.
        self.state.epoch = share

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss, margin and accuracy over the validation pairs, of which every rank scores its share."""
        if self._val is None:
            return {}
        # Not undone: the Trainer puts the model in train mode at every training step.
        self.model.eval()
        self.optimizer.eval()  # as the Trainer's own evaluation has it
        with torch.no_grad(), self.compute_loss_context_manager():
            shares = from_all_ranks(self._evaluate_share(self._val))
        found = {index: values for share in shares for index, values in share.items()}
        # Ranks took every n-th microbatch: back in the plan's order, so that sums do not depend on the ranks.
        losses, margins = torch.cat([found[index] for index in range(len(self._val))], dim=1)
        names = [name for item in self._val.data.plan for name in pair_ids(self._val.data.groups, item.parts)]
        metrics = self.telemetry.evaluated(losses, margins, names)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_share(self, val: PlannedBatches) -> dict[int, Tensor]:
        """Losses and margins, [2, N] float64, of this rank's microbatches by their places.

        Where weights are sharded every rank must run the model equally often: one that has no more microbatches runs
        the last one again, and leaves it out.
        """
        rank, ranks, last = self.args.process_index, self.args.world_size, len(val) - 1
        found = {}
        for start in range(0, len(val), ranks):
            index = min(start + rank, last)
            scores = self.pair_scores(self.model, self._prepare_inputs(val[index]))
            values = torch.stack([self.objective.loss(scores, self.settings), scores.margin]).double()
            if start + rank <= last:
                found[index] = values
        return {index: values.cpu() for index, values in found.items()}


def pair_ids(groups: Sequence[AnyGroup], parts: Sequence[GroupPart]) -> list[str]:
    """The ids of the parts' pairs, in order."""
    return [groups[part.group].pairs[pair].pair_id for part in parts for pair in part.pairs]


def work_of(batch: Any) -> tuple[int, str]:
    """How many images (a batch of those has `num_images`) or else tokens the model runs over, and which of them."""
    if hasattr(batch, "num_images"):
        return int(batch.num_images), "images"
    tokens = getattr(batch, "input_ids", None)
    return (0 if tokens is None else int(tokens.numel())), "tokens"


def plan_arguments(config: TrainingConfig, task: Task, plan: Sequence[Microbatch]) -> TrainingArguments:
    """The Trainer sees the plan of all epochs as one epoch of microbatches; the plan says where an epoch ends."""
    given = trainer_arguments(config, task, world_size())
    # The Trainer has one number for all steps; a plan has equally many in each.
    num_microbatches = sum(item.step == 0 for item in plan) // world_size()
    one_epoch = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": num_microbatches,
    }
    return fsdp_mixed_precision(made(TrainingArguments, given | one_epoch), config)


def passes_after(epoch_of_step: dict[int, int]) -> dict[int, float]:
    """How often the data were gone through after every step: 1.5 in the middle of the second pass."""
    num_steps, seen = Counter(epoch_of_step.values()), Counter[int]()
    found = {}
    for step, epoch in sorted(epoch_of_step.items()):
        seen[epoch] += 1
        found[step] = epoch + seen[epoch] / num_steps[epoch]
    return found


class _StepTelemetry(TrainerCallback):
    """Writes the pairs of a step when the step is taken, and asks for an evaluation where the plan ends an epoch."""

    def __init__(self, telemetry: Telemetry, epoch_of_step: dict[int, int]) -> None:
        self.telemetry, self.epoch_of_step = telemetry, epoch_of_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch = self.epoch_of_step[state.global_step]
        self.telemetry.step(state.global_step, epoch)
        if self.epoch_of_step.get(state.global_step + 1) != epoch:
            control.should_evaluate = True


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
