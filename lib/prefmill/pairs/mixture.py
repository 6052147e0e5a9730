"""Rows of several files in the shares of their weights, none twice, the same whenever they are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from pydantic import Field

from prefmill.core.config import ExternalPath, StrictConfig

RowT = TypeVar("RowT")


class MixedFile(StrictConfig):
    """A file of a mixture, its share being `weight` over the sum of all; see PairSource for the other keys."""

    file: ExternalPath
    weight: float = Field(gt=0)
    pair_format: str | None = None
    columns: dict[str, str | None] = {}
    tags: dict[str, str] = {}


def mixed(
    files: Sequence[MixedFile], rows: Sequence[Sequence[RowT]], prompt_of: Callable[[RowT], str], seed: int
) -> Iterator[RowT]:
    """As many `rows` of each file as fit the weights, file by file; the scarcest file is taken whole. Says how many."""
    whole = sum(part.weight for part in files)
    shares = [part.weight / whole for part in files]
    total = min(len(found) / share for found, share in zip(rows, shares, strict=True))
    for place, (part, found, share) in enumerate(zip(files, rows, shares, strict=True)):
        # A seed for each file: rows added to one leave the order in which another is drawn.
        drawn = list(_drawn(found, round(share * total), prompt_of, f"{seed}:{place}"))
        print(f"mixture: {len(drawn):,} of {len(found):,} rows of {part.file.name} ({share:.0%})", flush=True)
        yield from drawn


def _drawn(rows: Sequence[RowT], count: int, prompt_of: Callable[[RowT], str], seed: str) -> Iterator[RowT]:
    """Up to `count` rows in their order, those of a prompt together: a pair's two answers may be two rows."""
    members: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        members.setdefault(prompt_of(row), []).append(place)
    prompts = list(members.values())
    random.Random(seed).shuffle(prompts)
    chosen: set[int] = set()
    for places in prompts:
        # A prompt that is too large is passed over: a later one may still fit.
        if len(chosen) + len(places) <= count:
            chosen.update(places)
    yield from (rows[place] for place in sorted(chosen))
