"""What every source of reviews has in common: its configuration and what a format has to supply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self

from pydantic import Field, model_validator

from prefmill.core.config import ExternalPath, StrictConfig
from prefmill.reviews.rows import Item, Problem, Row, RowError, excerpt
from prefmill.store.jsonl import to_json


class SourceConfig(StrictConfig, ABC):
    """A source: `rows` reads what its file holds, `items` says what one row means.

    `venue` names the venue of rows that name none, `id_prefix` goes before every id, so that sources that number
    from 1 can be put together.
    """

    rating_min: float = Field(1, ge=1, le=10)
    rating_max: float = Field(10, ge=1, le=10)
    venue: str = ""
    id_prefix: str = Field("", pattern=r"^[A-Za-z0-9_-]*$")
    ignore_extra_fields: bool = False

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.rating_min >= self.rating_max:
            raise ValueError(f"rating_min ({self.rating_min:g}) must be below rating_max ({self.rating_max:g})")
        return self

    @property
    def scale(self) -> tuple[float, float]:
        """The lowest and the highest rating."""
        return self.rating_min, self.rating_max

    @abstractmethod
    def rows(self, source: int) -> Iterator[Row | Problem]:
        """The raw rows; `source` is this source's position in the configuration."""

    @abstractmethod
    def items(self, values: dict[str, Any]) -> list[Item]:
        """The papers, decisions and reviews in one raw row; raises RowError when it cannot be used."""


class FileSource(SourceConfig):
    """A source on disk."""

    path: ExternalPath


def read_source(config: SourceConfig, source: int) -> Iterator[tuple[Row, list[Item]] | Problem]:
    """Each row of a source with its items, or the problem with it. Raises InputError where no row can be read."""
    for row in config.rows(source):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            yield row, config.items(row.values)
        except RowError as error:
            yield problem_with(row, error)


def problem_with(row: Row, error: RowError) -> Problem:
    """The problem that `error` found in `row`."""
    try:
        shown = to_json(row.values)
    except ValueError:  # NaN
        shown = str(row.values)
    return Problem(row.place, error.reason, error.fix, excerpt(shown))
