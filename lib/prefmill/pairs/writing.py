"""Pairs and chats from outside as prefmill's own rows, each written as it comes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from prefmill.core.errors import InputError
from prefmill.core.files import unique_suffix
from prefmill.pairs.forms import Judgement, Preference, words
from prefmill.pairs.pairing import UnusableRow, pair_up, prompt_of
from prefmill.pairs.pictures import image_path
from prefmill.pairs.sources import PairSource, parsed_rows
from prefmill.pairs.turns import Turn, as_answer
from prefmill.store.jsonl import JsonlWriter
from prefmill.training.bad_rows import BadRows

_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
FoundT = TypeVar("FoundT")
OwnRow = tuple[str, dict[str, Any]]
"""The key of a prompt, and one of prefmill's own rows."""


def write_pairs(source: PairSource, folder: Path, report: Path) -> tuple[Path, Path | None]:
    """Write the source's pairs as prefmill's own rows into `folder`; returns the train file, and val where asked for.

    Images that came as bytes are written below `folder` too. Raises InputError naming the first bad row, or with
    `on_bad_row: drop` lists them in `report` and raises where no pair is left.
    """
    problems: list[UnusableRow] = []
    pairs = tqdm(pair_up(parsed_rows(source, problems), problems), desc="reading pairs", unit=" pairs")
    seen = Counter[tuple[str, int, int]]()

    def own_row(pair_id: str, pair: Preference) -> OwnRow:
        group = prompt_of(pair)
        row = _own_row(pair_id, group, pair, source, folder)
        seen[group, hash(words(pair.chosen)), hash(words(pair.rejected))] += 1
        return group, row

    def rows() -> Iterator[OwnRow]:
        yield from own_rows(pairs, own_row, source, problems, report)
        again, turned = seen.total() - len(seen), sum((prompt, bad, good) in seen for prompt, good, bad in seen) // 2
        if again or turned:
            print(f"{again:,} pairs stand there again and {turned:,} both ways round: all are trained on", flush=True)
        if not seen:
            raise _no_pairs(source, problems, report)

    return write_split(rows(), source, folder, "dpo")


def own_rows(
    found: Iterable[tuple[str, FoundT]],
    own_row: Callable[[str, FoundT], OwnRow],
    source: PairSource,
    problems: list[UnusableRow],
    report: Path,
) -> Iterator[OwnRow]:
    """A row of each thing found, one in memory at a time; what is left out, `problems` too, is listed at the end."""
    bad, kept = BadRows(report, source.on_bad_row == "drop"), 0
    for name, item in identified(found):
        row = None
        with bad.row(f"row {name}"):
            row = own_row(name, item)
        if row is not None:
            kept += 1
            yield row
    bad.found = dict(problems) | bad.found  # only now, as `problems` is filled on the way
    bad.tell(kept)


def _no_pairs(source: PairSource, problems: list[UnusableRow], report: Path) -> InputError:
    faults = Counter(problem.what for problem in problems)
    fix = f"see the rows in {report}" if problems else "give a file that has rows"
    if any(fault.endswith("no pair") for fault in faults):
        fix = f"give two answers to a prompt, one with the higher score or the better label; all rows are in {report}"
    if any("good answers only" in fault for fault in faults):
        fix += "; or train on the good answers alone with the stage sft, which takes this file"
    got = "; ".join(f"{count:,} rows: {fault}" for fault, count in faults.most_common(3)) or None
    return InputError("no pairs to train on", where=source.source_name, got=got, fix=fix)


def write_split(rows: Iterable[OwnRow], source: PairSource, folder: Path, kind: str) -> tuple[Path, Path | None]:
    """Write rows, each with the key of its prompt, as `kind`_train and `kind`_val; None where nothing is held out."""
    train, val = folder / f"{kind}_train" / "data.jsonl", folder / f"{kind}_val" / "data.jsonl"
    # Inside the with: where no row is left for one of them, no file of either appears.
    with JsonlWriter(train, unique_suffix()) as training, JsonlWriter(val, unique_suffix()) as held_out:
        for prompt, row in rows:
            # By a hash of the prompt: its pairs stay together, and rows that are added move no other prompt.
            coin = int.from_bytes(hashlib.sha256(f"{source.seed}:{prompt}".encode()).digest()[:8]) / 2**64
            (held_out if coin < source.val_fraction else training).write(row)
        if not training.num_rows or (source.val_fraction and not held_out.num_rows):
            raise InputError(
                "too few prompts to hold some out", got=training.num_rows + held_out.num_rows,
                where=source.source_name, fix="change val_fraction or seed",
            )  # fmt: skip
    return train, val if held_out.num_rows else None


def identified(rows: Iterable[tuple[str, FoundT]]) -> Iterator[tuple[str, FoundT]]:
    """Rows by names that are all different: a name met again gets a number."""
    taken: set[str] = set()
    for name, found in rows:
        names = chain([name], (f"{name}~{number}" for number in count(2)))
        taken.add(free := next(other for other in names if other not in taken))
        yield free, found


def _own_row(pair_id: str, group: str, pair: Preference, source: PairSource, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": pair_id,
        "group": group,
        "conversations": list(map(_said, pair.messages)),
        "chosen": _said(as_answer(pair.chosen)),
        "rejected": _said(as_answer(pair.rejected)),
    }
    return row | beside(pair_id, pair, source, folder)


def beside(row_id: str, found: Preference | Judgement, source: PairSource, folder: Path) -> dict[str, Any]:
    """The tools and images of one of prefmill's own rows, where it has any."""
    row: dict[str, Any] = {"tools": list(found.tools)} if found.tools else {}
    if found.images:
        row["images"] = [image_path(image, row_id, source.image_base, folder) for image in found.images]
    return row


def _said(turn: Turn) -> dict[str, Any]:
    more = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return {"from": _SPEAKERS[turn["role"]], "value": turn["content"], **more}
