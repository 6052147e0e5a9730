"""Chats to fine-tune on, row by row as a family encodes them: those at fault and those too long are listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from prefmill.core.errors import InputError
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl
from prefmill.training.bad_rows import BadRows
from prefmill.training.config import TrainingConfig
from prefmill.training.loop import report_dropped

EncodedT = TypeVar("EncodedT")


def encoded_chats(
    path: Path,
    encode: Callable[[Mapping[str, Any], list[str]], tuple[EncodedT, int]],
    config: TrainingConfig,
    task: Task,
    sees_images: bool,
) -> list[EncodedT]:
    """The rows of prefmill's own file at `path`; `encode` takes a row and its images' files and counts its tokens.

    Rows over max_length and rows at fault are listed in the logs and left out, or refused, as `config` says. Raises
    InputError for a row with images where the model is shown none.
    """
    kept, dropped, bad = [], [], BadRows.of(config, task)
    for row in tqdm(read_jsonl(path), desc=f"tokenising {path.parent.name}", unit=" rows"):
        images = [str(path.parent.parent / name) for name in row.get("images", ())]
        if images and not sees_images:
            raise no_images(f"{path}, row {row['id']}", images[0])
        with bad.row(f"{path.parent.name}, row {row['id']}"):
            encoded, num_tokens = encode(row, images)
            if num_tokens > config.max_length:
                dropped.append({"id": row["id"], "file": path.parent.name, "num_tokens": num_tokens})
            else:
                kept.append(encoded)
    bad.tell(len(kept) + len(dropped))
    report_dropped(task, dropped, len(kept), config)
    return kept


def no_images(where: str, image: str) -> InputError:
    """The refusal of a row with an image by a model that reads text alone."""
    return InputError(
        "this model cannot be shown images", where=where, got=image,
        fix="start from a vision-language model such as Qwen2.5-VL, or use modality: clean",
    )  # fmt: skip
