"""The configuration that every training stage has, and what follows from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from prefmill.core.config import ExternalPath, StrictConfig, later, runtime
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.places import expand_home
from prefmill.core.precision import Precision, Quantization
from prefmill.core.revisions import require_hub_name, snapshot
from prefmill.core.stage import Task
from prefmill.distributed.deepspeed_file import require_accumulation, require_agreement
from prefmill.training.adapter_folder import adapter_at, base_of, base_revision, lora_of, template_of
from prefmill.training.objective_names import listed
from prefmill.training.transformers_names import Optimizer, Schedule

OF_TEXT_MODELS = ("max_length", "on_overlong", "trust_remote_code")  # of TrainingConfig, without effect on images


class LoraConfig(StrictConfig):
    """A low-rank adapter, merged into the weights of the finished checkpoint.

    `start` is the folder of an adapter to go on with, which says the other keys itself.
    """

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32, gt=0, description="scale: the update is multiplied by alpha / r")
    use_dora: bool = Field(False, description="DoRA: learn magnitude and direction apart")
    target_modules: str | list[str] = Field(
        "all-linear", description="layers that get an adapter: their names, or all-linear"
    )
    # `later`: no part of the identity at its default, or trainings from before this key would be stale.
    start: ExternalPath | None = later(None)

    @field_validator("target_modules", mode="before")
    @classmethod
    def _word_is_a_name(cls, given: Any) -> Any:
        # PEFT reads a text as a regular expression of whole paths, which no layer has that a word names.
        return [given] if isinstance(given, str) and re.fullmatch(r"[\w.]+", given) else given

    @model_validator(mode="before")
    @classmethod
    def _as_it_began(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("start") is None:
            return values
        start = adapter_at(str(values["start"])) or expand_home(str(values["start"]))
        if not start.exists() and snapshot(str(values["start"])) is not None:
            raise ValueError(f"no such folder, nor an adapter in the hub's cache: `hf download {start}` fetches one")
        found = lora_of(start)
        # Before defaults are filled in, so only what the user wrote can disagree with the adapter.
        other = [key for key, value in found.items() if values.get(key, value) != value]
        if other:
            raise ValueError(f"the adapter to go on with has another {', '.join(other)}: leave it out")
        return {**found, **values, "start": str(start)}


class TrainingConfig(StrictConfig):
    """Keys of every training stage, under the names transformers and TRL give them.

    `effective_batch_size` counts what one optimizer step sees over all ranks; accumulation follows from it.
    A stage that saves what ranks hold together sets `can_shard`, one that scores through a head or model call of its
    own `own_head`, one that compiles its model itself `compiles_itself`, one whose frozen base may be `quantization:
    4bit` under an adapter (QLoRA) `can_quantize`.
    """

    can_shard: ClassVar[bool] = True
    own_head: ClassVar[bool] = False
    compiles_itself: ClassVar[bool] = False
    can_quantize: ClassVar[bool] = False

    model_name_or_path: str | None = Field(
        None, description="hub name or folder of the model to start from; leave it out where an input gives the model"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="allow the model's own Python code")
    attn_implementation: str | None = Field(None, description="transformers' name of the attention; none: its choice")
    precision: Precision = Field(
        "bf16", description="bf16, fp16 or fp32 to compute in; trained weights are kept in fp32"
    )
    save_dtype: Precision | Literal["auto"] = later(
        "auto",
        description="of the published weights; auto: as the base's files, or fp32 where that would lose the training",
    )
    max_length: int = Field(4096, ge=2, description="most tokens of a row; nothing is ever truncated")
    on_overlong: Literal["fail", "drop"] = Field(
        "fail",
        description="`fail` at rows longer than `max_length`, or `drop` them and list them in overlong_rows.json",
    )

    learning_rate: float = Field(gt=0, description="peak learning rate")
    num_train_epochs: int = Field(ge=1, description="passes over the training rows")
    per_device_train_batch_size: int = Field(1, ge=1, description="rows per rank and forward pass")
    effective_batch_size: int = Field(
        16, ge=1, description="rows per optimizer step over all ranks; accumulation is derived from it"
    )
    lr_scheduler_type: Schedule = Field("cosine", description="transformers' name of the schedule")
    lr_scheduler_kwargs: dict[str, Any] = later(
        {}, description="of the schedule, such as {min_lr_rate: 0.1} of cosine_with_min_lr"
    )
    warmup_steps: float = Field(0.0, ge=0, description="steps of warm-up, or below 1 their share of all steps")
    weight_decay: float = Field(0.0, ge=0, description="of the optimizer")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    lora: LoraConfig | None = Field(
        None, description="train an adapter, {r: 16, alpha: 32}, and merge it; `lora.start`: one to go on with"
    )
    quantization: Quantization | None = later(
        None, description="`4bit`: the frozen base in NF4 under `lora` (QLoRA, needs bitsandbytes); not sharded"
    )
    activation_checkpointing: bool = Field(False, description="less memory for about a third more time")
    deepspeed: ExternalPath | None = Field(
        None, description="a DeepSpeed JSON file, such as configs/deepspeed/zero3.json"
    )
    fsdp: bool = Field(False, description="shard weights, gradients and optimizer with FSDP2; instead of `deepspeed`")
    seed: int = Field(42, description="of adapters and of the order of rows")
    optim: Optimizer | None = later(None, description="transformers' name of it; none: the Trainer's default")
    use_liger_kernel: bool = later(False, description="Liger's kernels (package liger-kernel)")
    torch_compile: bool = later(False, description="compile the model")
    deterministic: bool = later(False, description="the same bits on a GPU too, slower")

    logging_steps: int = runtime(10, ge=1, description="steps between two points of the curves")
    save_steps: int = runtime(500, ge=1, description="steps between two checkpoints, a multiple of `logging_steps`")
    save_minutes: float = runtime(5.0, gt=0, description="minutes after which the next logged step saves too")
    save_total_limit: int = runtime(
        2, ge=2, description="checkpoints kept while training"
    )  # while one is written, the one before it is what a kill leaves
    dataloader_num_workers: int = runtime(0, ge=0, description="processes that load rows")
    report_to: list[Literal["trackio", "tensorboard", "wandb"]] = runtime(
        ["tensorboard"], description="trackers: tensorboard, trackio, wandb; all write below the task's logs"
    )
    ddp_timeout: int = runtime(
        21600, ge=1, description="seconds that ranks wait for each other"
    )  # seconds; ranks wait for the slowest one's share of hours of work

    @model_validator(mode="before")
    @classmethod
    def _adapter_is_continued(cls, values: Any) -> Any:
        """A folder with an adapter alone is that adapter to go on with, on the base that it names, in its template."""
        if not isinstance(values, dict) or not isinstance(values.get("lora") or {}, dict):
            return values
        named, revision, lora = values.get("model_name_or_path"), values.get("revision"), values.get("lora") or {}
        if not isinstance(revision, (str, type(None))):
            return values  # refused by itself
        folder = adapter_at(named, revision) if isinstance(named, str) else None
        if folder is not None and lora.get("start") is not None:
            raise ValueError("model_name_or_path and lora.start are both adapters: give one of them")
        # All is written into the configuration, so that the record says what was trained from.
        if folder is not None:
            if values.get("revision") is not None:
                require_hub_name("revision", "model_name_or_path", named)
            # What `revision` named was the adapter's: its base has its own.
            values = {**values, "revision": base_revision(folder)} if values.get("revision") is not None else values
            values = {**values, "model_name_or_path": base_of(folder), "lora": {**lora, "start": str(folder)}}
        start = folder or adapter_at(str(lora.get("start")))
        given = values.get("chat_template") or values.get("chat_template_file")
        if start is None or given or "chat_template" not in cls.model_fields:
            return values
        template = template_of(start)
        # Of several by name the tokenizer takes all.
        return {**values, "chat_template": template} if isinstance(template, str) else values

    @property
    def lora_start(self) -> Path | None:
        """The adapter that training goes on with."""
        return self.lora.start if self.lora else None

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _shipped_with_the_repository(cls, given: Any) -> Any:
        if not isinstance(given, str) or expand_home(given).exists():
            return given
        from prefmill.core.places import stages_folder

        shipped = stages_folder().resolve().parent / given  # an absolute path stays what it is
        return str(shipped) if shipped.exists() else given

    @field_validator("fsdp", mode="before")
    @classmethod
    def _one_switch(cls, given: Any) -> Any:
        if isinstance(given, (str, dict, list)):
            raise ValueError(
                "true or false: true shards all (full_shard auto_wrap); shard_grad_op is "
                "deepspeed: configs/deepspeed/zero2.json, offload is deepspeed: configs/deepspeed/zero3_offload.json"
            )
        return given

    @field_validator("report_to", mode="before")
    @classmethod
    def _none_of_them(cls, given: Any) -> Any:
        return [] if listed(given) == ["none"] else listed(given)  # as transformers has it

    @model_validator(mode="after")
    def _one_strategy(self) -> TrainingConfig:
        if self.fsdp and self.deepspeed:
            raise ValueError("fsdp and deepspeed both shard the model: give one of them")
        if (self.fsdp or self.deepspeed) and not self.can_shard:
            raise ValueError("this stage trains whole models: leave out fsdp and deepspeed")
        if self.deepspeed:
            require_agreement(self.deepspeed, self)
        return self

    @model_validator(mode="after")
    def _only_a_frozen_base_is_quantized(self) -> TrainingConfig:
        if self.quantization is None:
            return self
        if not self.can_quantize:
            raise ValueError("this stage trains on whole weights: leave quantization out")
        if self.lora is None:
            raise ValueError("a quantized model cannot be trained itself: add a lora section")
        if self.fsdp or self.deepspeed:
            raise ValueError("a quantized base is whole on every rank: leave out fsdp and deepspeed")
        return self

    @model_validator(mode="after")
    def _liger_finds_its_head(self) -> TrainingConfig:
        if self.use_liger_kernel and self.own_head:
            raise ValueError("this stage scores through its own head, which Liger would replace: leave it out")
        return self

    @model_validator(mode="after")
    def _curves_survive_a_restart(self) -> TrainingConfig:
        if self.save_steps % self.logging_steps:
            above = -(-self.save_steps // self.logging_steps) * self.logging_steps
            raise ValueError(
                f"save_steps {self.save_steps} is no multiple of logging_steps {self.logging_steps}, and a logged loss "
                f"is the mean since the one before: take save_steps={above}"
            )
        return self


def accumulation(config: TrainingConfig, world_size: int) -> int:
    """Microbatches a rank sees before an optimizer step; raises ConfigError where the batch does not divide."""
    at_once = config.per_device_train_batch_size * world_size
    if config.effective_batch_size % at_once:
        raise ConfigError(
            "effective_batch_size does not divide among the ranks", got=config.effective_batch_size,
            expected=f"a multiple of per_device_train_batch_size x ranks = {at_once}",
            fix=f"set effective_batch_size to {max(1, round(config.effective_batch_size / at_once)) * at_once}",
        )  # fmt: skip
    steps = config.effective_batch_size // at_once
    require_accumulation(config.deepspeed, steps)
    return steps


def weights_precision(config: TrainingConfig) -> Precision:
    """The precision weights are kept in: a frozen base as computed in, trained weights in fp32 under autocast.

    DeepSpeed computes in the weights' own precision, and keeps copies in fp32 that it trains.
    """
    return config.precision if config.lora or config.deepspeed else "fp32"


def needs_less(config: object) -> dict[str, Any]:
    """Keys with which a training needs less GPU memory for the same optimizer steps; empty where nothing is left."""
    if not isinstance(config, TrainingConfig):
        return {}
    at_once = config.per_device_train_batch_size
    if at_once > 1:  # the next smaller divisor: the effective batch still divides by it
        return {"per_device_train_batch_size": next(n for n in range(at_once - 1, 0, -1) if at_once % n == 0)}
    # Last, as it takes about a third more time.
    return {} if config.activation_checkpointing else {"activation_checkpointing": True}


def start_model(config: TrainingConfig, task: Task, name: str) -> str:
    """Where training starts: the checkpoint given as input `name`, else `model_name_or_path`; exactly one of them."""
    artifact = task.optional_input(name)
    if artifact is not None and config.model_name_or_path is None:
        return str(artifact.path)
    if artifact is None and config.model_name_or_path is not None:
        return config.model_name_or_path
    raise PipelineError(
        "no model to start from" if artifact is None else "two models to start from", where=task.key,
        got=None if artifact is None else f"input {name} = {artifact.path} and {config.model_name_or_path}",
        fix=f"give either inputs.{name}=FOLDER or model_name_or_path",
    )  # fmt: skip
