"""The formats of review sources, told apart in a configuration by `format`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from prefmill.reviews.generated import generate
from prefmill.reviews.nlpeer import NLPeerSource
from prefmill.reviews.openreview import OpenReviewSource
from prefmill.reviews.peerread import PeerReadSource
from prefmill.reviews.row_items import row_items
from prefmill.reviews.rows import Item, Place, RawRow, RowProblem
from prefmill.reviews.source import SourceConfig
from prefmill.reviews.tabular import CsvSource, JsonlSource


class GeneratedSource(SourceConfig):
    """The project's own corpus (see `prefmill.reviews.generated`); with `images`, a page and a figure a paper."""

    format: Literal["generated"]
    seed: int = Field(0, ge=0)
    num_papers: int = Field(ge=1)
    images: bool = False

    def rows(self, source: int) -> Iterator[RawRow | RowProblem]:
        """The generator's rows."""
        for number, values in enumerate(generate(self.seed, self.num_papers), 1):
            yield RawRow(Place(source, "(generated)", number), values)

    def items(self, values: dict[str, Any]) -> list[Item]:
        """The row's paper and review."""
        return row_items(values, self, drawn=self.images)


# To add a format: a module with a SourceConfig that says how its rows are read and what they mean, named here.
Source = Annotated[
    JsonlSource | CsvSource | GeneratedSource | OpenReviewSource | PeerReadSource | NLPeerSource,
    Field(discriminator="format"),
]
