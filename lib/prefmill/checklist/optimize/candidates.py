"""The candidate items: the shipped ones, a user's file, and what a model proposes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefmill.checklist.items import Checklist, Item, given_twice, load_checklist
from prefmill.core.errors import ConfigError

PARAPHRASE = "paraphrase_{item}_{number}"


def collect_candidates(path: Path | None, shipped: bool, proposed: Sequence[Item]) -> Checklist:
    """All candidates under one name; raises ConfigError for fewer than two, or an id or question given twice."""
    items = [*(load_checklist().items if shipped else ()), *(load_checklist(path).items if path else ()), *proposed]
    if again := given_twice(items, paraphrases=True):
        raise ConfigError(
            "candidate items with the same id or question", where=path, got=again,
            fix="rename or remove them in your file, or leave the shipped items out with shipped=false",
        )  # fmt: skip
    if len(items) < 2:
        raise ConfigError(
            "too few candidate items to choose from", where=path, got=len(items), expected="at least 2",
            fix="set shipped=true, or give more items in the file `candidates`",
        )  # fmt: skip
    return Checklist(name="candidates", items=tuple(items))


def with_paraphrases(candidates: Checklist, max_paraphrases: int) -> tuple[Checklist, dict[str, list[str]]]:
    """The checklist with paraphrases as items of their own, and their ids by the item they restate."""
    # A wording stands once: as an item of its own it is no paraphrase any more.
    items = [item.model_copy(update={"paraphrases": item.paraphrases[max_paraphrases:]}) for item in candidates.items]
    restated = {}
    for number, item in enumerate(candidates.items):
        wordings = item.paraphrases[:max_paraphrases]
        # By the item's place, as its id may already have the 64 characters that an id can have.
        ids = [PARAPHRASE.format(item=number, number=index) for index in range(len(wordings))]
        restated[item.id] = ids
        items += [
            Item(id=name, question=wording, source=item.source, rule=item.rule)
            for name, wording in zip(ids, wordings, strict=True)
        ]
    return Checklist(name=candidates.name, items=tuple(items)), restated
