"""Questions with known answers: multiple choice by likelihood, exact match by generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from prefmill.core.config import ExternalPath, StrictConfig
from prefmill.core.errors import InputError
from prefmill.store.row_files import SourceRow, file_rows, hub_rows

_NAMES = ("question", "choices", "answer")
_EXPECTED = {
    "multiple_choice": "question, choices (a list of texts), answer (a choice's label, number from 0 or letter)",
    "exact_match": "question, answer (a text or a number)",
}


class BenchmarkConfig(StrictConfig):
    """A file or hub dataset of questions.

    `multiple_choice` rows have `question`, `choices` (texts) and `answer` (a choice's label where choices have any,
    else its number from 0 or its letter); `exact_match` rows `question` and `answer`, a text to be written word for
    word. `columns` maps these names to the data's own.
    """

    name: str
    kind: Literal["multiple_choice", "exact_match"]
    file: ExternalPath | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "test"
    dataset_revision: str | None = None
    columns: dict[str, str] = {}
    num_rows: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file is None) == (self.dataset is None):
            raise ValueError("give file or dataset, one of them")
        if self.file is not None and (given := self.changed("subset", "split")):
            raise ValueError(f"{', '.join(given)}: of a dataset on the hub, a file has none; leave it out")
        return self


@dataclass(frozen=True)
class Question:
    """A question, its choices (none where the answer is a text to be written) and the right answer."""

    question_id: str
    text: str
    choices: tuple[str, ...]
    answer: str


def read_questions(config: BenchmarkConfig) -> list[Question]:
    """The benchmark's questions; raises InputError naming a row that is none."""
    if config.file is not None:
        rows: Iterator[SourceRow] = file_rows(config.file)
    else:
        rows = hub_rows(str(config.dataset), config.subset, config.split, config.dataset_revision)
    questions = [_question(row, config) for row in islice(rows, config.num_rows)]
    if not questions:
        raise InputError("a benchmark without questions", where=config.file or config.dataset, fix="check the file")
    return questions


def _question(row: SourceRow, config: BenchmarkConfig) -> Question:
    question, choices, answer = (row.values.get(config.columns.get(name, name)) for name in _NAMES)
    name = str(row.values.get("id", row.number))
    if config.kind == "multiple_choice":
        texts = _choices(choices)
        right = _chosen(_text(answer), choices, texts)
    else:
        texts, right = (), _text(answer)
    if not isinstance(question, str) or not right:
        known = zip(_NAMES, (question, choices, answer), strict=True)
        raise InputError(
            f"not a row of {config.kind}", where=row.where,
            got=", ".join(f"{name} {value!r:.80}" for name, value in known if name in _EXPECTED[config.kind]),
            expected=_EXPECTED[config.kind], fix="map the data's names with columns, or write its values so",
        )  # fmt: skip
    # GSM8K's answers are worked out in text, the number behind ####.
    if "####" in right:
        raise InputError(
            "this answer is a solution, which no model writes word for word", where=row.where, got=right[-60:],
            expected="a text that is the answer", fix="set harness.tasks=[gsm8k], which reads the number off",
        )  # fmt: skip
    return Question(name, question, texts, right)


def _text(value: Any) -> str:
    """A text, or a number as one would write it; "" for anything else: no model is to write `None`, or a list."""
    if isinstance(value, float):  # of a table with gaps, where 4 is 4.0
        return f"{value:.0f}" if value.is_integer() else str(value) if isfinite(value) else ""
    return str(value) if isinstance(value, (str, int)) else ""


def _choices(value: Any) -> tuple[str, ...]:
    """The texts of choices: a list, or as the hub's {"text": [...], "label": [...]}; none where one is no text."""
    given = value.get("text") if isinstance(value, Mapping) else value
    listed: Sequence[Any] = given if isinstance(given, (list, tuple)) else ()  # a text's letters would be choices
    texts = tuple(str(item) for item in listed if _text(item))
    return texts if len(texts) == len(listed) else ()


def _chosen(answer: str, choices: Any, texts: Sequence[str]) -> str:
    """The right text: by its choice's own label (ARC has letters or 1 to 4), else its number or letter; "" for none."""
    labels = [_text(label) for label in choices.get("label") or ()] if isinstance(choices, Mapping) else []
    known = labels or list("ABCDEFGHIJ")
    answer = answer.strip().removesuffix(".0")
    if answer.isdecimal() and not labels:
        place = int(answer)
    else:
        wanted = answer if labels else answer.upper()
        place = known.index(wanted) if wanted in known else len(texts)
    return texts[place] if place < len(texts) else ""
