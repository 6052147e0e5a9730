"""Questions with known answers: multiple choice by likelihood, exact match by generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from prefmill.core.config import ExternalPath, StrictConfig
from prefmill.core.errors import InputError
from prefmill.store.row_files import SourceRow, file_rows, hub_rows


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
    values = {name: row.values.get(config.columns.get(name, name)) for name in ("question", "choices", "answer")}
    name = str(row.values.get("id", row.number))
    try:
        choices = _choices(values["choices"]) if config.kind == "multiple_choice" else ()
        answer = str(values["answer"]) if not choices else choices[_place(values["answer"], values["choices"])]
    except (IndexError, TypeError, ValueError, KeyError):
        choices, answer = (), ""
    if not isinstance(values["question"], str) or not answer or (config.kind == "multiple_choice" and not choices):
        raise InputError(
            f"not a row of {config.kind}", where=row.where, got=f"keys {', '.join(row.values)}",
            expected="question, answer" + (", choices" if config.kind == "multiple_choice" else ""),
            fix="map the data's names with columns",
        )  # fmt: skip
    # GSM8K's answers are worked out in text, the number behind ####.
    if "####" in answer:
        raise InputError(
            "this answer is a solution, which no model writes word for word", where=row.where, got=answer[-60:],
            expected="a text that is the answer", fix="set harness.tasks=[gsm8k], which reads the number off",
        )  # fmt: skip
    return Question(name, values["question"], choices, answer)


def _choices(value: Any) -> tuple[str, ...]:
    """The texts of choices: a list, or as the hub's {"text": [...], "label": [...]}."""
    texts = value["text"] if isinstance(value, Mapping) else value
    return tuple(str(text) for text in texts)


def _place(answer: Any, choices: Any) -> int:
    """A choice's number from 0: by its own label (ARC has letters or 1 to 4), else its number or letter."""
    labels = [str(label) for label in choices.get("label", ())] if isinstance(choices, Mapping) else []
    if labels:
        return labels.index(str(answer).strip())
    if isinstance(answer, str) and answer.strip().upper() in set("ABCDEFGHIJ"):
        return ord(answer.strip().upper()) - ord("A")
    place = int(answer)
    # A negative number would count from the last choice, and be taken for right.
    if place < 0:
        raise IndexError
    return place
