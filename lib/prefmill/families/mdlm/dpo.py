"""Preference training of masked-diffusion models: pairs to groups, the reference's draws, the finished folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefmill.core.stage import Metrics, Task
from prefmill.distributed.devices import rank, world_size
from prefmill.families.causal.dpo import load_groups
from prefmill.families.mdlm.config import DiffusionPreferenceConfig
from prefmill.families.mdlm.family import Drawing, LiveVariance, by_epoch, encode_responses, preference_family
from prefmill.families.mdlm.loading import load_diffusion_tokenizer
from prefmill.families.mdlm.scorer import score_batch
from prefmill.families.mdlm.training import DiffusionTrainer, FollowOnResume, load_scoring_model, train_and_finish
from prefmill.training.batches import one_by_one, plan_batches
from prefmill.training.callbacks import StageCallback
from prefmill.training.config import accumulation
from prefmill.training.data import Group
from prefmill.training.objectives import Settings, mix
from prefmill.training.reference import GroupScoring, kept_reference, reference_scores, start_weights
from prefmill.training.savable import ensure_savable
from prefmill.training.telemetry import Telemetry
from prefmill.training.trainer import PreferenceData, plan_arguments


def train_diffusion_dpo(
    config: DiffusionPreferenceConfig, task: Task, policy: str, train: Path, val: Path | None
) -> Metrics:
    """Tune `policy` on the pairs in `train` against itself as it was before the first step (VRPO, arXiv 2505.19223).

    Policy and reference are scored with the same draws, which follow from seed, row and epoch: the reference's values
    are computed once, before training, and cached. Resumes from the newest complete checkpoint.
    """
    tokenizer = load_diffusion_tokenizer(policy, revision=config.revision, trust_remote_code=config.trust_remote_code)
    groups = load_groups(train, tokenizer, config, task, shuffle=config.shuffle_labels)
    held_out = load_groups(val, tokenizer, config, task) if val is not None else []
    settings = Settings(config.beta, config.label_smoothing, config.simpo_gamma)
    objective = mix(config.loss_type, config.loss_weights, settings)
    ranks = world_size()
    per_step = accumulation(config, ranks) * ranks
    plan = plan_batches(groups, config.num_train_epochs, config.effective_batch_size, per_step, config.seed)
    at_once = config.per_device_train_batch_size
    adaptive = config.diffusion_steps == "auto"
    live = LiveVariance(config.num_draws, config.beta, config.variance_tolerance, adaptive)
    trainer = DiffusionTrainer(
        model=load_scoring_model(policy, config, tokenizer),
        args=plan_arguments(config, task, plan),
        train=PreferenceData(groups, None, plan),
        val=PreferenceData(held_out, None, one_by_one(held_out, at_once, config.seed)) if held_out else None,
        family=preference_family(drawing_of(config), live),
        objective=objective,
        settings=settings,
        telemetry=Telemetry(task.logs, rank()),
        callbacks=[StageCallback(task), FollowOnResume(live)],
    )
    trainer.live = live
    ensure_savable(trainer.model, tokenizer)
    if objective.needs_reference:
        values = reference_values(trainer, task, groups, config.num_train_epochs, tokenizer, config)
        held = reference_values(trainer, task, held_out, 1, tokenizer, config) if held_out else []
        trainer.set_reference(by_epoch(values), by_epoch(held))
    saved = train_and_finish(trainer, tokenizer, config, task, policy)
    rows = trainer.state.log_history
    evaluated = [row for row in rows if "eval_accuracy" in row] or [{}]
    advised = [row["recommended_draws"] for row in rows if "recommended_draws" in row]
    return {
        "steps": trainer.state.global_step,
        "pairs": sum(len(group.pairs) for group in groups),
        "val_accuracy": evaluated[-1].get("eval_accuracy"),
        "val_margin": evaluated[-1].get("eval_margin"),
        "recommended_draws": advised[-1] if advised else None,
        **saved,
    }


def drawing_of(config: DiffusionPreferenceConfig) -> Drawing:
    """How the configuration draws maskings."""
    return Drawing(config.num_draws, config.sampling, config.seed)


def reference_values(
    trainer: DiffusionTrainer,
    task: Task,
    groups: Sequence[Group],
    num_epochs: int,
    tokenizer: PreTrainedTokenizerBase,
    config: DiffusionPreferenceConfig,
) -> list[Tensor]:
    """The reference's value of every draw of every response, [S, E, n] a group; while the policy is the reference."""
    drawing = drawing_of(config)
    said = {key: getattr(config, key) for key in ("precision", "quantization", "mask_token_id", "shifted_logits")}
    settings = {**said, "attention": config.attn_implementation, "epochs": num_epochs, "drawing": repr(drawing)}
    model, device = trainer.model.to(trainer.args.device).eval(), trainer.args.device
    scoring = GroupScoring(
        content=lambda group: [group.prompt, group.responses],
        batches=lambda group: [encode_responses(group, epoch, drawing) for epoch in range(num_epochs)],
        score=lambda batch: score_batch(model, batch.to(device)),
        join=lambda _, scores: torch.stack(list(scores), dim=1),
    )
    kept = kept_reference(task, start_weights(task, config), settings, device)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return reference_scores(groups, scoring, kept, task, config.precision)
