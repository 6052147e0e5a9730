"""Preference training of masked-diffusion models: pairs to groups, the reference's draws, the finished folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefmill.core.stage import Metrics, Task
from prefmill.distributed.scoring import scoring_context
from prefmill.distributed.sharding import shares_weights
from prefmill.families.causal.dpo import load_groups
from prefmill.families.mdlm.config import DiffusionPreferenceConfig
from prefmill.families.mdlm.family import (
    DiffusionFamily,
    Drawing,
    LiveVariance,
    by_epoch,
    diffusion_family,
    encode_responses,
    fill_groups,
)
from prefmill.families.mdlm.scorer import score_batch
from prefmill.families.mdlm.training import DrawTelemetry, FollowOnResume, diffusion_spec, opened
from prefmill.training.data import Group
from prefmill.training.family import Reference
from prefmill.training.loop import run_training
from prefmill.training.objective_names import VAL_METRICS
from prefmill.training.objectives import Settings, mix
from prefmill.training.reference import GroupScoring, computed_as, kept_reference, reference_scores, start_weights
from prefmill.training.trainer import Preferences, PreferenceTrainer, train_data, val_data


def train_diffusion_dpo(
    config: DiffusionPreferenceConfig, task: Task, policy: str, train: Path, val: Path | None
) -> Metrics:
    """Tune `policy` on the pairs in `train` with the starting model as reference (VRPO, arXiv 2505.19223).

    Policy and reference are scored with the same draws, which follow from seed, row and epoch: the reference's values
    are computed once, before training, and cached. Resumes from the newest complete checkpoint.
    """
    config, tokenizer = opened(config, task, policy)
    groups = fill_groups(load_groups(train, tokenizer, config, task, shuffle=config.shuffle_labels), config, tokenizer)
    held_out = fill_groups(load_groups(val, tokenizer, config, task), config, tokenizer) if val is not None else []
    settings = Settings(
        config.beta, config.label_smoothing, config.simpo_gamma, upper_weight=config.upper_weight, clip=config.clip
    )
    # Before a model is loaded: an unknown objective costs no wait.
    objective = mix(config.loss_type, config.loss_weights, settings, DiffusionFamily.supplies)
    live = LiveVariance(config.num_draws, config.beta, config.variance_tolerance, config.diffusion_steps == "auto")
    data = Preferences(
        train=train_data(groups, config),
        val=val_data(held_out, config),
        family=diffusion_family(drawing_of(config), live),
        objective=objective,
        settings=settings,
        telemetry=partial(DrawTelemetry, live=live),
    )
    spec = diffusion_spec(
        config,
        task,
        policy,
        tokenizer,
        data,
        # Objectives without a reference are spared the pass over all rows and epochs.
        reference=partial(_reference, task, groups, held_out, config) if objective.needs_reference else None,
        callbacks=[FollowOnResume(live)],
        counts={"pairs": sum(len(group.pairs) for group in groups)},
        logged={**VAL_METRICS, "recommended_draws": "recommended_draws"},
    )
    return run_training(spec)


def drawing_of(config: DiffusionPreferenceConfig) -> Drawing:
    """How the configuration draws maskings."""
    power = config.upper_power if "spg" in config.loss_type else None
    return Drawing(config.num_draws, config.sampling, config.seed, power, config.block_length)


def _reference(
    task: Task,
    train: Sequence[Group],
    val: Sequence[Group],
    config: DiffusionPreferenceConfig,
    trainer: PreferenceTrainer,
    model: Any,
) -> tuple[Reference, Reference]:
    """The reference's values of the draws in training and validation; called while the policy is the reference."""
    device = trainer.args.device
    with scoring_context(trainer, config):
        values = reference_values(model, device, task, train, config.num_train_epochs, config)
        # Validation is drawn as in epoch 0 each time, so that its curve moves by the model alone.
        held_out = reference_values(model, device, task, val, 1, config)
    return by_epoch(values), by_epoch(held_out)


def reference_values(
    model: Any,
    device: torch.device,
    task: Task,
    groups: Sequence[Group],
    num_epochs: int,
    config: DiffusionPreferenceConfig,
) -> list[Tensor]:
    """The reference's value of every draw of every response, [S, E, n] a group."""
    drawing = drawing_of(config)
    said = {key: getattr(config, key) for key in ("quantization", "mask_token_id", "shifted_logits")}
    # What the draws follow from is in the key: values of other draws are no reference for these.
    settings = {**computed_as(config), **said, "epochs": num_epochs, "drawing": repr(drawing)}
    later = {"upper_power": drawing.upper_power, "block_length": drawing.block_length}
    settings |= {key: value for key, value in later.items() if value is not None}
    scoring = GroupScoring(
        content=lambda group: [group.prompt, group.responses],
        batches=lambda group: [encode_responses(group, epoch, drawing) for epoch in range(num_epochs)],
        score=lambda batch: score_batch(model, batch.to(device)),
        join=lambda _, scores: torch.stack(list(scores), dim=1),
        in_step=shares_weights(config),
    )
    kept = kept_reference(task, start_weights(task, config), settings, device)
    return reference_scores(groups, scoring, kept, task, config.precision)
