"""What every training stage shares: where it starts, its adapter, training from the newest checkpoint on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.files import write_atomic
from prefmill.core.stage import Task
from prefmill.training.checkpoints import newest_checkpoint
from prefmill.training.config import TrainingConfig
from prefmill.training.publish import save_finished

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def add_adapter(model: PreTrainedModel, config: TrainingConfig) -> Any:
    """`model` with the adapter that `config.lora` asks for, or unchanged."""
    if config.lora is None:
        return model
    import peft

    from prefmill.core.seeding import seeded

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
    from prefmill.distributed.sharding import gather_model

    with trainer.args.main_process_first(local=False):  # it deletes torn checkpoints before others look
        checkpoint = newest_checkpoint(task.output)
    trainer.train(resume_from_checkpoint=checkpoint)
    first = trainer.is_world_process_zero()
    gather_model(trainer.model, keep=first)  # every rank has a part
    if first:
        save_finished(trainer.model, tokenizer, task.output, config, task)
    trainer.accelerator.wait_for_everyone()


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
