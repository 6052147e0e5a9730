"""The ingest stage through the worker: a corpus in order, bad input named or set aside, nothing half done."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.artifact import Artifact
from prefmill.core.config import load
from prefmill.core.errors import InputError, PrefmillError
from prefmill.core.stage import load_stage
from prefmill.pipeline.plan import PlannedTask
from prefmill.pipeline.worker import execute
from prefmill.reviews.generated import generate
from prefmill.reviews.join import papers_with_reviews
from prefmill.reviews.store import CorpusStore
from prefmill.store.artifacts import read, read_manifest
from prefmill.store.jsonl import JsonlWriter, read_jsonl
from prefmill.store.stamps import verify


def planned(folder: Path, **config: Any) -> PlannedTask:
    stage = load_stage("ingest_reviews")
    checked = load(stage.config, json.loads(json.dumps(config, default=str)))
    return PlannedTask("r", stage, "all", {}, {}, checked, {}, folder / "out", folder / "logs")


def ingest(folder: Path, **config: Any) -> Artifact:
    task = planned(folder, **config)
    execute(task)
    return read(task.output, "review_corpus")


def rows(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return list(read_jsonl(artifact.file(name)))


def summary(artifact: Artifact) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(artifact.file("summary.json").read_text())
    return content


def jsonl(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def row(number: int, **change: Any) -> dict[str, Any]:
    base = {
        "paper_id": f"p{number}",
        "title": f"Title {number}",
        "abstract": "About it.",
        "decision": "accepted",
        "review_id": f"r{number}",
        "review_text": "A review.",
        "rating": 6,
    }
    return {key: value for key, value in {**base, **change}.items() if value != "(absent)"}


def generated(num_papers: int, seed: int = 0) -> dict[str, Any]:
    return {"format": "generated", "num_papers": num_papers, "seed": seed}


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
    lines = [row(1), row(2, title="TITLE  1!", abstract="Another."), row(3)]
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


BAD_ROWS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "broken JSON": (b'{"paper_id": "p2", ', "not JSON"),
    "not an object": (b'["p2"]', "not a JSON object but list"),
    "invalid UTF-8": (b'{"paper_id": "p\xff"}', "invalid UTF-8"),
    "missing field": (row(2, rating="(absent)"), "missing in the row: rating"),
    "extra field": (row(2, raiting=3), "unknown field 'raiting' (did you mean 'rating'?); valid fields: abstract,"),
    "NaN rating": (row(2, rating=float("nan")), "rating is not a number: nan"),
    "no rating": (row(2, rating=None), "rating is not a number: None"),
    "out-of-scale rating": (row(2, rating=12), "rating 12 is outside the scale 1 to 10"),
    "empty review": (row(2, review_text=" \t"), "empty review_text"),
    "empty title": (row(2, title="?!"), "title without letters or digits"),
    "duplicate review id": (row(2, review_id="r1"), "another review with the id r1 is at x.jsonl:1"),
    "contradicting papers": (row(1, review_id="r2", decision="rejected"), "another decision at x.jsonl:1"),
    "unknown decision": (row(2, decision="perhaps"), "unknown decision 'perhaps'"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_stops_the_stage_naming_file_line_and_fix(tmp_path: Path, bad: str) -> None:
    line, reason = BAD_ROWS[bad]
    path = jsonl(tmp_path / "x.jsonl", row(1), line, row(3))
    task = planned(tmp_path, sources=[{"format": "jsonl", "path": path}])
    with pytest.raises(InputError) as caught:
        execute(task)
    message = str(caught.value)
    assert reason in message
    assert f"where:    {path}:2" in message
    assert "fix:" in message
    assert_nothing_done(task)


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_can_be_set_aside(tmp_path: Path, bad: str) -> None:
    line, reason = BAD_ROWS[bad]
    path = jsonl(tmp_path / "x.jsonl", row(1), line, row(3))
    source = {"format": "jsonl", "path": path}
    corpus = ingest(tmp_path, sources=[source], on_bad_row="quarantine", max_quarantined_share=0.4)
    assert [paper["paper_id"] for paper in rows(corpus, "papers.jsonl")] == ["p1", "p3"]
    assert [review["review_id"] for review in rows(corpus, "reviews.jsonl")] == ["r1", "r3"]
    (kept,) = rows(corpus, "quarantine.jsonl")
    assert (kept["source"], kept["file"], kept["line"]) == (0, "x.jsonl", 2)
    assert reason in kept["reason"]
    assert kept["fix"]
    assert kept["row"]
    assert str(tmp_path) not in corpus.file("quarantine.jsonl").read_text()
    assert summary(corpus)["quarantined_rows"] == 1


def test_too_many_bad_rows_are_an_error(tmp_path: Path) -> None:
    lines = [row(number, rating=99) if number % 3 == 0 else row(number) for number in range(1, 10)]
    path = jsonl(tmp_path / "x.jsonl", *lines)
    config = {"sources": [{"format": "jsonl", "path": path}], "on_bad_row": "quarantine"}
    task = planned(tmp_path, **config, max_quarantined_share=0.3)
    with pytest.raises(InputError, match="3 of 9 rows cannot be used") as caught:
        execute(task)
    assert f"{path}:3: rating 99 is outside the scale" in str(caught.value)
    assert_nothing_done(task)
    assert summary(ingest(tmp_path, **config, max_quarantined_share=0.34))["quarantined_rows"] == 3


def test_a_quarantine_without_bad_rows_is_there_and_empty(tmp_path: Path) -> None:
    corpus = ingest(tmp_path, sources=[generated(3)], on_bad_row="quarantine")
    assert rows(corpus, "quarantine.jsonl") == []


def truncated_gzip(path: Path) -> None:
    content = b"".join(
        json.dumps(row(number, review_text=f"{number * 7919}")).encode() + b"\n" for number in range(500)
    )
    path.write_bytes(gzip.compress(content)[:-2000])


BAD_FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated gzip": (truncated_gzip, "truncated gzip file", ", after line"),
    "empty": (lambda path: path.write_bytes(b""), "a source without rows", ""),
    "blank": (lambda path: path.write_bytes(b"\n \n"), "a source without rows", ""),
    "a folder": (lambda path: path.mkdir(), "a folder without review files", ""),
}


@pytest.mark.parametrize("mode", ["fail", "quarantine"])
@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_stops_the_stage_whatever_the_mode(tmp_path: Path, bad: str, mode: str) -> None:
    make, reason, where = BAD_FILES[bad]
    path = tmp_path / "x.jsonl"
    make(path)
    sources = [generated(3), {"format": "jsonl", "path": path}]
    task = planned(tmp_path, sources=sources, on_bad_row=mode, max_quarantined_share=1.0)
    with pytest.raises(InputError, match=reason) as caught:
        execute(task)
    assert f"{path}{where}" in str(caught.value)
    assert "fix:" in str(caught.value)
    assert_nothing_done(task)


def test_a_missing_file_stops_the_stage(tmp_path: Path) -> None:
    task = planned(tmp_path, sources=[{"format": "jsonl", "path": tmp_path / "absent.jsonl"}])
    with pytest.raises(PrefmillError, match="no such file"):
        execute(task)
    assert_nothing_done(task)


def test_reviews_without_their_paper_are_named(tmp_path: Path) -> None:
    content = {"review": "Good.", "rating": 8}
    note = {"id": "r", "forum": "f", "invitation": "V/-/Official_Review", "content": content}
    path = jsonl(tmp_path / "n.jsonl", note)
    task = planned(tmp_path, sources=[{"format": "openreview_v1", "path": path}])
    with pytest.raises(InputError, match="review of paper f, which is not in the sources") as caught:
        execute(task)
    assert f"{path}:1 (note r)" in str(caught.value)
    assert_nothing_done(task)


@pytest.mark.parametrize("fault", [{"sub_scores": {"\ud800x": 1}}, {"title": "T\udc00"}, {"\ud800": 1}])
def test_half_of_a_surrogate_pair_is_a_bad_row_wherever_it_stands(tmp_path: Path, fault: dict[str, Any]) -> None:
    path = jsonl(tmp_path / "x.jsonl", row(1), {**row(2), **fault})
    sources = [{"format": "jsonl", "path": path}]
    execute(task := planned(tmp_path, sources=sources, on_bad_row="quarantine", max_quarantined_share=1.0))
    [told] = read_jsonl(task.output / "quarantine.jsonl")
    assert told["line"] == 2
    with pytest.raises(InputError, match=r"x.jsonl:2"):
        execute(planned(tmp_path / "strict", sources=sources))


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", row(1, rating=0))
    sources = [{"format": "jsonl", "path": path}]
    task = planned(tmp_path, sources=sources, on_bad_row="quarantine", max_quarantined_share=1.0)
    with pytest.raises(InputError, match="no review is left") as caught:
        execute(task)
    assert f"{path}:1" in str(caught.value)  # no quarantine.jsonl is published, which would say it
    assert_nothing_done(task)


def test_papers_without_their_file_are_set_aside_with_their_reviews(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", row(1), row(2), row(2, review_id="r2b"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "p1.txt").write_text("The whole paper.")
    config = {"sources": [{"format": "jsonl", "path": path}], "texts": tmp_path / "texts"}
    with pytest.raises(InputError, match=r"no text file p2\.txt"):
        execute(planned(tmp_path, **config))
    corpus = ingest(tmp_path, **config, on_bad_row="quarantine", max_quarantined_share=0.4)
    assert [paper["text"] for paper in rows(corpus, "papers.jsonl")] == ["The whole paper."]
    assert [review["review_id"] for review in rows(corpus, "reviews.jsonl")] == ["r1"]
    assert rows(corpus, "quarantine.jsonl")[0]["reason"] == "no text file p2.txt; its reviews go with it"


def test_generated_images_are_part_of_the_corpus(tmp_path: Path) -> None:
    corpus = ingest(tmp_path, sources=[{**generated(4), "images": True}])
    for paper in rows(corpus, "papers.jsonl"):
        assert [corpus.file(name).stat().st_size > 100 for name in paper["pages"] + paper["figures"]] == [True, True]
    verify(corpus)


@pytest.mark.parametrize("moment", ["add", "link", "merge_titles", "write"])
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
    owner: Any = JsonlWriter if moment == "write" else CorpusStore
    original = getattr(owner, moment)

    def killing(*arguments: Any) -> Any:
        if next(calls) >= (10 if moment in ("add", "write") else 0):
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


def assert_nothing_done(task: PlannedTask) -> None:
    assert read_manifest(task.output) is None
    left = {path.name for path in task.output.glob("*") if path.is_file()} if task.output.is_dir() else set()
    assert left == set()
