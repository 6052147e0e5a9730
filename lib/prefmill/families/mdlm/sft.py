"""Supervised fine-tuning of masked-diffusion models, or training a small one from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefmill.core.errors import InputError
from prefmill.core.stage import Metrics, Task
from prefmill.families.causal.chat import encode
from prefmill.families.mdlm.config import DiffusionSftConfig
from prefmill.families.mdlm.family import Drawing, diffusion_family, fill_groups
from prefmill.families.mdlm.training import NoMargins, diffusion_spec, opened
from prefmill.training.data import Group, Pair, encoded_chats
from prefmill.training.loop import run_training
from prefmill.training.objectives import Settings, mix
from prefmill.training.trainer import Preferences, train_data, val_data


def train_diffusion_sft(config: DiffusionSftConfig, task: Task, start: str, train: Path, val: Path | None) -> Metrics:
    """Fine-tune `start` on the chats in `train`: the loss is -B/L per token, the mean over rows (LLaDA, eq. 5)."""
    config, tokenizer = opened(config, task, start)
    groups = load_chats(train, tokenizer, config, task)
    # The objective `sft` has no use for beta, which every Settings has.
    settings = Settings(beta=1.0)
    drawing = Drawing(config.num_draws, config.sampling, config.seed, block_length=config.block_length)
    data = Preferences(
        train=train_data(groups, config),
        val=val_data(load_chats(val, tokenizer, config, task) if val is not None else [], config),
        family=diffusion_family(drawing),
        objective=mix(["sft"], [1.0], settings),
        settings=settings,
        telemetry=NoMargins,
    )
    counts = {"train_rows": len(groups), "answer_block_tokens": config.answer_block_tokens}
    spec = diffusion_spec(config, task, start, tokenizer, data, counts=counts, logged={"val_loss": "eval_loss"})
    return run_training(spec)


def load_chats(path: Path, tokenizer: PreTrainedTokenizerBase, config: DiffusionSftConfig, task: Task) -> list[Group]:
    """The chats in `path`, each a group of one response, filled with end tokens."""

    def as_group(row: Mapping[str, Any], _images: Sequence[str]) -> tuple[Group, int]:
        *messages, answer = row["messages"]
        prompt, response = encode(tokenizer, messages, answer, row.get("tools", ()))
        # Counted without the fill, which stops at max_length by itself.
        return Group(prompt, [response], [Pair(str(row["id"]), 0, 0)]), len(prompt) + len(response)

    groups = encoded_chats(path, as_group, config, task, sees_images=False)
    if not groups:
        raise InputError("no rows to train on", where=path, fix="check the file")
    return fill_groups(groups, config, tokenizer)
