"""Sets of reviews as they are published: a paper a row, its reviews inside it under names of their own."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from prefmill.reviews.rows import PaperRow, ReviewRow, Skipped
from tests.unit.reviews.read_sources import ROW, items_of, read, source, write

INSIDE = "reviewer_comments"
# As DeepReview-13K has it: notes of OpenReview in a list, and the ratings beside it again.
DEEP_REVIEW: dict[str, Any] = {
    "id": "aB1", "title": "On Trees", "year": 2024, "decision": "Accept", "rating": [6, 8],
    INSIDE: [
        {"id": "r1", "content": {"summary": "S.", "questions": "N/A", "rating": "6: fine", "confidence": "4"}},
        {"id": "r2", "content": {"summary": "T.", "questions": "Why?", "rating": "8: good", "soundness": "3 good"}},
    ],
}  # fmt: skip
COLUMNS = {
    "paper_id": "id", "review_id": f"{INSIDE}.id", "rating": f"{INSIDE}.content.rating",
    "review_text": [f"{INSIDE}.content.summary", f"{INSIDE}.content.questions"],
    "confidence": f"{INSIDE}.content.confidence", "sub_scores.soundness": f"{INSIDE}.content.soundness",
}  # fmt: skip
WANTED = [
    ReviewRow("r1", "aB1", "S.", 6.0, 4.0),
    ReviewRow("r2", "aB1", "## Summary\nT.\n\n## Questions\nWhy?", 8.0, None, sub_scores={"soundness": 3.0}),
]


def as_table(row: dict[str, Any], written: Any) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows([row, [value if isinstance(value, str) else written(value) for value in row.values()]])
    return stream.getvalue()


@pytest.mark.parametrize("form", ["lines", "parquet", "json in a table", "python in a table"])
def test_reviews_inside_a_paper_are_named_by_paths(tmp_path: Path, form: str) -> None:
    if form == "lines":
        path = write(tmp_path / "x.jsonl", DEEP_REVIEW)
    elif form == "parquet":
        path = tmp_path / "x.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([DEEP_REVIEW]), path)
    else:
        path = write(tmp_path / "x.csv", as_table(DEEP_REVIEW, json.dumps if "json" in form else repr))
    kind = "csv" if path.suffix == ".csv" else "jsonl"
    items = items_of(source(format=kind, path=path, columns=COLUMNS, ignore_extra_fields=True))
    assert [item for item in items if isinstance(item, ReviewRow)] == WANTED
    assert items[0] == PaperRow("aB1", "On Trees", decision="accepted")


def test_what_paths_leave_out_and_what_they_miss_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", DEEP_REVIEW)
    _, problems = read(source(format="jsonl", path=path))
    assert problems[0].fix.endswith(f"such as columns: {{rating: {INSIDE}.content.rating}}")
    capitals = {"Title": "On Trees", "reviewers": [{"Score": 3, "Text": "x"}]}
    _, problems = read(source(format="jsonl", path=write(tmp_path / "c.jsonl", capitals)))
    assert problems[0].fix.endswith("such as columns: {title: Title, rating: reviewers.Score}")
    only = {name: own for name, own in COLUMNS.items() if "soundness" not in name}
    row = {name: value for name, value in DEEP_REVIEW.items() if name not in ("year", "rating")}
    _, problems = read(source(format="jsonl", path=write(tmp_path / "y.jsonl", row), columns=only))
    assert problems[0].reason.startswith(f"unknown field '{INSIDE}.content.soundness'")
    _, problems = read(source(format="jsonl", path=path, columns={**COLUMNS, "abstract": "abstrct"},
                              ignore_extra_fields=True))  # fmt: skip
    assert [problem.reason for problem in problems] == ["columns names 'abstrct', which no row has"]
    _, problems = read(source(format="jsonl", path=path, columns={**COLUMNS, "rating": "no.such"},
                              ignore_extra_fields=True))  # fmt: skip
    assert problems[0].reason == f"no 'no.such' for the reviews in '{INSIDE}.content.confidence'"
    assert problems[0].fix.endswith(f"such as columns: {{rating: {INSIDE}.content.rating}}")
    _, problems = read(source(format="jsonl", path=write(tmp_path / "z.jsonl", ROW), columns={"rating": "no.such"}))
    assert "(columns names 'no.such', which the row has not)" in problems[0].reason


def test_excerpts_leave_people_out_of_what_is_inside_too(tmp_path: Path) -> None:
    """By the paths of their fields, which are longer than a field's name."""
    who = {"name": "Ann Smith", "contact_of_the_reviewer_as_given": {"email": "Ann at X"}}
    row = {"title": "T", INSIDE: [{"who": who, "text": "x", "rating": "none"}]}
    columns = {"review_text": f"{INSIDE}.text", "rating": f"{INSIDE}.rating"}
    _, (problem,) = read(source(format="jsonl", path=write(tmp_path / "x.jsonl", row), columns=columns))
    assert f'"{INSIDE}.who.name":***' in problem.excerpt
    assert "Ann" not in problem.excerpt


