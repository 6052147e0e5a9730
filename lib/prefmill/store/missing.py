"""What is missing: a long phase is a loop over the keys that its store lacks, and each item is kept when it is made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prefmill.store.jsonl import read_jsonl, write_jsonl

Progress = Callable[[int, int | None, str], None]  # (done, total, unit), as Task.progress and Task.advance take them
KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")


def silent(done: int, total: int | None, unit: str) -> None:
    """Progress nobody follows."""


def in_batches(items: Sequence[ItemT], size: int) -> list[Sequence[ItemT]]:
    """`items` in order, `size` together; fewer in the last."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def missing(
    keys: Collection[KeyT],
    held: Callable[[KeyT], bool],
    advance: Progress,
    unit: str,
    at_once: int = 1,
    size: Callable[[KeyT], int] = lambda key: 1,
) -> Iterator[Sequence[KeyT]]:
    """The keys that are not `held`, in order, `at_once` together: what is made of them is kept before the next come.

    `advance` hears of every step and may raise to stop there (Task.advance does when asked to): what is kept stays
    kept, and the next attempt is not given it. `size` is what a key counts for, in `unit`.
    """
    from tqdm import tqdm

    left = [key for key in keys if not held(key)]
    total = sum(map(size, keys))
    done = total - sum(map(size, left))
    with tqdm(total=total, initial=done, desc=unit, disable=not left) as bar:
        # Before the first item too: a stop asked for while a model was loaded is heard here.
        advance(done, total, unit)
        for together in in_batches(left, at_once):
            yield together
            done += sum(map(size, together))
            bar.update(done - bar.n)
            advance(done, total, unit)


def kept_rows(
    folder: Path,
    name: str,
    blocks: Sequence[Sequence[ItemT]],
    make: Callable[[Sequence[ItemT]], list[Any]],
    advance: Progress,
    unit: str,
) -> list[Any]:
    """The rows that `make` gives for the blocks, in order; each block's are kept in `folder` as soon as they are made.

    What is in a block must follow from the task's identity alone. A file appears whole or not at all, and rows always
    come from it: an interrupted run and an undisturbed one see the same.
    """
    paths = [folder / f"{name}-{index:06}.jsonl" for index in range(len(blocks))]
    for (index,) in missing(
        range(len(blocks)), lambda at: paths[at].is_file(), advance, unit, size=lambda at: len(blocks[at])
    ):
        write_jsonl(paths[index], make(blocks[index]))
    return [row for path in paths for row in read_jsonl(path)]
