"""Supervised fine-tuning with TRL's SFTTrainer, on completions only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from prefmill.callbacks import StageCallback
from prefmill.causal.chat import encode
from prefmill.causal.loading import load_model, load_tokenizer
from prefmill.records import read_jsonl
from prefmill.stage import Metrics, Task
from prefmill.training import (
    TrainingConfig,
    add_adapter,
    report_dropped,
    train_and_save,
    trainer_arguments,
    weights_precision,
    world_size,
)

_IGNORED = -100  # a label that takes no part in the loss


def train_sft(config: TrainingConfig, task: Task, model_name: str, train: Path, val: Path | None) -> Metrics:
    """Fine-tune `model_name` on the chats in `train`, resuming where an earlier attempt stopped.

    The loss is that of the completions' tokens, averaged over an optimizer step. Raises ConfigError for over-long
    rows unless they are to be dropped.
    """
    tokenizer = load_tokenizer(model_name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    datasets = {"train": load_chats(train, tokenizer, config, task)}
    if val is not None:
        datasets["val"] = load_chats(val, tokenizer, config, task)
    model = load_model(
        model_name,
        precision=weights_precision(config),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    arguments = TrlConfig(
        **trainer_arguments(config, task, world_size()),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="epoch" if val is not None else "no",
    )
    trainer = SFTTrainer(
        model=add_adapter(model, config),
        args=arguments,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("val"),
        processing_class=tokenizer,
        callbacks=[StageCallback(task)],
    )
    train_and_save(trainer, tokenizer, config, task)
    val_losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return {
        "steps": trainer.state.global_step,
        "train_rows": len(datasets["train"]),
        "val_loss": val_losses[-1] if val_losses else None,
    }


def load_chats(path: Path, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig, task: Task) -> Dataset:
    """The rows of an SFT dataset as `input_ids` and `labels`, prompt tokens ignored; over-long rows reported."""
    rows, dropped = [], []
    for row in tqdm(read_jsonl(path), desc=f"tokenising {path.parent.name}", unit=" rows"):
        encoded = _encode_row(row, tokenizer)
        if len(encoded["input_ids"]) > config.max_length:
            dropped.append({"id": row["id"], "file": path.parent.name, "num_tokens": len(encoded["input_ids"])})
        else:
            rows.append(encoded)
    report_dropped(task, dropped, len(rows), config)
    return Dataset.from_list(rows)


def _encode_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    *messages, answer = row["messages"]
    prompt, completion = encode(tokenizer, messages, answer["content"])
    return {"input_ids": prompt + completion, "labels": [_IGNORED] * len(prompt) + completion}
