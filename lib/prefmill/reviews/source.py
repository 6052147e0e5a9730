"""What every source of reviews has in common: its configuration and what a format has to supply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self

from pydantic import Field, model_validator

from prefmill.core.config import ExternalPath, StrictConfig
from prefmill.reviews.rows import Item, RawRow, RowError, RowProblem, excerpt, parse_rating, word_key
from prefmill.reviews.scale import COMMON_SCALE, Scale
from prefmill.store.jsonl import to_json


class SourceConfig(StrictConfig, ABC):
    """A source: `rows` reads what its file holds, `items` says what one row means.

    `venue` names the venue of rows that name none, `id_prefix` goes before every id, so that sources that number
    from 1 can be put together. `rating_words` gives the numbers of ratings in words, within rating_min to rating_max.
    """

    rating_min: float = Field(COMMON_SCALE[0], allow_inf_nan=False)
    rating_max: float = Field(COMMON_SCALE[1], allow_inf_nan=False)
    rating_words: dict[str, float] = Field(default_factory=dict)
    decimal_comma: bool = False
    venue: str = ""
    id_prefix: str = Field("", pattern=r"^[A-Za-z0-9_-]*$")
    ignore_extra_fields: bool = False

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.rating_min >= self.rating_max:
            raise ValueError(f"rating_min ({self.rating_min:g}) must be below rating_max ({self.rating_max:g})")
        for word, number in self.rating_words.items():
            if not self.rating_min <= number <= self.rating_max:
                bounds = f"{self.rating_min:g} to {self.rating_max:g}"
                raise ValueError(f"rating_words: {word!r} is {number:g}, outside rating_min to rating_max ({bounds})")
        return self

    @property
    def scale(self) -> Scale:
        """The lowest and the highest rating."""
        return self.rating_min, self.rating_max

    def rating(self, value: Any) -> float:
        """A rating as this source writes it; raises RowError where it is none, or outside the scale."""
        words = {word_key(word): number for word, number in self.rating_words.items()}
        return parse_rating(value, self.scale, words, self.decimal_comma)

    @abstractmethod
    def rows(self, source: int) -> Iterator[RawRow | RowProblem]:
        """The raw rows; `source` is this source's position in the configuration."""

    @abstractmethod
    def items(self, values: dict[str, Any]) -> list[Item]:
        """The papers, decisions and reviews in one raw row; raises RowError when it cannot be used."""


class FileSource(SourceConfig):
    """A source on disk."""

    path: ExternalPath


def read_source(config: SourceConfig, source: int) -> Iterator[tuple[RawRow, list[Item]] | RowProblem]:
    """Each row of a source with its items, or the problem with it. Raises InputError where no row can be read."""
    for row in config.rows(source):
        if isinstance(row, RowProblem):
            yield row
            continue
        try:
            yield row, config.items(row.values)
        except RowError as error:
            yield problem_with(row, error)


def problem_with(row: RawRow, error: RowError) -> RowProblem:
    """The problem that `error` found in `row`."""
    try:
        shown = to_json(row.values)
    except ValueError:  # NaN
        shown = str(row.values)
    return RowProblem(row.place, error.reason, error.fix, excerpt(shown))
