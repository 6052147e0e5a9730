"""The ingest stage through the worker: a corpus in order, from every kind of file, whatever kills it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ingested_reviews import generated, ingest, jsonl, planned, row, rows, summary

from prefmill.pipeline.plan import PlannedTask
from prefmill.pipeline.worker import execute
from prefmill.reviews.generated import generate
from prefmill.reviews.join import papers_with_reviews
from prefmill.reviews.store import CorpusStore
from prefmill.store.artifacts import read_manifest
from prefmill.store.jsonl import JsonlWriter
from prefmill.store.stamps import verify


def test_reviews_apart_from_their_papers_are_of_these_venues(tmp_path: Path) -> None:
    """They had none, and quantiles of a venue's ratings were taken over those of all venues."""
    named = {"p1": 'V "1" 2024', "p2": "W 2025", "p3": ""}
    papers = [{"paper_id": key, "title": f"Title {key}", "venue": venue} for key, venue in named.items()]
    said = 'It says "venue":"" there.'
    reviews = [{"paper_id": key, "review_id": f"r-{key}", "review_text": said, "rating": 5} for key in named]
    own = {"paper_id": "p1", "review_id": "own", "review_text": said, "rating": 6, "venue": "Its own"}
    paths = jsonl(tmp_path / "papers.jsonl", *papers), jsonl(tmp_path / "reviews.jsonl", *reviews, own)
    corpus = ingest(tmp_path, sources=[{"format": "jsonl", "path": path} for path in paths])
    found = rows(corpus, "reviews.jsonl")
    venues = {"r-p1": named["p1"], "r-p2": named["p2"], "r-p3": "", "own": "Its own"}
    assert {review["review_id"]: review["venue"] for review in found} == venues
    assert {review["text"] for review in found} == {said}


def test_a_corpus_is_whole_in_order_and_as_the_records_say(tmp_path: Path) -> None:
    corpus = ingest(tmp_path, sources=[generated(60)])
    papers, reviews = rows(corpus, "papers.jsonl"), rows(corpus, "reviews.jsonl")
    expected = list(generate(0, 60))
    assert [paper["paper_id"] for paper in papers] == sorted({r["paper_id"] for r in expected})
    assert [(r["paper_id"], r["review_id"]) for r in reviews] == sorted(
        (r["paper_id"], r["review_id"]) for r in expected
    )
    assert set(papers[0]) == {
        "paper_id", "title", "abstract", "text", "decision", "venue", "split", "pages", "figures"
    }  # fmt: skip
    assert set(reviews[0]) == {"review_id", "paper_id", "text", "rating", "confidence", "venue", "sub_scores"}
    by_id = {r["review_id"]: r for r in expected}
    assert all(r["text"] == by_id[r["review_id"]]["review_text"] for r in reviews)
    assert all(r["rating"] == by_id[r["review_id"]]["rating"] for r in reviews)
    assert sum(len(group) for _, group in papers_with_reviews(corpus)) == len(expected)
    assert {entry.path for entry in corpus.manifest.files} == {"papers.jsonl", "reviews.jsonl", "summary.json"}
    counts = summary(corpus)
    assert (counts["papers"], counts["reviews"]) == (60, len(expected))
    assert sum(split["papers"] for split in counts["splits"].values()) == 60
    assert corpus.manifest.metrics["reviews"] == len(expected)


def test_the_order_of_rows_and_sources_changes_nothing(tmp_path: Path) -> None:
    lines = list(generate(0, 30))
    one = jsonl(tmp_path / "one.jsonl", *lines)
    halves = [jsonl(tmp_path / f"{half}.jsonl", *lines[::-1][half::2]) for half in (0, 1)]
    first = ingest(tmp_path / "1", sources=[{"format": "jsonl", "path": one}])
    second = ingest(tmp_path / "2", sources=[{"format": "jsonl", "path": path} for path in halves])
    for name in ("papers.jsonl", "reviews.jsonl"):
        assert first.file(name).read_bytes() == second.file(name).read_bytes()


def test_more_papers_never_move_one_between_splits(tmp_path: Path) -> None:
    small, large = (ingest(tmp_path / str(count), sources=[generated(count)]) for count in (80, 200))
    splits = {paper["paper_id"]: paper["split"] for paper in rows(large, "papers.jsonl")}
    assert all(splits[paper["paper_id"]] == paper["split"] for paper in rows(small, "papers.jsonl"))
    assert set(splits.values()) == {"train", "val", "dev", "test"}


