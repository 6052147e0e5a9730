"""The checklist: questions to which "yes" speaks for a review, their sources, and rules that may answer them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from prefmill.checklist.patterns import compile_patterns
from prefmill.core.config import ExternalPath, StrictConfig, read_yaml, validate
from prefmill.core.files import write_atomic

SHIPPED = Path(__file__).with_name("default.yaml")


def _compiles(pattern: str) -> str:
    # At reading, so that a faulty pattern is reported with its file and key before anything is scored.
    compile_patterns((pattern,))
    return pattern


def _asks(question: str) -> str:
    if not question.strip():
        raise ValueError("a question is not blank")
    return question


def _counts(weight: float) -> float:
    # Such an item would be asked about every review and change no score.
    if not weight:
        raise ValueError("a weight is not 0: leave the item out")
    return weight


Question = Annotated[str, AfterValidator(_asks)]
PatternText = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]


class Rule(StrictConfig):
    """When the lexical engine says yes: in at least `min_count` sentences.

    Such a sentence matches every pattern of `all_of`, one of `any_of` where there are any, and none of `none_of`.
    Patterns are regular expressions for lowercase text, with bounded repetitions (`prefmill.checklist.patterns`).
    """

    any_of: tuple[PatternText, ...] = ()
    all_of: tuple[PatternText, ...] = ()
    none_of: tuple[PatternText, ...] = ()
    min_count: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not (self.any_of or self.all_of):
            raise ValueError("a rule needs any_of or all_of")
        return self


class Item(StrictConfig):
    """A question about a review, worded so that yes is good; `source` names the guide and its idea.

    A negative `weight`, as optimize_checklist may find, makes yes speak against a review.
    """

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)
    question: Question
    source: str = Field(min_length=1)
    weight: Annotated[float, AfterValidator(_counts)] = 1.0
    rule: Rule | None = None
    paraphrases: tuple[Question, ...] = ()


class Checklist(StrictConfig):
    """Items with distinct ids and wordings, in the order in which they are asked."""

    name: str = Field(min_length=1)
    items: tuple[Item, ...] = Field(min_length=1)

    @field_validator("items")
    @classmethod
    def _distinct(cls, items: tuple[Item, ...]) -> tuple[Item, ...]:
        if again := given_twice(items):
            raise ValueError(again)
        return items

    @property
    def ids(self) -> tuple[str, ...]:
        """The items' ids, in order."""
        return tuple(item.id for item in self.items)


def load_checklist(path: Path | None = None) -> Checklist:
    """The checklist in a YAML or JSON file, or the shipped one (24 items).

    Raises ConfigError naming the file, the key, its value and what was expected.
    """
    source = SHIPPED if path is None else path
    return validate(Checklist, read_yaml(source), where=source)


def _readable(path: ExternalPath | None) -> ExternalPath | None:
    # A file that is not there yet may be made by then.
    if path is not None and path.is_file():
        load_checklist(path)
    return path


# Read with the configuration: a fault is found before anything runs.
ChecklistFile = Annotated[ExternalPath | None, AfterValidator(_readable)]


def save_checklist(checklist: Checklist, path: Path) -> None:
    """Write `checklist` as JSON that `load_checklist` reads back."""
    write_atomic(path, checklist.model_dump_json(indent=1) + "\n")


def given_twice(items: Sequence[Item], paraphrases: bool = False) -> str | None:
    """The ids, or else the questions (and `paraphrases`), that are there more than once; None where all differ.

    A question asked twice would count twice. Case and spaces make no other question.
    """
    if ids := _repeated([item.id for item in items]):
        return f"item ids given more than once: {', '.join(ids)}"
    # A paraphrase is asked by an optimisation alone, and checklists that one wrote before have it as an item as well.
    wordings = [(item, (item.question, *(item.paraphrases if paraphrases else ()))) for item in items]
    asked = [(" ".join(text.split()), item.id) for item, texts in wordings for text in texts]
    again = _repeated([text.casefold() for text, _ in asked])
    found = [f"{text!r} ({name})" for text, name in asked if text.casefold() in again]
    return f"questions asked more than once, so keep one of them: {', '.join(found)}" if found else None


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)
