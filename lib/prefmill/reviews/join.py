"""Papers with their reviews, streamed from a review corpus: memory does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.records import Paper, Review
from prefmill.store.jsonl import read_jsonl

PAPERS, REVIEWS = "papers.jsonl", "reviews.jsonl"


def papers_with_reviews(corpus: Artifact) -> Iterator[tuple[Paper, list[Review]]]:
    """Every paper of a `review_corpus`, in order of paper_id, with its reviews (none for some papers).

    Raises InputError, naming file and line, where either file is out of order or a review's paper is missing.
    """
    papers = _ordered(corpus.file(PAPERS), ("paper_id",))
    reviews = _ordered(corpus.file(REVIEWS), ("paper_id", "review_id"))
    line, review = next(reviews, (0, None))
    for _, paper in papers:
        paper_id, group = paper["paper_id"], []
        while review is not None and review["paper_id"] == paper_id:
            group.append(review)
            line, review = next(reviews, (0, None))
        # Both files rise, so the paper of this review can no longer come.
        if review is not None and review["paper_id"] < paper_id:
            break
        yield paper, group
    if review is not None:
        raise InputError(
            "a review's paper is not in the corpus", where=f"{corpus.path / REVIEWS}:{line}",
            got=f"paper_id {review['paper_id']!r}", expected=f"a row of {PAPERS} with that paper_id",
            fix="rerun ingest_reviews with --force: the corpus is damaged",
        )  # fmt: skip


def _ordered(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """Line number and row; raises InputError where a row's keys do not come after those of the row before."""
    previous: list[str] = []
    for number, row in enumerate(read_jsonl(path), 1):
        current = [row[key] for key in keys]
        # Equal keys are refused as well: a repeated review would be scored and paired twice.
        if previous and current <= previous:
            raise InputError(
                "rows are out of order or repeated", where=f"{path}:{number}",
                got=f"{' '.join(current)} after {' '.join(previous)}", expected=f"strictly rising {' and '.join(keys)}",
                fix="rerun ingest_reviews with --force: the corpus is damaged",
            )  # fmt: skip
        previous = current
        yield number, row
