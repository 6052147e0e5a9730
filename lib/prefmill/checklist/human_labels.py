"""People's answers to checklist items, from a table: what a judge is held against."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefmill.checklist.label_files import LabelFile
from prefmill.core.errors import nearest

COLUMNS = ("review_id", "item_id", "label")
_ANSWERS = {"yes": True, "y": True, "1": True, "true": True, "no": False, "n": False, "0": False, "false": False}


@dataclass(frozen=True)
class Label:
    """What a person answered to one item about one review."""

    review_id: str
    item_id: str
    yes: bool
    rater: str = ""


def read_item_labels(path: Path, review_ids: Collection[str], item_ids: Collection[str]) -> list[Label]:
    """The labels in a table with the columns review_id, item_id and label (yes or no, 1 or 0, true or false).

    A column `rater`, or what else tables call it, says whose they are.

    Raises InputError naming the line of a missing column or value, an unknown review or item, a label that is neither
    yes nor no, or an answer given twice; and where there is no label at all.
    """
    file = LabelFile(path, "unusable item labels", COLUMNS)
    labels: dict[tuple[str, str, str], Label] = {}
    for where, row in file.rows():
        label = _label(file, row, where, review_ids, item_ids)
        key = (label.review_id, label.item_id, label.rater)
        if key in labels:
            fix = "keep one answer to each, or say in a column `rater` who gave it"
            raise file.unusable(where, f"{key[1]} of review {key[0]} again", fix)
        labels[key] = label
    return list(labels.values())


def _label(
    file: LabelFile, row: dict[str, str], where: str, review_ids: Collection[str], item_ids: Collection[str]
) -> Label:
    for name, known in (("review_id", review_ids), ("item_id", item_ids)):
        if row[name] not in known:
            hint = nearest(row[name], list(known)) if name == "item_id" else ""
            fix = "write an id of the corpus, and of checklist.json beside the scores, or delete the line"
            raise file.unusable(where, f"{name} {row[name]!r}{hint}", fix)
    answer = _ANSWERS.get(row["label"].lower().removesuffix(".0"))  # of a table with gaps
    if answer is None:
        raise file.unusable(where, f"label {row['label']!r}", "write yes or no, 1 or 0, or delete the line")
    return Label(row["review_id"], row["item_id"], answer, row["rater"])


def votes_of(labels: Iterable[Label]) -> dict[tuple[str, str], list[bool]]:
    """All answers to an item about a review, by both their ids."""
    votes: dict[tuple[str, str], list[bool]] = {}
    for label in labels:
        votes.setdefault((label.review_id, label.item_id), []).append(label.yes)
    return votes


def majority(votes: Mapping[tuple[str, str], Sequence[bool]]) -> list[Label]:
    """What most people answered; where as many say yes as no there is no label."""
    return [
        Label(review_id, item_id, 2 * sum(given) > len(given))
        for (review_id, item_id), given in votes.items()
        if 2 * sum(given) != len(given)
    ]
