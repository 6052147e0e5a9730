"""Rows of annotation tools, which hold several people's answers, as rows of one answer: columns as in ratings.csv."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, zip_longest
from typing import Any

from prefmill.core.image_rows import DIMENSIONS
from prefmill.images.rating import choice_of

Row = dict[str, Any]


def single_answers(row: Row) -> list[Row]:
    """A row for each answer in a row of Label Studio's, Argilla's or Prodigy's JSON; any other row as it is.

    What is skipped is a skip, what nobody answered a row with an empty choice.
    """
    if isinstance(data := row.get("data"), dict) and isinstance(row.get("annotations"), list):
        answers: Iterable[Row] = _of_label_studio(row["annotations"])
    elif isinstance(row.get("options"), list) and isinstance(row.get("accept"), list):
        data, answers = {}, _of_prodigy(row)
    elif (found := list(_of_argilla(row))) or any(key == "responses" or key.endswith(".responses") for key in row):
        fields = row.get("fields")
        plain = {key: cell for key, cell in row.items() if isinstance(cell, str | int | float) and "." not in key}
        data, answers = fields if isinstance(fields, dict) else plain, found
    else:
        return [row]
    return [{**data, **answer} for answer in answers] or [{**data, **_answer("", "")}]


def _of_label_studio(annotations: list[Row]) -> Iterator[Row]:
    for one in annotations:
        by = one.get("completed_by")
        rater = (by.get("email") or by.get("id")) if isinstance(by, dict) else by
        values = [(result.get("from_name"), result.get("value") or {}) for result in one.get("result") or []]
        # Its pairs and its choices; texts, as of a remark, are no answers.
        said = [(name, value.get("selected") or value.get("choices")) for name, value in values]
        said = [("", "skip")] if one.get("was_cancelled") else [answer for answer in said if answer[1]]
        yield from (_answer(name, value, rater) for name, value in said or [("", "")])


def _of_argilla(row: Row) -> Iterator[Row]:
    """Of objects with a `user_id` each, as a question has them in its JSON, or of its columns side by side."""
    given = row["responses"] if isinstance(row.get("responses"), dict) else row
    for name, cell in given.items():
        for one in cell if isinstance(cell, list) else ():
            if isinstance(one, dict) and "user_id" in one:
                yield _answer(name, one.get("value"), one["user_id"], one.get("status"))
    for name in (key for key in row if key.endswith(".responses")):
        columns = [row.get(name + more) or [] for more in ("", ".users", ".status")]
        yield from (_answer(name.removesuffix(".responses"), *one) for one in zip_longest(*columns))


def _of_prodigy(row: Row) -> Iterator[Row]:
    """Every two pictures of which one at least was chosen; another option, such as a tie, is said by its id."""
    rater, chosen = row.get("_annotator_id") or row.get("_session_id"), {*map(str, row["accept"])}
    files = {str(one.get("id")): one["image"] for one in row["options"] if one.get("image")}
    skipped, others = row.get("answer", "accept") != "accept", sorted(chosen - {*files})
    for first, second in combinations(files, 2):
        if skipped or others or {first, second} & chosen:
            choice = others[0] if others else choice_of((first in chosen) - (second in chosen))
            sides = {"left": files[first], "right": files[second]}
            yield {**sides, **_answer("", "skip" if skipped else choice, rater)}


def _answer(question: str, value: Any, rater: Any = None, status: str | None = None) -> Row:
    """An answer to the question of a dimension, or overall; one that was not handed in is a skip."""
    if isinstance(value, list) and all(isinstance(one, dict) and "rank" in one for one in value):
        ranks = [one["rank"] for one in value]
        value = [one["value"] for one in value if one["rank"] == min(ranks)]
        value = value if len(value) == 1 else "tie"
    said = value[0] if isinstance(value, list) and len(value) == 1 else value
    handed_in = status in (None, "submitted")
    named = {} if rater is None else {"rater": str(rater)}  # without one the file's name is the rater
    dimension = question.lower() if str(question).lower() in DIMENSIONS else "overall"
    return {**named, "dimension": dimension, "choice": str("" if said is None else said) if handed_in else "skip"}
