"""What a form of preference data is: its keys, and what a row of it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unicodedata import normalize

from prefmill.pairs.turns import Answer, Turn, as_answer

Row = Mapping[str, Any]
Tags = Mapping[str, str]
SYSTEM_COLUMNS = ("system", "system_prompt")  # what may stand beside a row's turns; the second is OpenOrca's
Kind = Literal["text", "list", "dict", "label", "text or list", "prompt"]
_TYPES: dict[Kind, tuple[type, ...]] = {
    "text": (str,), "list": (list, tuple), "dict": (dict,), "label": (bool, int, float, str),
    "text or list": (str, list, tuple), "prompt": (str, list, tuple, dict),
}  # fmt: skip


@dataclass(frozen=True)
class Preference:
    """Two answers to one chat; `images` stand for the `<image>` markers in it, in order: a path, a URL or bytes."""

    messages: list[Turn]
    chosen: Answer
    rejected: Answer
    images: tuple[Any, ...] = ()
    tools: tuple[Any, ...] = ()

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The better one first."""
        return self.chosen, self.rejected

    @property
    def scores(self) -> tuple[float, ...]:
        """The higher for the better one."""
        return 1, 0


@dataclass(frozen=True)
class Judgement:
    """One answer to a chat, and whether it is a good one; answers to one prompt make preferences."""

    messages: list[Turn]
    answer: Answer
    is_good: bool
    images: tuple[Any, ...] = ()
    tools: tuple[Any, ...] = ()

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The one."""
        return (self.answer,)

    @property
    def scores(self) -> tuple[float, ...]:
        """1 for a good one, 0 for a bad one."""
        return (self.is_good,)


@dataclass(frozen=True)
class ScoredAnswers:
    """Answers to one chat and a score of each, higher for better; one alone is compared with other rows' answers."""

    messages: list[Turn]
    answers: tuple[Answer, ...]
    scores: tuple[float, ...]
    images: tuple[Any, ...] = ()
    tools: tuple[Any, ...] = ()


Found = Preference | Judgement | ScoredAnswers
Parse = Callable[[Row, Tags], Found]


@dataclass(frozen=True)
class Form:
    """A form by its keys: those it needs, with what they hold, and those that would make it another form.

    `items` has the keys that are read of the objects in a list, and columns that a row need not have.
    """

    needs: Mapping[str, Kind]
    parse: Parse
    without: Sequence[str] = ()
    items: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The keys of a row that are read, those that it need not have among them."""
        more = ("input", "history") if "instruction" in self.needs else ()
        beside = {*SYSTEM_COLUMNS, "tools", "images", "image", "id", "pair_id", "split"}
        return {*self.needs, *self.items, *more, *beside}

    def fits(self, row: Row) -> bool:
        """Whether `row` has this form's keys, holding what they should."""
        return all(isinstance(row.get(key), _TYPES[kind]) for key, kind in self.needs.items()) and not any(
            row.get(key) is not None for key in self.without
        )


def words(answer: Answer) -> str:
    """What an answer says, white space and Unicode's composition aside: no more than these would be learned."""
    turn = as_answer(answer)
    return json.dumps({**turn, "content": normalize("NFC", turn["content"]).strip()})