def test_a_paper_without_a_review_is_skipped(tmp_path: Path) -> None:
    lines = [DEEP_REVIEW, {**DEEP_REVIEW, "id": "z", INSIDE: []}]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)))
    items = items_of(source(format="jsonl", path=path, columns=COLUMNS, ignore_extra_fields=True))
    assert items[-1] == Skipped("paper without a review")


def test_lists_side_by_side_are_a_papers_reviews(tmp_path: Path) -> None:
    """PeerSum's form; the same inside an object is that of `Sequence` in hub datasets."""
    lists = {"review_contents": ["x", "Thanks"], "review_ratings": [6, -1]}
    columns = {"title": "paper_title", "review_text": "review_contents", "rating": "review_ratings"}
    path = write(tmp_path / "x.jsonl", {"paper_title": "T", **lists})
    items, problems = read(source(format="jsonl", path=path, columns=columns))
    assert [(item.text, item.rating) for item in items if isinstance(item, ReviewRow)] == [("x", 6.0)]
    # One is at fault (the authors' answer has no rating), and is set aside alone.
    assert [(problem.place.item, problem.reason) for problem in problems] == [
        ("review_ratings[1]", "rating -1 is outside the scale 1 to 10")
    ]
    path = write(tmp_path / "x.jsonl", {"paper_title": "T", "reviews": lists})
    columns = {"title": "paper_title", "review_text": "reviews.review_contents", "rating": "reviews.review_ratings"}
    items, _ = read(source(format="jsonl", path=path, columns=columns, rating_min=-1))
    assert [item.text for item in items if isinstance(item, ReviewRow)] == ["x", "Thanks"]
    path = write(tmp_path / "x.jsonl", {"paper_title": "T", "reviews": {**lists, "review_ratings": [6]}})
    _, (problem,) = read(source(format="jsonl", path=path, columns=columns))
    assert problem.reason == "'reviews.review_ratings' has 1 values and 'reviews.review_contents' 2"


def test_paragraphs_in_a_list_are_no_reviews(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"title": "T", "paragraphs": ["a", "b"], "rating": 4})
    _, (problem,) = read(source(format="jsonl", path=path, columns={"review_text": "paragraphs"}))
    assert problem.reason == "review_text is not text but list"


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_may_hold_the_lists_of_rows(tmp_path: Path, indent: int | None) -> None:
    rows = [ROW, {**ROW, "review_id": "r2"}]
    path = write(tmp_path / "x.json", json.dumps({"count": 2, "data": rows}, indent=indent))
    ids = [item.review_id for item in items_of(source(format="jsonl", path=path)) if isinstance(item, ReviewRow)]
    assert ids == ["r1", "r2"]
    apart = {
        "papers": [{"paper_id": "p1", "title": "T"}],
        "reviews": [{"paper_id": "p1", "review_text": "x", "rating": 3}],
    }
    paper, skipped, review = items_of(
        source(format="jsonl", path=write(tmp_path / "x.json", json.dumps(apart, indent=indent)))
    )
    assert (paper, skipped) == (PaperRow("p1", "T"), Skipped("row of a paper alone"))
    assert isinstance(review, ReviewRow)


def test_json_leaves_out_what_is_empty(tmp_path: Path) -> None:
    """A name of `columns` that only some rows have was refused, and of sub-scores in any row."""
    lines = [{**ROW, "conf": 4, "Sound": "3: good"}, {**ROW, "review_id": "r2"}]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)))
    columns = {"confidence": "conf", "sub_scores.soundness": "Sound"}
    reviews = [item for item in items_of(source(format="jsonl", path=path, columns=columns)) if hasattr(item, "rating")]
    assert [(review.confidence, review.sub_scores) for review in reviews] == [(4.0, {"soundness": 3.0}), (None, {})]
