"""What every training stage shares: its configuration, the Trainer's arguments, resuming, and the finished folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from prefmill.artifacts import CHECKPOINT_PREFIX, write_atomic
from prefmill.causal.loading import Precision
from prefmill.config import ExternalPath, StrictConfig, identity, runtime
from prefmill.errors import ConfigError, PipelineError
from prefmill.stage import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPLETE = "complete.json"  # written last into a trainer's checkpoint: without it the checkpoint is torn
STEPS = "steps.jsonl"  # the loss curve: one row for every logged step
EXECUTED = "executed_steps.jsonl"  # one row for every optimizer step this task ever took, repeats included


class LoraConfig(StrictConfig):
    """A low-rank adapter, merged into the weights of the finished checkpoint."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    use_dora: bool = False
    target_modules: str | list[str] = "all-linear"


class TrainingConfig(StrictConfig):
    """Keys of every training stage, under the names transformers and TRL give them.

    `effective_batch_size` counts what one optimizer step sees over all ranks; accumulation follows from it.
    A stage that saves what ranks hold together sets `can_shard`.
    """

    can_shard: ClassVar[bool] = True

    model_name_or_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    precision: Precision = "bf16"
    max_length: int = Field(4096, ge=2)
    on_overlong: Literal["fail", "drop"] = "fail"

    learning_rate: float = Field(gt=0)
    num_train_epochs: int = Field(ge=1)
    per_device_train_batch_size: int = Field(1, ge=1)
    effective_batch_size: int = Field(16, ge=1)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    lora: LoraConfig | None = None
    activation_checkpointing: bool = False
    deepspeed: ExternalPath | None = None
    fsdp: bool = False
    seed: int = 42

    logging_steps: int = runtime(10, ge=1)
    save_steps: int = runtime(500, ge=1)
    save_total_limit: int = runtime(2, ge=2)  # while one is written, the one before it is what a kill leaves
    dataloader_num_workers: int = runtime(0, ge=0)
    report_to: list[Literal["trackio", "tensorboard", "wandb"]] = runtime(["tensorboard"])

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _shipped_with_the_repository(cls, given: Any) -> Any:
        if not isinstance(given, str) or Path(given).expanduser().exists():
            return given
        from prefmill.pipeline.plan import default_workspace

        shipped = default_workspace() / given  # an absolute path stays what it is
        return str(shipped) if shipped.exists() else given

    @model_validator(mode="after")
    def _one_strategy(self) -> TrainingConfig:
        if self.fsdp and self.deepspeed:
            raise ValueError("fsdp and deepspeed both shard the model: give one of them")
        if (self.fsdp or self.deepspeed) and not self.can_shard:
            raise ValueError("this stage trains whole models: leave out fsdp and deepspeed")
        return self

    @model_validator(mode="after")
    def _curves_survive_a_restart(self) -> TrainingConfig:
        if self.save_steps % self.logging_steps:
            raise ValueError(
                "save_steps must be a multiple of logging_steps: a logged loss is the mean since the one before"
            )
        return self


def world_size() -> int:
    """Ranks that train together, as the launcher says; known before any process group is there."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation(config: TrainingConfig, world_size: int) -> int:
    """Microbatches a rank sees before an optimizer step; raises ConfigError where the batch does not divide."""
    at_once = config.per_device_train_batch_size * world_size
    if config.effective_batch_size % at_once:
        raise ConfigError(
            "effective_batch_size does not divide among the ranks", got=config.effective_batch_size,
            expected=f"a multiple of per_device_train_batch_size x ranks = {at_once}",
            fix=f"set effective_batch_size to {max(1, round(config.effective_batch_size / at_once)) * at_once}",
        )  # fmt: skip
    return config.effective_batch_size // at_once


def trainer_arguments(config: TrainingConfig, task: Task, world_size: int) -> dict[str, Any]:
    """Keyword arguments for transformers' TrainingArguments or TRL's SFTConfig; the tracker writes below the logs."""
    import torch

    from prefmill.strategies import sharding_arguments

    on_cpu = not torch.cuda.is_available()
    _point_trackers(task)
    return {
        "output_dir": str(task.output),
        "run_name": f"{task.run}-{task.stage}-{task.name}",
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.num_train_epochs,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation(config, world_size),
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.activation_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.activation_checkpointing else None,
        **sharding_arguments(config),
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "use_cpu": on_cpu,
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "dataloader_num_workers": config.dataloader_num_workers,
        "dataloader_pin_memory": not on_cpu,
        "remove_unused_columns": False,
        "report_to": list(config.report_to) or "none",
        "disable_tqdm": False,
    }


def newest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of an interrupted training in `folder`; torn ones are deleted.

    A checkpoint is complete when the record written after it names files that are all there in their full size.
    """
    complete: dict[int, Path] = {}
    for path in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        if _is_complete(path):
            complete[int(path.name.removeprefix(CHECKPOINT_PREFIX))] = path
        else:
            shutil.rmtree(path)
    return str(complete[max(complete)]) if complete else None


def mark_complete(checkpoint: Path) -> None:
    """Write the record that makes a checkpoint one that can be resumed from."""
    sizes = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    for name in sizes:  # the record must not reach the disk before what it vouches for
        with (checkpoint / name).open("rb") as stream:
            os.fsync(stream.fileno())
    write_atomic(checkpoint / COMPLETE, json.dumps(sizes))


