"""Papers, reviews and evaluations by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.scored import ScoredReview
from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.records import Paper
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl

MakeArtifact = Callable[..., Artifact]
MakeScored = Callable[..., ScoredReview]


@pytest.fixture
def artifact(tmp_path: Path) -> MakeArtifact:
    """Publishes rows by file name, as an artifact of a kind in a folder of its own."""

    def make(folder: str, kind: str, inputs: dict[str, list[str]] | None = None, **files: list[Any]) -> Artifact:
        for name, rows in files.items():
            write_jsonl(tmp_path / folder / f"{name}.jsonl", rows)
        return publish(tmp_path / folder, kind, Provenance("s", "all", "f", {}, {}, "0", inputs or {}), {})

    return make


@pytest.fixture
def scored() -> MakeScored:
    """A scored review."""

    def make(
        review_id: str, rating: float = 5, score: float = 3, p: float = 0.5, text: str | None = None
    ) -> ScoredReview:
        ids = {"review_id": review_id, "paper_id": "p"}
        review = {**ids, "text": text or f"Text of {review_id}.", "rating": rating, "confidence": None, "venue": "v"}
        evaluation = {**ids, "answers": {}, "checkmark_score": score, "mean_p_yes": p, "engine": "e"}
        return ScoredReview({**review, "sub_scores": {}}, evaluation)  # type: ignore[typeddict-item]

    return make


@pytest.fixture
def paper() -> Paper:
    """An accepted train paper with two pages and one figure."""
    return {
        "paper_id": "p",
        "title": "A title",
        "abstract": "An abstract.",
        "text": "The body.",
        "decision": "accepted",
        "venue": "v",
        "split": "train",
        "pages": ["pages/p/000.png", "pages/p/001.png"],
        "figures": ["figures/p/a.png"],
    }
