"""The streaming join of papers and reviews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.errors import InputError
from prefmill.reviews.join import papers_with_reviews
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl


def corpus(folder: Path, papers: list[str], reviews: list[tuple[str, str]]) -> Artifact:
    write_jsonl(folder / "papers.jsonl", [{"paper_id": name} for name in papers])
    write_jsonl(folder / "reviews.jsonl", [{"paper_id": paper, "review_id": name} for paper, name in reviews])
    return publish(folder, "review_corpus", Provenance("s", "all", "f", {}, {}, "0", {}), {})


def joined(*args: Any) -> list[tuple[str, list[str]]]:
    return [
        (paper["paper_id"], [r["review_id"] for r in reviews]) for paper, reviews in papers_with_reviews(corpus(*args))
    ]


def test_papers_with_and_without_reviews(tmp_path: Path) -> None:
    reviews = [("b", "1"), ("b", "2"), ("d", "1")]
    assert joined(tmp_path, ["a", "b", "c", "d", "e"], reviews) == [
        ("a", []), ("b", ["1", "2"]), ("c", []), ("d", ["1"]), ("e", []),
    ]  # fmt: skip
    assert joined(tmp_path / "none", ["a"], []) == [("a", [])]


@pytest.mark.parametrize(
    ("papers", "reviews", "message"),
    [
        (["a", "c"], [("b", "1")], r"not in the corpus[\s\S]*reviews.jsonl:1[\s\S]*'b'"),
        (["a"], [("a", "1"), ("z", "1")], r"not in the corpus[\s\S]*reviews.jsonl:2"),
        ([], [("a", "1")], r"reviews.jsonl:1"),
        (["b", "a"], [], r"out of order[\s\S]*papers.jsonl:2[\s\S]*a after b"),
        (["a", "a"], [], r"papers.jsonl:2"),
        (["a"], [("a", "2"), ("a", "1")], r"reviews.jsonl:2[\s\S]*a 1 after a 2"),
        (["a"], [("a", "1"), ("a", "1")], r"reviews.jsonl:2"),
    ],
)
def test_damage_is_named(tmp_path: Path, papers: list[str], reviews: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        joined(tmp_path, papers, reviews)


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    artifact = corpus(tmp_path, ["a", "b"], [("a", "1")])
    with (tmp_path / "papers.jsonl").open("a") as stream:
        stream.write("not json\n")
    pairs = papers_with_reviews(artifact)
    assert next(pairs)[0]["paper_id"] == "a"
    assert next(pairs)[0]["paper_id"] == "b"
    with pytest.raises(InputError, match=r"papers.jsonl:3"):
        next(pairs)
