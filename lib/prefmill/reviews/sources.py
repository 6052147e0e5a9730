"""The formats of review sources, told apart in a configuration by `format`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prefmill.reviews.nlpeer import NLPeerSource
from prefmill.reviews.openreview import OpenReviewSource
from prefmill.reviews.peerread import PeerReadSource
from prefmill.reviews.tabular import CsvSource, GeneratedSource, JsonlSource

# To add a format: a module with a SourceConfig that says how its rows are read and what they mean, named here.
Source = Annotated[
    JsonlSource | CsvSource | GeneratedSource | OpenReviewSource | PeerReadSource | NLPeerSource,
    Field(discriminator="format"),
]
