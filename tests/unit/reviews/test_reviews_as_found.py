"""Reviews as they lie about: without ids, in lists of a paper, in NLPeer's folders, of two APIs in one dump."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pandas
import pytest
from read_sources import ROW, items_of, read, source, write

from prefmill.core.errors import InputError
from prefmill.reviews.markup import holds_html, without_html
from prefmill.reviews.rows import PaperRow, ReviewRow, Skipped

NO_IDS = {"title": "On Trees", "review_text": "Fine.", "rating": 6}


def reviews_of(items: list) -> list[ReviewRow]:  # type: ignore[type-arg]
    return [item for item in items if isinstance(item, ReviewRow)]


def test_reviews_without_ids_are_named_by_what_they_say(tmp_path: Path) -> None:
    rows = [
        NO_IDS,
        {**NO_IDS, "rating": 7},
        {**NO_IDS, "title": "on trees!"},
        {**NO_IDS, "paper_id": "p", "review_id": ""},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, other, again, named = reviews_of(items_of(source(format="jsonl", path=tmp_path / "x.jsonl", id_prefix="a-")))
    assert first == again
    assert first.paper_id == other.paper_id
    assert first.review_id != other.review_id
    assert all(review.review_id.startswith(f"{review.paper_id}-") for review in (first, other, named))
    assert (named.paper_id, named.text) == ("a-p", "Fine.")
    # Neither the file's form nor the place in it counts.
    pandas.DataFrame(rows[::-1]).to_csv(tmp_path / "x.csv", index=False)
    read_again = reviews_of(items_of(source(format="csv", path=tmp_path / "x.csv", id_prefix="a-")))
    assert {review.review_id for review in read_again} == {first.review_id, other.review_id, named.review_id}


def test_a_papers_list_of_reviews_is_a_row_each(tmp_path: Path) -> None:
    paper = {"paper_id": "p", "title": "T", "decision": True}
    reviews = [
        {"paper_id": "p", "review_id": "a", "review_text": "x", "rating": 6},  # the paper's own id again
        {"title": "y", "review_text": "y", "rating": 1},
        "z",
    ]
    path = write(tmp_path / "x.jsonl", json.dumps({**paper, "reviews": reviews}))
    (found, review), problems = read(source(format="jsonl", path=path))
    assert (found, review) == (PaperRow("p", "T", decision="accepted"), ReviewRow("a", "p", "x", 6.0))
    assert [(problem.place.brief, problem.reason) for problem in problems] == [
        ("x.jsonl:1 (reviews[1])", "'title' stands in the paper and in its review"),
        ("x.jsonl:1 (reviews[2])", "not a JSON object but str"),
    ]


def nlpeer(folder: Path, paper: str, version: str, title: str, *reviews: dict[str, object]) -> None:
    write(folder / paper / version / "reviews.json", json.dumps(reviews, indent=1))
    write(folder / paper / version / "meta.json", {"title": title, "abstract": "A.", "license": "CC-BY"})
    write(folder / paper / version / "paper.itg.json", {"nodes": []})


def test_nlpeers_folders_are_read(tmp_path: Path) -> None:
    """Their form is that of the data set's README: scores are text, F1000's are words."""
    report = {"main": None, "paper_summary": "Sums.", "weaknesses": "Bad."}
    scores = {"overall": "3.5 = Between good and okay", "soundness": "3", "confidence": "4 = Quite sure"}
    nlpeer(
        tmp_path, "p", "v1", "Old", {"rid": "1", "report": report, "scores": scores, "meta": {"sentences": [[0, 1]]}}
    )
    nlpeer(tmp_path, "p", "v2", "New", {"rid": "2", "report": {"main": "x"}, "scores": {"overall": "2"}, "meta": None},
           {"rid": "3", "report": {"main": "x"}, "scores": {"overall": None}})  # fmt: skip
    write(tmp_path / "q" / "v1" / "reviews.json", "[]")
    write(tmp_path / "q" / "meta.json", {"title": "Of no review"})
    config = source(format="nlpeer", path=tmp_path, rating_max=5)
    assert items_of(config) == [
        PaperRow("p", "Old", "A.", date=1.0),
        ReviewRow("p-1", "p", "## Paper summary\nSums.\n\n## Weaknesses\nBad.", 3.5, 4.0, "", {"soundness": 3.0},
                  (1.0, 5.0), 1.0),
        PaperRow("p", "New", "A.", date=2.0),
        ReviewRow("p-2", "p", "x", 2.0, None, "", {}, (1.0, 5.0), 2.0),
        Skipped("review without an overall score"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="a folder without review files"):
        items_of(source(format="nlpeer", path=tmp_path / "q" / "v2"))


def test_f1000s_words_are_ratings(tmp_path: Path) -> None:
    nlpeer(
        tmp_path,
        "10-1",
        "v1",
        "T",
        {"rid": "7", "report": {"main": "x"}, "scores": {"overall": "approve-with-reservations"}},
    )
    words = {"approve": 2, "approve-with-reservations": 1, "reject": 0}
    config = source(format="nlpeer", path=tmp_path, rating_min=0, rating_max=2, rating_words=words)
    assert [review.rating for review in reviews_of(items_of(config))] == [1.0]
    _, problems = read(source(format="nlpeer", path=tmp_path, rating_min=0, rating_max=2))
    assert "rating_words" in problems[0].fix
    assert problems[0].place.item == "10-1/v1, item 0"


def test_notes_of_both_apis_in_one_dump(tmp_path: Path) -> None:
    old = {"id": "r1", "forum": "f1", "invitation": "ICLR.cc/2023/Conference/Paper1/-/Official_Review",
           "content": {"review": "Old.", "rating": "8: accept, good paper"}}  # fmt: skip
    new = {"id": "r2", "forum": "f2", "invitations": ["ICLR.cc/2024/Conference/Submission2/-/Official_Review"],
           "content": {"summary": {"value": "New."}, "rating": {"value": 6}}}  # fmt: skip
    path = write(tmp_path / "x.json", [old, new])
    for form in ("openreview_v1", "openreview_v2"):
        found = reviews_of(items_of(source(format=form, path=path)))
        assert [(review.text, review.rating) for review in found] == [("Old.", 8.0), ("New.", 6.0)]


def test_every_entity_of_html_is_found(tmp_path: Path) -> None:
    text = "caf&eacute; &mdash; &hellip; &#8217; &notanentity; AT&T; a &b"
    assert holds_html("It&rsquo;s")
    assert not holds_html("AT&T; a &b; &notanentity;")
    assert without_html(text) == html.unescape(text)


def test_a_table_with_pandas_row_numbers_or_spaces_is_read(tmp_path: Path) -> None:
    rows = pandas.DataFrame([ROW])
    rows.to_csv(tmp_path / "x.csv")
    assert len(items_of(source(format="csv", path=tmp_path / "x.csv", ignore_extra_fields=True))) == 2
    _, (problem,) = read(source(format="csv", path=tmp_path / "x.csv"))
    assert problem.reason.startswith("unknown field 'Unnamed: 0'")
    write(tmp_path / "y.csv", 'paper_id, title, review_id, review_text , rating\np, "T, x", r, Fine., 5\n')
    paper, review = items_of(source(format="csv", path=tmp_path / "y.csv"))
    assert (paper, review) == (PaperRow("p", "T, x"), ReviewRow("r", "p", "Fine.", 5.0))


def test_zero_has_no_sign(tmp_path: Path) -> None:
    for value in (-0.0, "-0", "-0.0"):
        path = write(tmp_path / "x.jsonl", {**ROW, "rating": value})
        (review,) = reviews_of(items_of(source(format="jsonl", path=path, rating_min=-3, rating_max=3)))
        assert str(review.rating) == "0.0"
