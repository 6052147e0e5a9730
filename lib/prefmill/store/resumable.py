"""Long work in blocks, each stored as it is done, so that an interrupted task goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefmill.store.jsonl import read_jsonl, write_jsonl

Progress = Callable[[int, int | None, str], None]  # (done, total, unit), as Task.progress takes them


def silent(done: int, total: int | None, unit: str) -> None:
    """Progress nobody follows."""


def resumable_blocks(
    folder: Path, name: str, num_blocks: int, compute: Callable[[int], list[Any]]
) -> Iterator[list[Any]]:
    """The rows of blocks 0 to `num_blocks` - 1, from `folder` where an earlier attempt stored them.

    `compute(index)` makes a block's rows; what is in a block must follow from the task's identity alone. A file
    appears whole or not at all, and rows always come from it: an interrupted run and an undisturbed one see the same.
    """
    for index in range(num_blocks):
        path = folder / f"{name}-{index:06}.jsonl"
        if not path.is_file():
            write_jsonl(path, compute(index))
        yield list(read_jsonl(path))
