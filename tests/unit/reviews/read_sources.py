"""A source's items and problems, as its configuration has them read, for tests of the formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefmill.reviews.rows import Item, RowProblem
from prefmill.reviews.source import SourceConfig, read_source
from prefmill.reviews.sources import Source

ROW = {"paper_id": "p1", "title": "T", "review_id": "r1", "review_text": "Fine.", "rating": 6}


class Holder(BaseModel):
    """A configuration with one source."""

    source: Source


def source(**values: Any) -> SourceConfig:
    """The configuration of a source."""
    return Holder.model_validate_json(json.dumps({"source": values}, default=str)).source


def read(config: SourceConfig) -> tuple[list[Item], list[RowProblem]]:
    """All items, and all problems."""
    items: list[Item] = []
    problems = []
    for row in read_source(config, 0):
        if isinstance(row, RowProblem):
            problems.append(row)
        else:
            items += row[1]
    return items, problems


def items_of(config: SourceConfig) -> list[Item]:
    """All items, where there are no problems."""
    items, problems = read(config)
    assert problems == []
    return items


def write(path: Path, value: Any) -> Path:
    """A file of text, or of a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path
