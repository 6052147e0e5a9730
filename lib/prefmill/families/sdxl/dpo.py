"""Preference training of SDXL: caches, the reference, the trainer, the finished folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from prefmill.core.artifact import Artifact
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.image_rows import ImageSplit
from prefmill.core.precision import torch_dtype
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.devices import rank, world_size
from prefmill.distributed.sharding import unsharded_loading, whole_weights
from prefmill.families.reward.data import Half, in_half
from prefmill.families.sdxl.callbacks import Ema, SampleGrid, Sampling
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.data import PairImages, read_image_pairs, swap_by_coin
from prefmill.families.sdxl.encoding import ImageKeys, TextKeys, encode_images, encode_texts
from prefmill.families.sdxl.export import save_finished
from prefmill.families.sdxl.family import PairReader, sdxl_family
from prefmill.families.sdxl.loading import SdxlFolder, load_policy, open_folder, optimizer_name
from prefmill.families.sdxl.names import NEEDS_RESIDUALS
from prefmill.families.sdxl.noise import load_schedule
from prefmill.families.sdxl.objectives import DspoFactors, choose
from prefmill.families.sdxl.reference import ReferenceErrors, used_by
from prefmill.families.sdxl.soft_labels import with_soft_labels
from prefmill.families.sdxl.telemetry import ErrorTelemetry
from prefmill.store.tensor_cache import TensorCache, cache_folder
from prefmill.training.batches import Microbatch, one_by_one, plan_batches
from prefmill.training.callbacks import StageCallback
from prefmill.training.checkpoints import newest_checkpoint, resume_strictly
from prefmill.training.config import accumulation
from prefmill.training.objectives import Settings
from prefmill.training.reference import device_kind
from prefmill.training.trainer import PreferenceData, PreferenceTrainer, plan_arguments


def train_sdxl_dpo(config: SdxlPreferenceConfig, task: Task, start: str, pairs: Artifact) -> Metrics:
    """Tune the UNet of the pipeline `start` on image pairs, against itself as it was before the first step.

    Latents, text embeddings and the reference's errors are computed before training, or found in the cache: training
    runs the UNet alone. Resumes from the newest complete checkpoint.
    """
    folder = open_folder(start, config.revision, config.variant)
    train, held_out = _pairs(config, task, pairs, "train"), _pairs(config, task, pairs, "val")
    plan = _plan(train, config)
    held_plan = one_by_one(held_out, config.per_device_train_batch_size, config.seed) if held_out else []
    args = _arguments(config, task, plan)
    with unsharded_loading():
        reader = _encode(config, task, folder, args.device, train, held_out, plan)
        model = load_policy(folder, config)
    references = [_references(config, folder, reader, given, args.device) for given in (train, held_out)]
    residuals = config.objective in NEEDS_RESIDUALS
    objective = choose(config.objective, config.sft_weight, _factors(config))
    ema = Ema(config.ema_decay) if config.use_ema else None
    trainer = PreferenceTrainer(
        model=model,
        args=args,
        train=PreferenceData(train, None, plan),
        val=PreferenceData(held_out, None, held_plan) if held_out else None,
        family=sdxl_family(reader, _predictions(references) if residuals else None, _winner_alone(config)),
        objective=objective,
        settings=Settings(config.beta),
        telemetry=ErrorTelemetry(task.logs, rank(), _factors(config) if residuals else None),
        callbacks=[*([ema] if ema else []), StageCallback(task)],  # the average is part of a complete checkpoint
    )
    if config.sample_steps is not None:
        trainer.add_callback(_samples(config, task, folder, reader, held_out or train, trainer))
    if objective.needs_reference:
        _compute(trainer, references, (plan, held_plan), task)
        trainer.set_reference(references[0].scores, references[1].scores)
    _train_and_save(trainer, ema, config, task, folder)
    return _metrics(trainer, train, held_out)


def _pairs(config: SdxlPreferenceConfig, task: Task, artifact: Artifact, split: ImageSplit) -> list[PairImages]:
    """The pairs of a split, as the configuration has them; raises InputError when there are none to train on."""
    half: Half = config.prompt_half if split == "train" else "all"
    pairs = [pair for pair in read_image_pairs(artifact, split) if in_half(pair.prompt_id, half)]
    if split == "train" and not pairs:
        raise InputError(
            "no pairs to train on", where=artifact.path, expected="rows with split: train",
            fix="rate more images, or lower the thresholds of build_image_pairs",
        )  # fmt: skip
    if config.objective == "dspo_rm":
        pairs = with_soft_labels(pairs, config, task)
    return list(swap_by_coin(pairs, config.seed)) if config.shuffle_labels and split == "train" else pairs


def _plan(pairs: Sequence[PairImages], config: SdxlPreferenceConfig) -> list[Microbatch]:
    """The microbatches of `max_steps` optimizer steps, else of all epochs."""
    ranks = world_size()
    per_step, target = accumulation(config, ranks) * ranks, config.effective_batch_size
    if config.max_steps is None:
        return plan_batches(pairs, config.num_train_epochs, target, per_step, config.seed)
    epochs = -(-config.max_steps // -(-len(pairs) // target))
    return plan_batches(pairs, epochs, target, per_step, config.seed)[: config.max_steps * per_step]


def _arguments(config: SdxlPreferenceConfig, task: Task, plan: Sequence[Microbatch]) -> TrainingArguments:
    args = plan_arguments(config, task, plan)
    if config.precision == "fp16" and args.use_cpu:
        raise ConfigError(
            "fp16 needs a GPU", where="precision", got="no GPU that torch sees", fix="set precision: bf16 or fp32"
        )
    args.gradient_checkpointing = False  # transformers would ask the UNet in a language model's words
    args.optim = OptimizerNames(optimizer_name(config))
    args.ddp_find_unused_parameters = False  # every weight that is trained has a part in every loss
    return args


def _encode(
    config: SdxlPreferenceConfig, task: Task, folder: SdxlFolder, device: torch.device, train: Sequence[PairImages],
    held_out: Sequence[PairImages], plan: Sequence[Microbatch],
) -> PairReader:  # fmt: skip
    """Have the latents and embeddings of all pairs in the cache."""
    cache = TensorCache(cache_folder(task, config.cache_dir))
    images = ImageKeys(folder.digest("vae"), config.resolution, config.vae_precision)
    encoders = folder.digest("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    texts = TextKeys(encoders, config.precision)
    schedule = load_schedule(folder.path, config.min_snr_gamma)
    reader = PairReader(cache, images, texts, schedule, config.seed, config.random_flip)
    epochs = sorted({item.epoch for item in plan})
    seen = [(pair, epoch) for epoch in epochs for pair in train] + [(pair, 0) for pair in held_out]
    files = {
        (path, digest, reader.flipped(pair.pair_id, epoch))
        for pair, epoch in seen
        for path, digest in zip(pair.images, pair.digests, strict=True)
    }
    encode_images(sorted(files), folder, images, cache, config.vae_batch_size, device)
    encode_texts(sorted({"", *(pair.prompt for pair in [*train, *held_out])}), folder, texts, cache, device)
    return reader


def _references(
    config: SdxlPreferenceConfig, folder: SdxlFolder, reader: PairReader, pairs: Sequence[PairImages],
    device: torch.device,
) -> ReferenceErrors:  # fmt: skip
    settings = {
        "unet": folder.digest("unet", "scheduler"), "precision": config.precision, "base": config.lora is not None,
        "attention": config.attn_implementation, "compile": config.torch_compile,
        "device": device_kind(device),
    }  # fmt: skip
    at_once, residuals = config.per_device_train_batch_size, config.objective in NEEDS_RESIDUALS
    return ReferenceErrors(
        pairs, reader, settings, at_once, torch_dtype(config.precision), residuals, _winner_alone(config)
    )


def _compute(
    trainer: PreferenceTrainer,
    references: Sequence[ReferenceErrors],
    plans: Sequence[Sequence[Microbatch]],
    task: Task,
) -> None:
    """The reference's errors, by the policy that still is the reference, or with its adapter off."""
    model = trainer.model
    model.to(trainer.args.device).eval()
    with trainer.compute_loss_context_manager():
        for errors, plan in zip(references, plans, strict=True):
            if plan:
                errors.compute(model, used_by(plan), trainer.args.device, task)


