"""Supervised fine-tuning of masked-diffusion models, or training a small one from nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prefmill.core.errors import InputError
from prefmill.core.stage import Metrics, Task
from prefmill.distributed.devices import rank, world_size
from prefmill.families.causal.chat import encode
from prefmill.families.mdlm.config import DiffusionTrainingConfig
from prefmill.families.mdlm.family import Drawing, sft_family
from prefmill.families.mdlm.loading import load_diffusion_tokenizer
from prefmill.families.mdlm.training import NoMargins, SftTrainer, load_scoring_model, train_and_finish
from prefmill.store.row_files import file_rows
from prefmill.training.batches import one_by_one, plan_batches
from prefmill.training.callbacks import StageCallback
from prefmill.training.config import accumulation
from prefmill.training.data import Group, Pair
from prefmill.training.loop import report_dropped
from prefmill.training.objectives import Settings, mix
from prefmill.training.savable import ensure_savable
from prefmill.training.trainer import PreferenceData, plan_arguments


def train_diffusion_sft(
    config: DiffusionTrainingConfig, task: Task, start: str, train: Path, val: Path | None
) -> Metrics:
    """Fine-tune `start` on the chats in `train`: the loss is -B/L per token, the mean over rows (LLaDA, eq. 5)."""
    tokenizer = load_diffusion_tokenizer(start, revision=config.revision, trust_remote_code=config.trust_remote_code)
    groups = load_chats(train, tokenizer, config, task)
    held_out = load_chats(val, tokenizer, config, task) if val is not None else []
    settings = Settings(beta=1.0)
    ranks = world_size()
    per_step = accumulation(config, ranks) * ranks
    plan = plan_batches(groups, config.num_train_epochs, config.effective_batch_size, per_step, config.seed)
    at_once = config.per_device_train_batch_size
    assert tokenizer.eos_token_id is not None
    trainer = SftTrainer(
        model=load_scoring_model(start, config, tokenizer),
        args=plan_arguments(config, task, plan),
        train=PreferenceData(groups, None, plan),
        val=PreferenceData(held_out, None, one_by_one(held_out, at_once, config.seed)) if held_out else None,
        family=sft_family(Drawing(config.num_draws, config.sampling, config.seed), tokenizer.eos_token_id),
        objective=mix(["sft"], [1.0], settings),
        settings=settings,
        telemetry=NoMargins(task.logs, rank()),
        callbacks=[StageCallback(task)],
    )
    ensure_savable(trainer.model, tokenizer)
    saved = train_and_finish(trainer, tokenizer, config, task, start)
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return {
        "steps": trainer.state.global_step,
        "train_rows": len(groups),
        "val_loss": losses[-1] if losses else None,
        **saved,
    }


def load_chats(
    path: Path, tokenizer: PreTrainedTokenizerBase, config: DiffusionTrainingConfig, task: Task
) -> list[Group]:
    """The chats in `path`, each a group of one response; over-long rows are reported and dropped, or refused."""
    groups, dropped = [], []
    for row in tqdm(file_rows(path), desc=f"tokenising {path.parent.name}", unit=" rows"):
        messages, answer = chat_of(row.values, row.where)
        prompt, response = encode(tokenizer, messages, answer)
        name = str(row.values.get("id", row.number))
        if len(prompt) + len(response) > config.max_length:
            dropped.append({"id": name, "file": path.parent.name, "num_tokens": len(prompt) + len(response)})
        else:
            groups.append(Group(prompt, [response], [Pair(name, 0, 0)]))
    report_dropped(task, dropped, len(groups), config)
    if not groups:
        raise InputError("no rows to train on", where=path, fix="check the file")
    return groups


def chat_of(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, str]], str]:
    """Messages and answer of a row of `messages`, or of `prompt` and `completion`; raises InputError for others."""
    messages = row.get("messages")
    if isinstance(messages, list) and len(messages) > 1 and messages[-1].get("role") == "assistant":
        return messages[:-1], str(messages[-1]["content"])
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return [{"role": "user", "content": row["prompt"]}], row["completion"]
    raise InputError(
        "not a row to fine-tune on", where=where, got=f"keys {', '.join(row)}",
        expected="messages that end with the assistant's, or prompt and completion", fix="convert the file",
    )  # fmt: skip
