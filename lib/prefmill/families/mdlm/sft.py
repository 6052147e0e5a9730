"""Supervised fine-tuning of masked-diffusion models, or training a small one from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prefmill.core.errors import InputError
from prefmill.core.stage import Metrics, Task
from prefmill.families.causal.chat import Answer, encode
from prefmill.families.mdlm.config import DiffusionSftConfig
from prefmill.families.mdlm.family import Drawing, diffusion_family, fill_groups
from prefmill.families.mdlm.loading import load_diffusion_tokenizer
from prefmill.families.mdlm.training import (
    NoMargins,
    check_in_shards,
    choose_checkpoint,
    diffusion_rescoring,
    load_scoring_model,
    publish_and_export,
    recomputed_by_layer,
)
from prefmill.store.row_files import file_rows
from prefmill.training.data import Group, Pair
from prefmill.training.loop import TrainingSpec, report_dropped, run_training
from prefmill.training.objectives import Settings, mix
from prefmill.training.preferences import Preferences, train_data, val_data


def train_diffusion_sft(config: DiffusionSftConfig, task: Task, start: str, train: Path, val: Path | None) -> Metrics:
    """Fine-tune `start` on the chats in `train`: the loss is -B/L per token, the mean over rows (LLaDA, eq. 5)."""
    config = recomputed_by_layer(config)
    options: Any = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    tokenizer = load_diffusion_tokenizer(start, template=config, today=task.began_on, **options)
    groups = load_chats(train, tokenizer, config, task)
    held_out = load_chats(val, tokenizer, config, task) if val is not None else []
    # The objective `sft` has no use for beta, which every Settings has.
    settings = Settings(beta=1.0)
    family = diffusion_family(Drawing(config.num_draws, config.sampling, config.seed))
    rescoring = diffusion_rescoring(config, tokenizer, family, groups)
    data = Preferences(
        train=train_data(groups, config),
        val=val_data(held_out, config),
        family=family,
        objective=mix(["sft"], [1.0], settings),
        settings=settings,
        telemetry=NoMargins,
    )
    spec = TrainingSpec(
        config=config,
        task=task,
        load=lambda: load_scoring_model(start, config, tokenizer),
        data=data,
        processor=tokenizer,
        check=partial(check_in_shards, config, tokenizer, start),
        publish=partial(publish_and_export, rescoring, tokenizer, config, task, start),
        resume=partial(choose_checkpoint, config),
        counts={"train_rows": len(groups), "answer_block_tokens": config.answer_block_tokens},
        logged={"val_loss": "eval_loss"},
    )
    return run_training(spec)


def load_chats(path: Path, tokenizer: PreTrainedTokenizerBase, config: DiffusionSftConfig, task: Task) -> list[Group]:
    """The chats in `path`, each a group of one response; over-long rows are reported and dropped, or refused."""
    groups, dropped = [], []
    for row in tqdm(file_rows(path), desc=f"tokenising {path.parent.name}", unit=" rows"):
        messages, answer = chat_of(row.values, row.where)
        prompt, response = encode(tokenizer, messages, answer, row.values.get("tools") or ())
        name = str(row.values.get("id", row.number))
        # Counted without the fill, which stops at max_length by itself.
        if len(prompt) + len(response) > config.max_length:
            dropped.append({"id": name, "file": path.parent.name, "num_tokens": len(prompt) + len(response)})
        else:
            groups.append(Group(prompt, [response], [Pair(name, 0, 0)]))
    report_dropped(task, dropped, len(groups), config)
    if not groups:
        raise InputError("no rows to train on", where=path, fix="check the file")
    return fill_groups(groups, config, tokenizer)


def chat_of(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], Answer]:
    """Messages and answer of a row of `messages`, or of `prompt` and `completion`; raises InputError for others."""
    messages = row.get("messages")
    if isinstance(messages, list) and len(messages) > 1 and messages[-1].get("role") == "assistant":
        return messages[:-1], messages[-1]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return [{"role": "user", "content": row["prompt"]}], row["completion"]
    raise InputError(
        "not a row to fine-tune on", where=where, got=f"keys {', '.join(row)}",
        expected="messages that end with the assistant's, or prompt and completion", fix="convert the file",
    )  # fmt: skip
