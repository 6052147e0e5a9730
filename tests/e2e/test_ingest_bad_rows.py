"""The ingest stage on bad input: rows and files named or set aside, nothing half done."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ingested_reviews import assert_nothing_done, generated, ingest, jsonl, planned, row, rows, summary

from prefmill.core.errors import InputError, PrefmillError
from prefmill.pipeline.worker import execute
from prefmill.store.jsonl import read_jsonl

BAD_ROWS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "broken JSON": (b'{"paper_id": "p2", ', "not JSON"),
    "not an object": (b'["p2"]', "not a JSON object but list"),
    "invalid UTF-8": (b'{"paper_id": "p\xff"}', "invalid UTF-8"),
    "missing field": (row(2, rating="(absent)"), "missing in the row: rating"),
    "extra field": (row(2, raiting=3), "unknown field 'raiting' (did you mean 'rating'?); valid fields: abstract,"),
    "NaN rating": (row(2, rating=float("nan")), "rating is not a number: None (NaN in rating is no value)"),
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
    assert "unknown_papers: drop" in str(caught.value)
    assert_nothing_done(task)


def test_reviews_without_their_paper_are_left_out_counted_and_named_where_that_is_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def note(name: str, forum: str, kind: str, **content: Any) -> dict[str, Any]:
        return {"id": name, "forum": forum, "invitation": f"V/-/{kind}", "content": content, "tmdate": 1}

    review = {"review": "Good.", "rating": 8}
    path = jsonl(
        tmp_path / "n.jsonl", note("p", "p", "Submission", title="T", abstract="A"),
        *(note(f"r{n}", forum, "Official_Review", **review) for n, forum in enumerate(("p", "q", "q", "gone"))),
        note("d", "q", "Decision", decision="Reject"),
        note("gone", "gone", "Submission", title="Gone") | {"ddate": 5},
    )  # fmt: skip
    sources = [{"format": "openreview_v1", "path": path}]
    with pytest.raises(InputError, match=r"of paper q, which is not in the sources[^~]*papers do \(p\)[^~]*\(2 rows\)"):
        execute(planned(tmp_path / "strict", sources=sources))
    execute(task := planned(tmp_path, sources=sources, unknown_papers="drop"))
    assert [row["review_id"] for row in read_jsonl(task.output / "reviews.jsonl")] == ["r0"]
    summary = json.loads((task.output / "summary.json").read_text())
    assert summary["reviews_without_paper"] == {"gone": 1, "q": 2}
    assert "3 reviews of 2 papers that are deleted or not in the sources were left out: gone, q" in caplog.text


@pytest.mark.parametrize("fault", [{"sub_scores": {"\ud800x": 1}}, {"title": "T\udc00"}, {"\ud800": 1}])
def test_half_of_a_surrogate_pair_is_a_bad_row_wherever_it_stands(tmp_path: Path, fault: dict[str, Any]) -> None:
    path = jsonl(tmp_path / "x.jsonl", row(1), {**row(2), **fault})
    sources = [{"format": "jsonl", "path": path}]
    execute(task := planned(tmp_path, sources=sources, on_bad_row="quarantine", max_quarantined_share=1.0))
    [told] = read_jsonl(task.output / "quarantine.jsonl")
    assert told["line"] == 2
    with pytest.raises(InputError, match=r"x.jsonl:2"):
        execute(planned(tmp_path / "strict", sources=sources))


def test_a_scale_that_ends_earlier_and_html_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stars = [row(n, rating=1 + n % 5, review_text=f"Fine.<br />{n}") for n in range(20)]
    path = jsonl(tmp_path / "stars.jsonl", *stars)
    told = ("no rating of source 0 is above 5 on 1 to 10: set rating_max", "20 reviews hold HTML")
    warnings = summary(ingest(tmp_path / "one", sources=[{"format": "jsonl", "path": path}]))["warnings"]
    assert all(any(warning.startswith(start) for warning in warnings) for start in told)
    right = {"format": "jsonl", "path": path, "rating_max": 5, "html": True}
    assert summary(ingest(tmp_path / "two", sources=[right]))["warnings"] == []


def test_texts_that_a_sheet_has_cut_are_told(tmp_path: Path) -> None:
    """Of 32,767 characters, the most that a cell holds: their rest was lost without a word."""
    path = jsonl(tmp_path / "x.jsonl", row(1, review_text="x" * 32_767), row(2, text="y" * 32_767), row(3))
    (told,) = summary(ingest(tmp_path / "one", sources=[{"format": "jsonl", "path": path}]))["warnings"]
    assert told.startswith("2 texts end at 32,767 characters, where sheets cut a cell")


def test_a_scale_that_changed_with_the_year_and_one_upside_down_are_told(tmp_path: Path) -> None:
    """Each was read as it stood: six of six as six of ten, and the best rating as the worst."""
    years = [row(n, rating=1 + n % size, venue=f"V {size}") for size in (6, 10) for n in range(size * 100, size * 104)]
    path = jsonl(tmp_path / "years.jsonl", *years)
    (told,) = summary(ingest(tmp_path / "years", sources=[{"format": "jsonl", "path": path}]))["warnings"]
    assert told.startswith("no rating of source 0, V 6, is above 6 on 1 to 10: set rating_max")
    workshops = [row(n, rating=1 + n % 6, venue=f"W {n // 24}") for n in range(7 * 24)]
    path = jsonl(tmp_path / "workshops.jsonl", *workshops)
    (told,) = summary(ingest(tmp_path / "workshops", sources=[{"format": "jsonl", "path": path}]))["warnings"]
    assert told.count("set rating_max") == 5
    assert told.endswith("; ...")
    fates = [row(n, rating=1 + (n % 2) * 3 + n % 3, decision="rejected" if n % 2 else "accepted") for n in range(80)]
    turned = {"format": "jsonl", "path": jsonl(tmp_path / "turned.jsonl", *fates), "rating_max": 6}
    (told,) = summary(ingest(tmp_path / "turned", sources=[turned]))["warnings"]
    assert told.startswith("source 0 has mean ratings of 1.98 for accepted papers and of 5 for rejected ones")
    right = {**turned, "lower_is_better": True}
    assert summary(ingest(tmp_path / "right", sources=[right]))["warnings"] == []


def test_words_that_contradict_their_numbers_are_told(tmp_path: Path) -> None:
    """Without decisions nothing else shows that 1 is the best."""
    words = ("1: Strong accept", "2: Weak accept", "3: Borderline", "4 (weak reject)", "5: below acceptance threshold")
    path = jsonl(tmp_path / "x.jsonl", *(row(n, rating=words[n % 5]) for n in range(10)))
    turned = {"format": "jsonl", "path": path, "rating_max": 5}
    (told,) = summary(ingest(tmp_path / "turned", sources=[turned]))["warnings"]
    assert told.startswith(
        "the words of source 0 accept at a mean rating of 1.5 and reject at 4.5: turn lower_is_better"
    )
    assert summary(ingest(tmp_path / "right", sources=[{**turned, "lower_is_better": True}]))["warnings"] == []
    words = ("-2: Reject", "Weak accept", "2: Accept")
    path = jsonl(tmp_path / "y.jsonl", *(row(n, rating=words[n % 3]) for n in range(6)))
    plain = {"format": "jsonl", "path": path, "rating_min": -3, "rating_max": 3, "rating_words": {"weak accept": 1}}
    assert summary(ingest(tmp_path / "plain", sources=[plain]))["warnings"] == []


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", row(1, rating=0))
    sources = [{"format": "jsonl", "path": path}]
    task = planned(tmp_path, sources=sources, on_bad_row="quarantine", max_quarantined_share=1.0)
    with pytest.raises(InputError, match="no review is left") as caught:
        execute(task)
    assert f"{path}:1" in str(caught.value)  # no quarantine.jsonl is published, which would say it
    assert "set rating_min and rating_max" in str(caught.value)  # was "name those of reviews in review_invitations"
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
