"""Tables and dumps as conference systems export them: text in several columns, papers apart, notes by forum."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath
from typing import Any, Literal

import pandas
import pytest
import yaml

from prefmill.reviews.files import files_at
from prefmill.reviews.rows import PaperRow, ReviewRow, Skipped, Unknown
from tests.unit.reviews.read_sources import items_of, read, source, write

HOTCRP = (
    "paper,title,review,reviewername,email,Overall merit,Reviewer expertise,Paper summary,Comments for authors\n"
    '1,A paper,1A,Ann,a@x.org,3. Weak accept,4. Expert,They do things.,"Strong: a lot.\nWeak: little."\n'
    "1,A paper,1B,Bob,b@x.org,2. Weak reject,2. Some familiarity,N/A,Not convinced.\n"
)
COLUMNS = {"paper_id": "paper", "review_id": "review", "rating": "Overall merit", "confidence": "Reviewer expertise"}
PAPER, REVIEW = PaperRow("p1", "A title", "An abstract."), ReviewRow("r1", "p1", "Fine.", 6.0)


def test_a_reviews_text_may_stand_in_several_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.csv", HOTCRP)
    columns = {**COLUMNS, "review_text": ["Paper summary", "Comments for authors"]}
    items = items_of(source(format="csv", path=path, rating_max=5, ignore_extra_fields=True, columns=columns))
    assert [(item.review_id, item.text) for item in items if isinstance(item, ReviewRow)] == [
        ("1A", "## Paper summary\nThey do things.\n\n## Comments for authors\nStrong: a lot.\nWeak: little."),
        ("1B", "Not convinced."),
    ]
    _, problems = read(source(format="csv", path=path, columns={**columns, "review_text": ["Paper summary", "Text"]}))
    assert problems[0].reason == "columns names 'Text', which the file has not"
    with pytest.raises(ValueError, match="columns: 'rating' is one value: name one column"):
        source(format="csv", path=path, columns={"rating": ["Overall merit", "Reviewer expertise"]})


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_decimal_comma_is_one_in_every_number(tmp_path: Path, form: str) -> None:
    cells: dict[str, Any] = {
        "paper_id": "p1", "title": "A title", "review_id": "r1", "review_text": "Fine.", "rating": "6,5",
        "confidence": "4,5",
    }  # fmt: skip
    if form == "csv":
        path = write(
            tmp_path / "x.csv", ";".join([*cells, "sub_scores.clarity"]) + f"\n{';'.join(cells.values())};3,5\n"
        )
    else:
        path = write(tmp_path / "x.jsonl", json.dumps({**cells, "sub_scores": {"clarity": "3,5"}}))
    review = ReviewRow("r1", "p1", "Fine.", 6.5, 4.5, sub_scores={"clarity": 3.5})
    assert items_of(source(format=form, path=path, decimal_comma=True))[1:] == [review]
    _, told, words = items_of(source(format=form, path=path, decimal_comma=False, rating_words={"6,5": 6}))[1:]
    assert (told, words) == (Unknown("confidence", "4,5"), Unknown("sub-score that is no number", "clarity"))


def test_papers_and_reviews_in_tables_of_their_own(tmp_path: Path) -> None:
    papers = write(tmp_path / "papers.csv", "paper_id,title,abstract\np1,A title,An abstract.\n")
    assert items_of(source(format="csv", path=papers)) == [PAPER, Skipped("row of a paper alone")]
    reviews = write(tmp_path / "reviews.csv", "paper_id,review_id,review_text,rating\np1,r1,Fine.,6\n")
    assert items_of(source(format="csv", path=reviews)) == [REVIEW]
    # As ASAP-Review has them: a file a paper, with a list of its reviews that lacks the title.
    said = {"id": "p1", "reviews": [{"review": "Fine.", "rating": "6: Marginally above", "confidence": "3: fair"}]}
    path = write(tmp_path / "asap" / "p1.json", said)
    (review,) = items_of(source(format="jsonl", path=path.parent, columns={"paper_id": "id", "review_text": "review"}))
    assert (review.paper_id, review.rating, review.confidence) == ("p1", 6.0, 3.0)
    # What is said of the paper would be lost: the row is still one that lacks its title.
    path = write(tmp_path / "x.csv", "paper_id,review_text,rating,decision\np1,Fine.,6,accept\n")
    assert [problem.reason for problem in read(source(format="csv", path=path))[1]] == ["missing in the row: title"]
    # Columns of other names are no paper's: what is missing is named first.
    path = write(tmp_path / "y.csv", HOTCRP)
    assert read(source(format="csv", path=path))[1][0].reason == "missing in the row: rating, review_text"


def _notes() -> list[dict[str, Any]]:
    group = "ICLR.cc/2025/Conference"
    paper = {"id": "P", "forum": "P", "domain": group, "invitations": [f"{group}/-/Submission"],
             "content": {"title": {"value": "A title"}, "venueid": {"value": group}}}  # fmt: skip
    review = {"id": "R", "forum": "P", "invitations": [f"{group}/Submission1/-/Official_Review"],
              "content": {"review": {"value": "Fine."}, "rating": {"value": 6}}}  # fmt: skip
    return [paper, review]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("form", ["forums", "lists", "kinds", "replies", "beside"])
def test_notes_are_found_in_what_holds_them(tmp_path: Path, form: str, indent: int | None) -> None:
    paper, review = _notes()
    dump = {
        "forums": {"P": {**paper, "details": {"replies": [review]}}},
        "lists": {"P": [paper, review]},
        "kinds": {"submissions": [paper], "reviews": [review]},
        "replies": [{**paper, "replies": [review]}],
        "beside": {"data": [{"submission": paper, "official_reviews": {"R": review}}]},
    }[form]
    path = write(tmp_path / "dump.json", json.dumps(dump, indent=indent))
    items = items_of(source(format="openreview_v2", path=path))
    assert [item.paper_id for item in items if isinstance(item, (PaperRow, ReviewRow))] == ["P", "P"]


def test_what_a_note_said_before_is_not_looked_for_in_it(tmp_path: Path) -> None:
    paper, review = _notes()
    older = {**review, "content": {"review": {"value": "Before."}, "rating": {"value": 2}}}
    note = {**review, "details": {"revisions": [older], "original": paper}}
    items = items_of(source(format="openreview_v2", path=write(tmp_path / "dump.json", [paper, note])))
    assert [item.rating for item in items if isinstance(item, ReviewRow)] == [6.0]
    _, problems = read(source(format="openreview_v2", path=write(tmp_path / "x.json", {"P": {"title": "A title"}})))
    assert problems[0].reason == "not a note: no invitation"


def test_a_folder_of_many_files_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file was looked for in a set made anew for it: a folder of 30,000 papers took over ten minutes to list."""
    for number in range(100):
        (tmp_path / f"{number}.json").touch()
    hashed, plain = [], PurePath.__hash__
    monkeypatch.setattr(PurePath, "__hash__", lambda path: hashed.append(path) or plain(path))
    assert len(files_at(tmp_path, (".json",))) == 100
    assert len(hashed) <= 500