def test_a_title_under_two_ids_is_one_paper_in_one_split(tmp_path: Path) -> None:
    lines = [row(1), row(2, title="TITLE  1!", abstract="Another.", review_text="Bad."), row(3)]
    corpus = ingest(tmp_path, sources=[{"format": "jsonl", "path": jsonl(tmp_path / "x.jsonl", *lines)}])
    assert [paper["paper_id"] for paper in rows(corpus, "papers.jsonl")] == ["p1", "p3"]
    assert _ids(rows(corpus, "reviews.jsonl")) == [("p1", "r1"), ("p1", "r2"), ("p3", "r3")]
    assert summary(corpus)["merged_titles"] == 1
    assert summary(corpus)["merged_ids"] == {"p2": "p1"}


def test_an_outside_test_set_is_the_test(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("p2\ntitle 4\n")
    path = jsonl(tmp_path / "x.jsonl", *(row(number) for number in range(1, 30)))
    splits = {"test_set": tmp_path / "test.txt", "test": 0.0, "train": 0.865}
    corpus = ingest(tmp_path, sources=[{"format": "jsonl", "path": path}], splits=splits)
    found = {paper["paper_id"] for paper in rows(corpus, "papers.jsonl") if paper["split"] == "test"}
    assert found == {"p2", "p4"}


def test_openreview_submissions_reviews_and_decisions_meet(tmp_path: Path) -> None:
    group = "ICLR.cc/2023/Conference"
    content = {"review": "Good.", "rating": "8: accept", "confidence": "3: fair"}
    review = {"id": "r", "forum": "f", "invitation": f"{group}/Paper1/-/Official_Review", "content": content}
    decision = {"id": "d", "forum": "f", "invitation": f"{group}/Paper1/-/Decision", "content": {"decision": "Accept"}}
    paper = {"id": "f", "forum": "f", "invitation": f"{group}/-/Blind_Submission", "content": {"title": "T"}}
    lonely = {"id": "g", "forum": "g", "invitation": f"{group}/-/Blind_Submission", "content": {"title": "U"}}
    path = jsonl(tmp_path / "notes.jsonl", review, decision, lonely, paper)
    corpus = ingest(tmp_path, sources=[{"format": "openreview_v1", "path": path}])
    assert [(p["paper_id"], p["decision"]) for p in rows(corpus, "papers.jsonl")] == [("f", "accepted")]
    assert rows(corpus, "reviews.jsonl") == [
        {"review_id": "r", "paper_id": "f", "text": "Good.", "rating": 8.0, "confidence": 3.0, "venue": "ICLR 2023",
         "sub_scores": {}}
    ]  # fmt: skip
    assert summary(corpus)["papers_without_reviews"] == 1


def test_generated_images_are_part_of_the_corpus(tmp_path: Path) -> None:
    corpus = ingest(tmp_path, sources=[{**generated(4), "images": True}])
    for paper in rows(corpus, "papers.jsonl"):
        assert [corpus.file(name).stat().st_size > 100 for name in paper["pages"] + paper["figures"]] == [True, True]
    verify(corpus)


@pytest.mark.parametrize("moment", ["add", "link", "merge_titles", "write_line"])
def test_killed_at_any_point_it_ends_with_the_same_content(tmp_path: Path, moment: str) -> None:
    config = {"sources": [{**generated(20), "images": True}]}
    undisturbed = ingest(tmp_path / "a", **config).manifest.content_digest
    child = os.fork()
    if child == 0:
        _kill_at(moment, planned(tmp_path / "b", **config))
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert read_manifest(tmp_path / "b" / "out") is None
    assert ingest(tmp_path / "b", **config).manifest.content_digest == undisturbed


def _kill_at(moment: str, task: PlannedTask) -> None:
    calls = iter(range(1000))
    owner: Any = JsonlWriter if moment == "write_line" else CorpusStore
    original = getattr(owner, moment)

    def killing(*arguments: Any) -> Any:
        if next(calls) >= (10 if moment in ("add", "write_line") else 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(owner, moment, killing)
    try:
        execute(task)
    finally:
        os._exit(0)  # the child must not go on as a second test session


@pytest.mark.reviews
def test_the_real_reviews(tmp_path: Path, reviews_file: Path) -> None:
    corpus = ingest(tmp_path, sources=[{"format": "jsonl", "path": reviews_file}])
    counts = summary(corpus)
    assert (counts["papers"], counts["reviews"], counts["merged_titles"]) == (2000, 6892, 0)
    assert counts["decisions"]["accepted"] == 553
    assert counts["ratings"] == {"1": 588, "3": 2087, "5": 1141, "6": 2101, "8": 948, "10": 27}
    shares = {name: split["papers"] / 2000 for name, split in counts["splits"].items()}
    assert abs(shares["train"] - 0.765) < 0.03
    assert abs(shares["test"] - 0.1) < 0.03
    assert sum(len(group) for _, group in papers_with_reviews(corpus)) == 6892


def _ids(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(item["paper_id"], item["review_id"]) for item in found]
