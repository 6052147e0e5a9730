"""What the masked-diffusion training stages share: the model, the trainer, resuming and the finished folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefmill.core.files import write_json
from prefmill.core.places import CHECKPOINT_PREFIX
from prefmill.core.precision import torch_dtype
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.scoring import inner_model
from prefmill.distributed.sharding import shards_by_zero, shares_weights, uses_fsdp
from prefmill.families.causal.loading import LOADING, ORIGIN
from prefmill.families.causal.quantized import require_trainable
from prefmill.families.causal.whole import require_embedded
from prefmill.families.mdlm.as_published import READING, TOLD
from prefmill.families.mdlm.config import DiffusionModelConfig, DiffusionTrainingConfig
from prefmill.families.mdlm.family import LiveVariance
from prefmill.families.mdlm.load_check import check_diffusion_model
from prefmill.families.mdlm.loading import (
    block_length_of,
    load_diffusion_model,
    load_diffusion_tokenizer,
    mask_token_of,
    predicts_next,
    read_config,
    reading_of,
    record_reading,
)
from prefmill.families.mdlm.scorer import patch_forward
from prefmill.store.artifacts import payload
from prefmill.training.adapter import ADAPTER, add_adapter
from prefmill.training.checkpoints import newest_checkpoint
from prefmill.training.family import Family
from prefmill.training.finished import loading_precision
from prefmill.training.loop import TrainingSpec
from prefmill.training.objectives import Objective, PairScores, Settings
from prefmill.training.publish import Rescoring, pair_scorer, publish, shortest_pairs
from prefmill.training.telemetry import Speed, Telemetry
from prefmill.training.trainer import Preferences, PreferenceTrainer

ConfigT = TypeVar("ConfigT", bound=DiffusionTrainingConfig)
_log = logging.getLogger(__name__)


class DrawTelemetry(Telemetry):
    """Adds the live variance of the draws, and from then on as many draws are used as it asks for."""

    def __init__(self, folder: Path, rank: int, live: LiveVariance) -> None:
        super().__init__(folder, rank)
        self._live = live

    def means(self) -> dict[str, float]:
        """Means over the pairs since the last call, and the draws' variance."""
        report = self._live.report()
        self._live.follow(report)
        return {**super().means(), **report}


class NoMargins(Telemetry):
    """Fine-tuning as the preference trainer sees it: an objective of one side, nothing to prefer."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.speed = Speed(folder, rank)

    def add(self, pair_ids: list[str], scores: PairScores, objective: Objective, settings: Settings) -> None: ...

    def step(self, step: int, epoch: int) -> None: ...

    def means(self) -> dict[str, float]:
        """Nothing to report."""
        return {}

    def evaluated(self, losses: Tensor, margins: Tensor, pair_ids: Sequence[str]) -> dict[str, float]:
        """The loss alone."""
        return {"eval_loss": losses.mean().item()}


class FollowOnResume(TrainerCallback):
    """Takes up the number of draws where the resumed run's log left it."""

    def __init__(self, live: LiveVariance) -> None:
        self.live = live

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The log is restored with the checkpoint: the last recommendation in it holds."""
        for row in state.log_history:
            self.live.follow(row)


def opened(config: ConfigT, task: Task, start: str) -> tuple[ConfigT, PreTrainedTokenizerBase]:
    """The configuration as it runs here, outputs read as the model and adapter say, and the tokenizer of `start`."""
    options = config.model_dump(include=ORIGIN)
    tokenizer = load_diffusion_tokenizer(
        start, template=config, today=task.began_on, adapter=config.lora_start, **options
    )
    published = read_config(start, config.revision, config.trust_remote_code)
    require_trainable(start, published, config.quantization)
    told = reading_of(config.lora_start) | config.model_dump(include=set(READING), exclude_none=True)
    blocks = block_length_of(published, told.get("block_length"), config.attn_implementation)
    return recomputed_by_layer(config.model_copy(update={**told, "block_length": blocks})), tokenizer


def diffusion_spec(
    config: DiffusionTrainingConfig,
    task: Task,
    start: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Preferences,
    **more: Any,
) -> TrainingSpec:
    """The training of `start` on `data`; `more` are keys of TrainingSpec."""
    parts: list[Any] = [part for part in (data.train, data.val) if part is not None]
    rows = (ids for part in parts for group in part.groups for ids in (group.prompt, *group.responses))
    # A configuration of its own code may not say it.
    size = getattr(read_config(start, config.revision, config.trust_remote_code), "vocab_size", None)
    require_embedded(rows, tokenizer, size, start)
    rescoring = diffusion_rescoring(config, tokenizer, data.family, data.train.groups)
    return TrainingSpec(
        config=config,
        task=task,
        load=lambda: load_scoring_model(start, config, tokenizer),
        data=data,
        processor=tokenizer,
        check=partial(check_in_shards, config, tokenizer, start),
        publish=partial(publish_and_export, rescoring, tokenizer, config, task, start),
        resume=partial(choose_checkpoint, config),
        **more,
    )


def load_scoring_model(name: str, config: DiffusionTrainingConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model to train, with its adapter, returning the values of draws instead of logits."""
    shared = shares_weights(config)
    model = load_diffusion_model(
        name,
        run=not shared,
        precision=loading_precision(name, config, config.revision),
        **config.model_dump(include=LOADING),
    )
    record_reading(model.config, config.model_dump(include=set(READING)))
    if not getattr(model, "supports_gradient_checkpointing", False):
        # The method of transformers raises for such a model; the Trainer calls it by the first name since 5.20.
        model.activation_checkpointing_enable = lambda *_, **__: checkpoint_layers(model)
        model.gradient_checkpointing_enable = model.activation_checkpointing_enable
    # Before the adapter is put on: PEFT then wraps a model whose forward scores already.
    install_for(model, config, tokenizer, config.forward_batch_size)
    if not shared:
        check_loaded(model, config, tokenizer, name)
    return add_adapter(model, config)


