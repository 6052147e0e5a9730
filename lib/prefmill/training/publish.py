"""The finished folder of a training: weights, tokenizer and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.config import StrictConfig, identity
from prefmill.core.files import write_atomic
from prefmill.core.stage import Task
from prefmill.training.config import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