def test_half_a_character_in_a_scores_name_is_told(tmp_path: Path) -> None:
    """Of a review without an id, which is made of its scores: it was a traceback."""
    row = {"paper_id": "p1", "title": "T", "review_text": "Fine.", "rating": 5, "sub_scores": {"\ud800": 3}}
    _, problems = read(source(format="jsonl", path=write(tmp_path / "x.jsonl", row)))
    assert [problem.reason for problem in problems] == ["a field's name holds half of a surrogate pair"]


@pytest.mark.parametrize("renamed", [
    {"review_text": "review"}, {"review_text": "Comments", "rating": "Score"}, {"title": "paper_title"},
])  # fmt: skip
def test_other_names_that_tables_have_are_told_as_columns(tmp_path: Path, renamed: dict[str, str]) -> None:
    """The fix was `columns: {rating: score}` whatever was missing: a column that the file has not."""
    row = {"title": "T", "review_text": "All is fine.", "rating": 5}
    path = write(tmp_path / "x.jsonl", {renamed.get(name, name): value for name, value in row.items()})
    _, (problem,) = read(source(format="jsonl", path=path))
    told = ", ".join(f"{name}: {own}" for name, own in sorted(renamed.items()))
    assert problem.fix.endswith(f"columns: {{{told}}}")
    columns = dict(pair.split(": ") for pair in told.split(", "))
    assert [type(item) for item in items_of(source(format="jsonl", path=path, columns=columns))] == [
        PaperRow,
        ReviewRow,
    ]


def test_a_number_of_a_review_is_not_taken_for_its_text(tmp_path: Path) -> None:
    _, (problem, _) = read(source(format="csv", path=write(tmp_path / "reviews.csv", HOTCRP)))
    assert problem.fix.endswith("columns: {rating: COLUMN}")


@pytest.mark.parametrize("orient", ["columns", "split", "list"])
def test_a_table_by_columns_is_told_as_such(tmp_path: Path, orient: Literal["columns", "split", "list"]) -> None:
    """Of pandas' default, and of `to_dict("list")`, it was said that a field is missing, or is no text."""
    frame = pandas.DataFrame({"title": ["T", "T"], "review_text": ["Fine.", "Good."], "rating": [6, 7]})
    if orient == "list":  # of frames and of hub datasets
        write(tmp_path / "x.json", frame.to_dict("list"))
    else:
        frame.to_json(tmp_path / "x.json", orient=orient)
    _, (problem,) = read(source(format="jsonl", path=tmp_path / "x.json"))
    assert problem.reason == "a table column by column, where rows are expected"
    found = re.search(r"to_json\((.*)\)", problem.fix)
    assert found
    assert found[1] == 'path, orient="records", lines=True'
    frame.to_json(tmp_path / "y.jsonl", orient="records", lines=True)
    assert len(items_of(source(format="jsonl", path=tmp_path / "y.jsonl"))) == 4


def test_values_inside_objects_are_named_by_the_columns_that_read_them(tmp_path: Path) -> None:
    """As the contents of OpenReview's notes are in a table of them: the fix was to write a number."""
    values = {"title": {"value": "T"}, "review_text": {"value": "Fine."}, "rating": {"value": 6}}
    config = {"format": "jsonl", "path": write(tmp_path / "x.jsonl", values)}
    _, (problem, *_) = read(source(**config))
    columns = yaml.safe_load(problem.fix.partition("columns: ")[2])
    paper, review = items_of(source(**config, columns=columns))
    assert (paper.title, review.text, review.rating) == ("T", "Fine.", 6)
