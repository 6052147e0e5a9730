"""Preference training of SDXL and its kin: caches, the reference, the trainer, the finished folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.image_rows import ImageSplit
from prefmill.core.precision import torch_dtype
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.devices import device_kind
from prefmill.distributed.sharding import unsharded_loading, whole_weights
from prefmill.families.reward.data import Half, counted_alike, in_half
from prefmill.families.sdxl.callbacks import Ema, SampleGrid, TensorBoardCurves
from prefmill.families.sdxl.config import ERRORS, SdxlPreferenceConfig
from prefmill.families.sdxl.data import PairImages, balance_labels, read_image_pairs
from prefmill.families.sdxl.encoding import ImageKeys, tell_cut, tell_mirrored, text_keys
from prefmill.families.sdxl.export import save_finished
from prefmill.families.sdxl.family import PairReader, SdxlFamily, sdxl_family
from prefmill.families.sdxl.loading import SdxlFolder, load_policy, open_folder, require_made_for, require_patches
from prefmill.families.sdxl.noise import Schedule
from prefmill.families.sdxl.reference import ReferenceErrors, used_by
from prefmill.families.sdxl.soft_labels import with_soft_labels
from prefmill.store.tensor_cache import TensorCache
from prefmill.training.batches import Microbatch
from prefmill.training.cache_place import cache_place
from prefmill.training.family import Reference
from prefmill.training.loop import TrainingSpec, run_training
from prefmill.training.objectives import Objective, PairScores, Settings, mix, residual_and_drift
from prefmill.training.reference import advance_together
from prefmill.training.telemetry import Telemetry
from prefmill.training.trainer import (
    PreferenceData,
    Preferences,
    PreferenceTrainer,
    plan_arguments,
    plan_epochs,
    val_data,
)


def train_sdxl_dpo(config: SdxlPreferenceConfig, task: Task, start: str, pairs: Artifact) -> Metrics:
    """Tune the UNet or transformer of the pipeline `start` on image pairs, with the starting model as reference.

    Latents, text embeddings and the reference's errors are computed before training, or found in the cache: training
    runs that alone. Resumes from the newest complete checkpoint.
    """
    folder = open_folder(start, config.revision, config.variant)
    require_patches(8 * folder.backbone.patch, config, "resolution", "bucket_step")
    require_made_for(folder, config)
    schedule = folder.schedule(config.min_snr_gamma, config.guidance_scale)
    settings = settings_of(config, schedule)
    objective = choose_objective(config, settings, schedule)
    cache = TensorCache(config.cache_dir or cache_place(task))
    train, held_out = (_pairs(config, pairs, split) for split in ("train", "val"))
    plan = _plan(train, config)
    args = _arguments(config, task, plan)  # from here on the ranks know each other, and share what is to be computed
    train, held_out = (_labelled(given, config, task, objective, cache) for given in (train, held_out))
    data, held = PreferenceData(train, None, plan), val_data(held_out, config)
    with unsharded_loading():
        reader = _encode(config, task, cache, folder, schedule, args.device, train, held_out, data.plan)
    told = tell_cut([*train, *held_out], folder, reader.images)
    tell_mirrored(pair.prompt for pair in (train if config.random_flip else ()))
    references = [_references(config, folder, reader, given, args.device, objective) for given in (train, held_out)]
    # Only where an objective needs them: a prediction is as large as a latent, an error is one number.
    predictions = _predictions(references) if "residuals" in objective.needs else None
    ema = Ema(config.ema_decay) if config.use_ema else None
    spec = TrainingSpec(
        config=config,
        task=task,
        load=partial(unsharded_loading()(load_policy), folder, config),
        data=Preferences(
            data, held, sdxl_family(reader, predictions, winner_alone(config)), objective, settings, ErrorTelemetry,
            args,
        ),
        publish=partial(_publish, ema, config, task, folder),
        reference=partial(_compute, references, (data, held), task) if objective.needs_reference else None,
        callbacks=[*([ema] if ema else []), *_shown(config, task, folder, reader, held_out or train)],
        counts={"pairs": len(train), "val_pairs": len(held_out), **told},
    )  # fmt: skip
    return run_training(spec)


def settings_of(config: SdxlPreferenceConfig, schedule: Schedule) -> Settings:
    """The numbers of the objective, of configuration and schedule."""
    return Settings(
        config.beta, dspo_lambda=config.dspo_lambda, dspo_stop_gradient=config.dspo_stop_gradient,
        mapo_snr=config.mapo_snr or Settings.mapo_snr, num_timesteps=schedule.num_timesteps,
    )  # fmt: skip


def choose_objective(config: SdxlPreferenceConfig, settings: Settings, schedule: Schedule) -> Objective:
    """The configured objective, with the anchor to the winner's error where it has a weight."""
    anchor = [("sft", config.sft_weight)] if config.sft_weight else []
    names, weights = zip((config.objective, 1.0), *anchor, strict=True)
    return mix(names, weights, settings, SdxlFamily.supplies - {*ERRORS.values()} | {schedule.supplies})


