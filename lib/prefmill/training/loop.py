"""The one way through a training: model, trainer, reference, resuming, training, publishing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from prefmill.core.errors import InputError
from prefmill.core.places import STARTED
from prefmill.core.revisions import note_models
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.collectives import rank_zero_says
from prefmill.distributed.isolation import keep_socket_paths_short
from prefmill.distributed.scoring import scoring_model
from prefmill.distributed.sharding import leave_sizes_to_deepspeed
from prefmill.training.arguments import check_optimizer
from prefmill.training.callbacks import StageCallback
from prefmill.training.checkpoints import newest_checkpoint, require_its_ranks, resume_strictly
from prefmill.training.config import TrainingConfig
from prefmill.training.family import Reference
from prefmill.training.finished import ensure_savable, kept_dtype
from prefmill.training.objective_names import VAL_METRICS


class Trained(Protocol):
    """What is learnt from: it makes the trainer, `Preferences` the preference trainer, `Chats` TRL's."""

    def trainer(self, model: Any, config: TrainingConfig, task: Task, callbacks: list[TrainerCallback]) -> Any:
        """The Trainer of `model`."""
        ...


@dataclass(frozen=True)
class TrainingSpec:
    """What a training stage fills in; `run_training` does the rest.

    `load` gives the model to train with its adapter. Before the first step, while the model is as it starts and where
    it will run, `check` may refuse it, and `reference` gives the reference's scores (train and val). `processor` is
    saved beside the model; `publish` writes the finished folder and may return metrics, every rank calls it. `counts`
    are metrics known beforehand, `logged` the names of others in the log, whose last value counts. `resume` chooses the
    checkpoint in a folder.
    """

    config: TrainingConfig
    task: Task
    load: Callable[[], Any]
    data: Trained
    publish: Callable[[Any], Metrics]
    counts: Metrics
    logged: Mapping[str, str] = field(default_factory=lambda: VAL_METRICS)
    processor: Any = None
    check: Callable[[Any], None] | None = None
    reference: Callable[[Any, Any], tuple[Reference, Reference]] | None = None
    callbacks: Sequence[TrainerCallback] = ()
    resume: Callable[[Path], str | None] = newest_checkpoint


def run_training(spec: TrainingSpec) -> Metrics:
    """Train from the newest complete checkpoint on, and publish; every rank calls."""
    task = spec.task
    keep_socket_paths_short()
    require_its_ranks(task.output, spec.config)
    # A stage's callbacks come first: what they write is part of a complete checkpoint.
    trainer = spec.data.trainer(
        spec.load(), spec.config, task, [*spec.callbacks, StageCallback(task, spec.config.save_minutes)]
    )
    _require_same_models(spec)
    check_optimizer(trainer)
    leave_sizes_to_deepspeed(trainer)
    if spec.processor is not None:
        ensure_savable(trainer.model, spec.processor)
    _look_before(spec, trainer)
    _require_same_models(spec)  # again: a reference of its own is loaded for its scores
    resume_strictly(trainer)
    with trainer.args.main_process_first(local=False):  # it deletes torn checkpoints before others look
        checkpoint = spec.resume(task.output)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.optimizer.eval()  # those without a schedule train other weights than the average that they are to leave
    published = spec.publish(trainer)
    trainer.accelerator.wait_for_everyone()
    last = {name: value for row in trainer.state.log_history for name, value in row.items()}
    logged = {name: last.get(key) for name, key in spec.logged.items()}
    return {"steps": trainer.state.global_step, **spec.counts, **logged, **published}


def _require_same_models(spec: TrainingSpec) -> None:
    """Note which models have been loaded; raise InputError where an interrupted training had others.

    Loading is what downloads a model, or moves the hub's cache to where its branch is now.
    """
    record = spec.task.work / STARTED  # absent where no worker began this
    changed = rank_zero_says(lambda: note_models(record, spec.config) if record.is_file() else [])
    if changed:
        raise InputError(
            "a model has changed since this training began", where=changed[0],
            expected="what it held then, or the checkpoints go on upon other weights",
            fix="run it again, or `prefmill rerun` it: it then begins anew",
        )  # fmt: skip


def _look_before(spec: TrainingSpec, trainer: Any) -> None:
    """Check the model and score the reference, in one scope: ranks that share a model are given their parts once."""
    if spec.check is None and spec.reference is None:
        return
    whole = nullcontext(trainer.model.eval())  # a family without a check shares its model when training starts
    scope = scoring_model(trainer.model, trainer, spec.config, kept_dtype(spec.config)) if spec.check else whole
    with torch.no_grad(), scope as model:
        if spec.check is not None:
            spec.check(model)
        if spec.reference is not None:
            trainer.set_reference(*spec.reference(trainer, model))