def start_model(config: TrainingConfig, task: Task, name: str) -> str:
    """Where training starts: the checkpoint given as input `name`, else `model_name_or_path`; exactly one of them."""
    artifact = task.optional_input(name)
    if artifact is not None and config.model_name_or_path is None:
        return str(artifact.path)
    if artifact is None and config.model_name_or_path is not None:
        return config.model_name_or_path
    raise PipelineError(
        "no model to start from" if artifact is None else "two models to start from", where=f"{task.stage}:{task.name}",
        got=None if artifact is None else f"input {name} = {artifact.path} and {config.model_name_or_path}",
        fix=f"give either inputs.{name}=FOLDER or model_name_or_path",
    )  # fmt: skip


def weights_precision(config: TrainingConfig) -> Precision:
    """The precision weights are kept in: a frozen base as computed in, trained weights in fp32 under autocast.

    DeepSpeed computes in the weights' own precision, and keeps copies in fp32 that it trains.
    """
    return config.precision if config.lora or config.deepspeed else "fp32"


def add_adapter(model: PreTrainedModel, config: TrainingConfig) -> Any:
    """`model` with the adapter that `config.lora` asks for, or unchanged."""
    if config.lora is None:
        return model
    import peft

    from prefmill.tiny.seeding import seeded

    with seeded(config.seed):  # an adapter begins at random weights
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora.r,
                lora_alpha=config.lora.alpha,
                lora_dropout=0.0,
                use_dora=config.lora.use_dora,
                target_modules=config.lora.target_modules,
            ),
        )


def train_and_save(trainer: Any, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig, task: Task) -> None:
    """Train from the newest complete checkpoint on, then have one rank write the finished folder."""
    from prefmill.strategies import make_whole

    with trainer.args.main_process_first(local=False):  # it deletes torn checkpoints before others look
        checkpoint = newest_checkpoint(task.output)
    trainer.train(resume_from_checkpoint=checkpoint)
    first = trainer.is_world_process_zero()
    make_whole(trainer.model, keep=first)  # every rank has a part
    if first:
        save_finished(trainer.model, tokenizer, task.output, config, task)
    trainer.accelerator.wait_for_everyone()


def save_finished(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, config: TrainingConfig, task: Task
) -> None:
    """Write a plain Hugging Face folder: merged weights in safetensors, tokenizer, model card with the lineage."""
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    # Where a model was loaded from is a path of this machine, and no part of the content.
    merged.config._name_or_path = ""
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_atomic(folder / "README.md", model_card(task, config))


def model_card(task: Task, config: StrictConfig) -> str:
    """A model card with what the checkpoint was made from; the same content gives the same card."""
    inputs = [
        f"- {name}: `{item.manifest.kind}` of stage {item.manifest.stage}, content `{item.manifest.content_digest}`"
        for name, items in task.inputs.items()
        for item in items
    ]
    keys = identity(config)
    made_from, settings = (
        "\n".join(inputs or ["- nothing of this pipeline"]),
        json.dumps(keys, indent=1, sort_keys=True),
    )
    return (
        f"---\nlibrary_name: transformers\ntags: [prefmill, {task.stage}]\n---\n"
        f"# {task.stage}\n\nMade by prefmill's stage `{task.stage}`.\n\n"
        f"## Made from\n\n{made_from}\n\n## Configuration\n\n```json\n{settings}\n```\n"
    )


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The rows of a loss curve in the order of their steps; of a step taken twice the later row counts."""
    from prefmill.records import read_jsonl

    if not path.is_file():
        return []
    rows: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(path):
        rows[row["step"]] = {**rows.get(row["step"], {}), **row}
    return [rows[step] for step in sorted(rows)]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row and have it on disk before going on, so that a kill loses none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def report_dropped(task: Task, dropped: Sequence[Mapping[str, Any]], kept: int, config: TrainingConfig) -> None:
    """List over-long rows in the logs; raises ConfigError when `on_overlong` is `fail`, or when nothing is left."""
    path = task.logs / "overlong_rows.json"
    if dropped:
        files = {row.get("file") for row in dropped}
        others = [row for row in json.loads(path.read_text()) if row.get("file") not in files] if path.is_file() else []
        write_atomic(path, json.dumps([*others, *dropped], indent=1))
    if not dropped or (kept and config.on_overlong == "drop"):
        return
    longest = max(row["num_tokens"] for row in dropped)
    raise ConfigError(
        f"{len(dropped)} of {len(dropped) + kept} rows are longer than max_length",
        where=path, got=f"up to {longest} tokens", expected=f"at most {config.max_length}",
        fix=f"raise max_length to {longest}, or set on_overlong=drop to leave them out; nothing is ever truncated",
    )  # fmt: skip


def _is_complete(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
    except (FileNotFoundError, ValueError):
        return False
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )


def _point_trackers(task: Task) -> None:
    """Have every tracker write below the task's logs; none of them needs the network."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(task.logs / "tensorboard")
    os.environ.setdefault("TRACKIO_DIR", str(task.logs / "trackio"))
    os.environ.setdefault("WANDB_DIR", str(task.logs))
    os.environ.setdefault("WANDB_MODE", "offline")