def _pairs(config: SdxlPreferenceConfig, artifact: Artifact, split: ImageSplit) -> list[PairImages]:
    """The pairs of a split, as the configuration has them; raises InputError when there are none to train on."""
    half: Half = config.prompt_half if split == "train" else "all"
    pairs = counted_alike([pair for pair in read_image_pairs(artifact, split) if in_half(pair.prompt_id, half)])
    if split == "train" and not pairs:
        raise InputError(
            "no pairs to train on", where=artifact.path, expected="rows with split: train",
            fix="rate more images, or lower the thresholds of build_image_pairs",
        )  # fmt: skip
    return pairs


def _labelled(
    pairs: list[PairImages], config: SdxlPreferenceConfig, task: Task, objective: Objective, cache: TensorCache
) -> list[PairImages]:
    """With the reward model's labels where the objective asks for them, and as the control shuffles them."""
    if "soft_label" in objective.needs:
        pairs = with_soft_labels(pairs, config, task, cache)
    shuffled = config.shuffle_labels and not any(pair.held_out for pair in pairs)
    return list(balance_labels(pairs, config.seed)) if shuffled else pairs


def _plan(pairs: Sequence[PairImages], config: SdxlPreferenceConfig) -> list[Microbatch]:
    """The microbatches of `max_steps` optimizer steps, else of all epochs."""
    if config.max_steps is None:
        return plan_epochs(pairs, config, config.num_train_epochs)
    per_epoch = -(-len(pairs) // config.effective_batch_size)
    plan = plan_epochs(pairs, config, -(-config.max_steps // per_epoch))
    return [item for item in plan if item.step < config.max_steps]


def _arguments(config: SdxlPreferenceConfig, task: Task, plan: Sequence[Microbatch]) -> TrainingArguments:
    # The UNet checkpoints by itself: transformers would ask it in a language model's words.
    args = plan_arguments(config.model_copy(update={"activation_checkpointing": False}), task, plan)
    args.report_to = [name for name in config.report_to if name != "tensorboard"]  # in its place: TensorBoardCurves
    args.ddp_find_unused_parameters = False  # every weight that is trained has a part in every loss
    return args


def _encode(
    config: SdxlPreferenceConfig, task: Task, cache: TensorCache, folder: SdxlFolder, schedule: Schedule,
    device: torch.device, train: Sequence[PairImages], held_out: Sequence[PairImages], plan: Sequence[Microbatch],
) -> PairReader:  # fmt: skip
    """Have the latents and embeddings of all pairs in the cache."""
    images = ImageKeys(folder.digest("vae"), config.resolution, config.vae_precision, config.bucket_step)
    texts = text_keys(folder, config.precision)
    reader = PairReader(
        cache, images, texts, schedule, config.seed, config.random_flip, config.caption_dropout, config.noise_offset
    )
    epochs = sorted({item.epoch for item in plan})
    seen = [(pair, epoch) for epoch in epochs for pair in train] + [(pair, 0) for pair in held_out]
    reader.encode(folder, seen, config.vae_batch_size, device, advance_together(task))
    return reader


def _references(
    config: SdxlPreferenceConfig, folder: SdxlFolder, reader: PairReader, pairs: Sequence[PairImages],
    device: torch.device,
    objective: Objective,
) -> ReferenceErrors:  # fmt: skip
    # All that changes the last bits: errors of another kernel would make the margin at step 0 not 0 but nearly 0.
    settings = {
        "unet": folder.digest(folder.backbone.part, "scheduler"), "precision": config.precision,
        "base": config.lora is not None, "attention": config.attn_implementation, "compile": config.torch_compile,
        "device": device_kind(device),
    }  # fmt: skip
    told = folder.backbone.told(folder.denoiser_settings, config.guidance_scale)
    settings |= {} if told is None else {"guidance": told}
    at_once, residuals = config.per_device_train_batch_size, "residuals" in objective.needs
    return ReferenceErrors(
        pairs, reader, settings, at_once, torch_dtype(config.precision), residuals, winner_alone(config)
    )


def _compute(
    references: Sequence[ReferenceErrors], data: Sequence[PreferenceData | None], task: Task,
    trainer: PreferenceTrainer, model: Any,
) -> tuple[Reference, Reference]:  # fmt: skip
    """The reference's errors, by the policy that still is the reference, or with its adapter off."""
    model.to(trainer.args.device)
    # The Trainer's own autocast, so that the reference rounds as training does.
    with trainer.compute_loss_context_manager():
        for errors, given in zip(references, data, strict=True):
            if given is not None:
                errors.compute(model, used_by(given.plan), trainer.args.device, task)
    return references[0].scores, references[1].scores


def _predictions(references: Sequence[ReferenceErrors]) -> Callable[[PairImages, int], Tensor]:
    """What the reference predicts for a pair's winner, whichever pairs it is one of."""

    def prediction(pair: PairImages, epoch: int) -> Tensor:
        (holder,) = (errors for errors in references if errors.holds(pair))
        return holder.prediction(pair, epoch)

    return prediction


def winner_alone(config: SdxlPreferenceConfig) -> bool:
    """Whether the loser's prediction has no part in the gradient."""
    return config.objective == "sft" or (config.objective == "dspo" and config.dspo_stop_gradient)


def _shown(
    config: SdxlPreferenceConfig, task: Task, folder: SdxlFolder, reader: PairReader, pairs: Sequence[PairImages]
) -> list[TensorBoardCurves | SampleGrid]:
    curves = [TensorBoardCurves()] if "tensorboard" in config.report_to else []
    if config.sample_steps is None:
        return [*curves]
    # Not a set: the order of strings in one differs from process to process, and so would the prompts drawn.
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))[: config.num_samples]
    return [*curves, SampleGrid(prompts, config, folder, reader.cache, reader.texts, task.logs)]


def _publish(
    ema: Ema | None, config: SdxlPreferenceConfig, task: Task, folder: SdxlFolder, trainer: PreferenceTrainer
) -> Metrics:
    """Write the adapter or the whole pipeline, of the averaged weights where they are averaged."""
    if ema is not None:
        ema.copy_to(trainer.model)
    first = trainer.is_world_process_zero()
    weights = whole_weights(trainer.model, keep=first) if config.lora is None else None  # every rank has a part
    if first:
        save_finished(trainer.model, weights, config, task, folder)
    return {}


class ErrorTelemetry(Telemetry):
    """Adds the winner's change of error over the reference, m_w - m_w_ref, and for DSPO its cosine to fine-tuning."""

    def columns(self, scores: PairScores, objective: Objective, settings: Settings) -> dict[str, Tensor]:
        """The values of every pair by name, [N] each."""
        columns = super().columns(scores, objective, settings)
        if scores.ref_chosen is not None:
            columns["winner_error_change"] = scores.ref_chosen - scores.chosen
        if scores.chosen_residual is not None:
            columns["sft_cosine"] = cosine_to_sft(scores, settings)
        return columns

    def means(self) -> dict[str, float]:
        """Means over the pairs since the last call."""
        rows = self._window
        added = [name for name in ("winner_error_change", "sft_cosine") if rows and name in rows[0]]
        return {**{name: sum(row[name] for row in rows) / len(rows) for name in added}, **super().means()}


def cosine_to_sft(scores: PairScores, settings: Settings) -> Tensor:
    """The cosine, [N], between the gradients of `dspo` and `sft` at the prediction: 1 where DSPO is fine-tuning."""
    residual, drift = (value.detach() for value in residual_and_drift(scores))
    factor = settings.dspo_lambda * (1 - torch.sigmoid(settings.beta / 2 * scores.margin)).detach()
    return torch.cosine_similarity(residual - factor[:, None] * drift, residual, dim=1)