def _predictions(references: Sequence[ReferenceErrors]) -> Callable[[PairImages, int], Tensor]:
    """What the reference predicts for a pair's winner, whichever pairs it is one of."""

    def prediction(pair: PairImages, epoch: int) -> Tensor:
        (holder,) = (errors for errors in references if errors.holds(pair))
        return holder.prediction(pair, epoch)

    return prediction


def _winner_alone(config: SdxlPreferenceConfig) -> bool:
    """Whether the loser's prediction has no part in the gradient."""
    return config.objective == "sft" or (config.objective == "dspo" and config.dspo_stop_gradient)


def _factors(config: SdxlPreferenceConfig) -> DspoFactors:
    return DspoFactors(config.dspo_lambda, config.dspo_stop_gradient)


def _samples(
    config: SdxlPreferenceConfig, task: Task, folder: SdxlFolder, reader: PairReader, pairs: Sequence[PairImages],
    trainer: PreferenceTrainer,
) -> SampleGrid:  # fmt: skip
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))[: config.num_samples]
    sampling = Sampling(prompts, config.sample_steps or 1, config.sample_inference_steps, config.resolution)
    return SampleGrid(sampling, folder, reader.cache, reader.texts, task.logs, trainer.accelerator.autocast)


def _train_and_save(
    trainer: PreferenceTrainer, ema: Ema | None, config: SdxlPreferenceConfig, task: Task, folder: SdxlFolder
) -> None:
    resume_strictly(trainer)
    with trainer.args.main_process_first(local=False):  # it deletes torn checkpoints before others look
        checkpoint = newest_checkpoint(task.output)
    trainer.train(resume_from_checkpoint=checkpoint)
    if ema is not None:
        ema.copy_to(trainer.model)
    first = trainer.is_world_process_zero()
    weights = whole_weights(trainer.model, keep=first) if config.lora is None else None  # every rank has a part
    if first:
        save_finished(trainer.model, weights, config, task, folder)
    trainer.accelerator.wait_for_everyone()


def _metrics(trainer: PreferenceTrainer, train: Sequence[PairImages], held_out: Sequence[PairImages]) -> Metrics:
    history: list[dict[str, Any]] = [row for row in trainer.state.log_history if "eval_accuracy" in row] or [{}]
    return {
        "steps": trainer.state.global_step,
        "pairs": len(train),
        "val_pairs": len(held_out),
        "val_accuracy": history[-1].get("eval_accuracy"),
        "val_margin": history[-1].get("eval_margin"),
    }
