"""What rows of others hold that is no fault and deserves a word: not read, or trained where nobody expects it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from prefmill.core.errors import InputError
from prefmill.pairs.forms import Form, Found
from prefmill.pairs.turns import READ, as_answer

# UltraFeedback's `score_chosen`, Argilla's `chosen-rating` and their kin; not of lengths and log-probabilities.
_GRADE = "(score|rating|reward|grade)s?"
_SCORE = re.compile(rf"(.*[ _-])?{_GRADE}[ _-]chosen|chosen[ _-](.*[ _-])?{_GRADE}")
_LONG_PROMPT = 20  # characters; a shorter question is often repeated in a good answer


@dataclass
class Remarks:
    """Gathered row by row: columns asked for that no row had yet, what nothing reads, prompts within answers."""

    missing: set[str]
    unused: set[str] = field(default_factory=set)
    num_repeated: int = 0
    num_scored: int = 0
    num_worse: int = 0
    num_equal: int = 0

    def add_scores(self, values: Mapping[str, Any]) -> None:
        """Count a row that has scores of its own for both answers, and whether they say what the pair says."""
        both = next(((values[key], values.get(_rejected(key))) for key in values if _rejected(key)), None)
        if both and all(isinstance(score, int | float) and not isinstance(score, bool) for score in both):
            self.num_scored += 1
            self.num_worse += both[0] < both[1]
            self.num_equal += both[0] == both[1]

    def add_unused(self, values: Mapping[str, Any], form: Form, tags: Mapping[str, str]) -> None:
        """Add columns, and keys of messages, that hold something which nothing reads."""
        self.unused |= {str(key) for key, value in values.items() if value is not None} - form.keys
        for key, kind in form.needs.items():
            value = values.get(key)
            if kind == "dict" and isinstance(value, Mapping) and "messages" in value:
                self.unused |= _unread({**value, "messages": None, "tools": None}, key, set(tags.values()))
                value = value["messages"]
            self.unused |= _unread(value, key, {*tags.values(), *form.items.get(key, ())})

    def tell(self, where: str) -> None:
        """Print them; raises InputError for columns that no row has."""
        if self.missing:
            raise InputError(
                "columns names what no row has", where=where, got=", ".join(sorted(self.missing)),
                fix="correct columns, or leave these out of it",
            )  # fmt: skip
        if self.unused:
            print(f"columns that are not used: {', '.join(sorted(self.unused))}", flush=True)
        if self.num_worse or self.num_equal:
            print(
                f"by their own scores {self.num_worse:,} of {self.num_scored:,} pairs prefer the worse answer, and "
                f"{self.num_equal:,} have two equal ones: they are trained as they stand", flush=True,
            )  # fmt: skip
        if self.num_repeated:
            print(
                f"{self.num_repeated:,} rows have answers that begin with the whole prompt: it is trained as a part of "
                "them", flush=True,
            )  # fmt: skip


@cache
def _rejected(key: str) -> str:
    """The rejected answer's column where `key` is of the chosen one's score; empty for any other."""
    return key.replace("chosen", "rejected") if _SCORE.fullmatch(key) else ""


def repeats_prompt(found: Found) -> bool:
    """Whether every answer begins with the whole of a prompt that is long enough to tell."""
    asked = found.messages[-1]["content"].strip()
    return len(asked) >= _LONG_PROMPT and all(
        as_answer(answer)["content"].lstrip().startswith(asked) for answer in found.answers
    )


def listed(value: Any) -> list[Any]:
    """The objects in a list, or the one that stands alone."""
    return [item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, dict)]


def _unread(messages: Any, what: str, more: set[str]) -> set[str]:
    """What messages hold that nothing reads, such as `messages.score`; empty values, which tables fill in, aside."""
    return {
        f"{what}.{key}" for message in listed(messages)
        for key, value in message.items() if key not in READ | more and value not in (None, "", [], {})
    }  # fmt: skip