def check_in_shards(config: DiffusionTrainingConfig, tokenizer: PreTrainedTokenizerBase, name: str, model: Any) -> None:
    """Check a model that ranks share and run together; any other was checked when it was loaded."""
    if shares_weights(config):
        check_loaded(model, config, tokenizer, name)


def check_loaded(model: Any, config: DiffusionTrainingConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise InputError where the scorer of `model` does not compute its own likelihoods."""
    inner = inner_model(model)
    mask, shifted = _outputs_of(inner, config, tokenizer)
    # FSDP2 and 4-bit layers compute in the run's precision, whatever the weights' dtype says.
    exact = not uses_fsdp(config) and config.quantization is None
    computed = inner.dtype if exact else torch_dtype(config.precision)
    check_diffusion_model(model, name, mask, shifted, computed, config.block_length)


def recomputed_by_layer(config: ConfigT) -> ConfigT:
    """`config` with `activation_checkpointing` under ZeRO-3, and a warning where it was off.

    Draws run again in the backward pass. torch then keeps what a whole pass has saved, and ZeRO-3 gathers weights into
    new storage: all of them would be whole at once. FSDP2 empties the storage that autograd has saved.
    """
    if config.activation_checkpointing or not shards_by_zero(config):
        return config
    _log.warning("ZeRO-3: activations are recomputed layer by layer, as if activation_checkpointing were true")
    return config.model_copy(update={"activation_checkpointing": True})


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute each layer in the backward pass, for models whose own code does not offer it (LLaDA).

    The layers are the longest list of modules in the model.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in max(lists, key=len, default=()):
        # No generator's state is kept: dropout is off, so a layer draws nothing.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def install_for(model: Any, config: DiffusionModelConfig, tokenizer: Any, forward_batch_size: int) -> None:
    """Have `model` score, as the configuration says how its outputs are read."""
    mask, shifted = _outputs_of(model, config, tokenizer)
    patch_forward(
        model, mask_token_id=mask, shifted=shifted, forward_batch_size=forward_batch_size,
        block_length=config.block_length,
    )  # fmt: skip


def _outputs_of(model: Any, config: DiffusionModelConfig, tokenizer: Any) -> tuple[int, bool]:
    """The id of the mask token, and whether the output at a place is for the token after it."""
    return mask_token_of(model, tokenizer, config.mask_token_id), predicts_next(model, config.shifted_logits)


def publish_and_export(
    rescoring: Rescoring, tokenizer: PreTrainedTokenizerBase, config: DiffusionTrainingConfig, task: Task, start: str,
    trainer: PreferenceTrainer,
) -> Metrics:  # fmt: skip
    """Publish what was trained from `start`, to `output_dir` too."""
    saved: Metrics = publish(trainer, tokenizer, config, task, start, rescoring)
    if config.lora is not None and trainer.is_world_process_zero():
        said = {key: getattr(inner_model(trainer.model).config, key, None) for key in READING}
        write_json(task.output / ADAPTER / TOLD, said)
    if config.output_dir is not None and trainer.is_world_process_zero():
        export(task.output, config.output_dir)
    return saved


def diffusion_rescoring(
    config: DiffusionTrainingConfig, tokenizer: PreTrainedTokenizerBase, family: Family, groups: Sequence[Any]
) -> Rescoring:
    """The shortest pairs' ELBOs over the first epoch's draws; what trained on 4-bit weights is saved on whole ones."""
    # As anyone would load the finished folder: no special kernels, no adapter, whole weights.
    plain = {"precision": "fp32", "attn_implementation": None, "quantization": None, "lora": None}
    whole = config.model_copy(update=plain)
    parts = shortest_pairs(groups, lambda group, pair: group.tokens_of(pair))
    score = pair_scorer(family, groups, parts)
    quantized = config.quantization is not None
    return Rescoring(lambda name: load_scoring_model(name, whole, tokenizer), score, score, quantized)


def choose_checkpoint(config: DiffusionTrainingConfig, output: Path) -> str | None:
    """Where to resume: the newest complete checkpoint of this task, or the folder that the configuration names.

    With `resume_from_checkpoint: false` checkpoints of this task are deleted.
    """
    if config.resume_from_checkpoint is False:
        for path in output.glob(f"{CHECKPOINT_PREFIX}*"):
            shutil.rmtree(path)
    # First the task's own: after a kill it goes on from there, not from the named folder once more.
    newest = newest_checkpoint(output)
    if newest is None and isinstance(config.resume_from_checkpoint, Path):
        return str(config.resume_from_checkpoint)
    return newest


def export(output: Path, folder: Path) -> None:
    """Copy the finished files to a folder of the user's."""
    for path in payload(output):
        target = folder / path.relative_to(output)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
