"""Known answers of every source format but OpenReview's: what a row of each means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from read_sources import Holder, items_of, read, source, write

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.reviews.generated import generate
from prefmill.reviews.rows import PaperRow, ReviewRow, Skipped, Unknown

ROW = {
    "paper_id": "p1",
    "title": "A title",
    "abstract": "An abstract.",
    "decision": "accepted",
    "decision_raw": "Poster",
    "review_id": "r1",
    "review_text": " Good.\r\nReally. ",
    "rating": 8,
    "confidence": None,
    "venue": "V 2024",
    "sub_scores": {"soundness": 3, "reading": "I read it", "novelty": None, "clarity": "2 fair"},
}
PAPER = PaperRow("p1", "A title", "An abstract.", "", "accepted", "V 2024")
REVIEW = ReviewRow("r1", "p1", "Good.\nReally.", 8.0, None, "V 2024", {"clarity": 2.0, "soundness": 3.0})
READING = Unknown("sub-score that is no number", "reading")


def test_jsonl(tmp_path: Path) -> None:
    items = items_of(source(format="jsonl", path=write(tmp_path / "x.jsonl", json.dumps(ROW))))
    assert items == [PAPER, REVIEW, READING]


def test_an_array_as_pandas_writes_it_is_read_as_its_objects(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "review_id": "r2", "review_text": "Another [1] text."}]
    lines = items_of(source(format="jsonl", path=write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))))
    array = pandas.DataFrame(rows).to_json(orient="records", indent=1)
    found = items_of(source(format="jsonl", path=write(tmp_path / "x.json", array)))
    assert found == lines


def test_jsonl_with_only_what_is_required(tmp_path: Path) -> None:
    row = {"paper_id": "1", "title": "T", "review_id": "r", "review_text": "x", "rating": 1}
    config = source(format="jsonl", path=write(tmp_path / "x.jsonl", json.dumps(row)), venue="W", id_prefix="acl-")
    expected = [PaperRow("acl-1", "T", venue="W"), ReviewRow("acl-r", "acl-1", "x", 1.0, None, "W", {})]
    assert items_of(config) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rating": float("nan")}, "rating is not a number: None (NaN in rating is no value)"),
        ({"rating": None}, "rating is not a number: None"),
        ({"rating": 11}, "rating 11 is outside the scale 1 to 10"),
        ({"confidence": float("inf")}, "confidence is not a number"),
        ({"sub_scores": {"a": float("inf")}}, "sub_scores.a is not a number"),
        ({"sub_scores": [1]}, "sub_scores is not an object but list"),
        ({"review_text": " \n\x00"}, "empty review_text"),
        ({"title": ""}, "empty title"),
        ({"decision": "maybe"}, "unknown decision 'maybe'"),
        ({"paper_id": "a/b\nc"}, "is no id"),
        ({"ratings": 3}, "unknown field 'ratings' (did you mean 'rating'?); valid fields: abstract, confidence, "),
    ],
)
def test_a_row_at_fault_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps(ROW) + "\n" + json.dumps({**ROW, **change}) + "\n")
    items, problems = read(source(format="jsonl", path=path))
    assert items == [PAPER, REVIEW, READING]
    assert len(problems) == 1
    assert reason in problems[0].reason
    assert problems[0].place.line == 2
    assert problems[0].fix
    assert "p1" in problems[0].excerpt or "a/b" in problems[0].excerpt


def test_missing_fields_are_named_and_extra_ones_may_be_ignored(tmp_path: Path) -> None:
    row = {key: value for key, value in ROW.items() if key not in ("rating", "title")}
    _, problems = read(source(format="jsonl", path=write(tmp_path / "x.jsonl", json.dumps(row))))
    assert problems[0].reason == "missing in the row: rating, title"
    path = write(tmp_path / "y.jsonl", json.dumps({**ROW, "extra": 1}))
    assert items_of(source(format="jsonl", path=path, ignore_extra_fields=True)) == [PAPER, REVIEW, READING]


def test_csv_with_its_own_column_names(tmp_path: Path) -> None:
    header = (
        "paper_id,title,abstract,decision,review_id,comment,score,confidence,venue,sub_scores.soundness,sub_scores.x"
    )
    cells = 'p1,A title,An abstract.,accept,r1,"Good.\nReally.",8: accept,,V 2024,3,'
    columns = {"review_text": "comment", "rating": "score"}
    config = source(format="csv", path=write(tmp_path / "x.csv", f"{header}\n{cells}\n"), columns=columns)
    review = ReviewRow("r1", "p1", "Good.\nReally.", 8.0, None, "V 2024", {"soundness": 3.0})
    assert items_of(config) == [PAPER, review]


def test_csv_with_an_unknown_column_or_mapping(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "paper_id,title,review_id,review_text,rating,who\np,T,r,x,5,me\n")
    _, problems = read(source(format="csv", path=path))
    assert problems[0].reason.startswith("unknown field 'who'")
    with pytest.raises(ConfigError, match="no field 'review'"):
        validate(Holder, {"source": {"format": "csv", "path": str(path), "columns": {"review": "x"}}})  # type: ignore[type-var]


PEERREAD = {
    "id": "104",
    "title": "Parsing",
    "abstract": "We parse.",
    "accepted": True,
    "histories": [],
    "conference": "ACL 2017",
    "reviews": [
        {"comments": "Sound.", "RECOMMENDATION": "4", "REVIEWER_CONFIDENCE": "3", "CLARITY": "5",
         "is_meta_review": None, "PRESENTATION_FORMAT": "Poster"},
        {"comments": "Both.", "IS_META_REVIEW": True, "RECOMMENDATION": 5},
        {"comments": "We updated it.", "TITLE": "Update", "IS_META_REVIEW": False, "OTHER_KEYS": "an author"},
        {"comments": "Odd.", "RECOMMENDATION": 2, "IS_META_REVIEW": False},
    ],
}  # fmt: skip
PEERREAD_ITEMS = [
    PaperRow("104", "Parsing", "We parse.", "", "accepted", "ACL 2017"),
    ReviewRow("104-r0", "104", "Sound.", 4.0, 3.0, "ACL 2017", {"clarity": 5.0}, (1.0, 5.0)),
    Skipped("meta-review"),
    Skipped("comment without a recommendation"),
    PaperRow("104", "Parsing", "We parse.", "", "accepted", "ACL 2017"),
    ReviewRow("104-r3", "104", "Odd.", 2.0, None, "ACL 2017", {}, (1.0, 5.0)),
]


def test_peerread_file_or_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "train" / "reviews" / "104.json", PEERREAD)
    write(tmp_path / "train" / "parsed_pdfs" / "104.pdf.json", {"name": "not a review file"})
    for where in (path, tmp_path):
        assert items_of(source(format="peerread", path=where, rating_max=5)) == PEERREAD_ITEMS


def test_peerread_problems_are_set_aside_one_by_one(tmp_path: Path) -> None:
    reviews = [{"comments": "", "RECOMMENDATION": 3}, *PEERREAD["reviews"], "text", {"RECOMMENDATION": 3}]  # type: ignore[misc]
    path = write(tmp_path / "104.json", {**PEERREAD, "reviews": reviews})
    write(tmp_path / "105.json", '{"id": "105",\n"title" 3}')
    write(tmp_path / "106.json", {**PEERREAD, "id": "106", "surprise": 1})
    items, problems = read(source(format="peerread", path=tmp_path))
    assert [item.review_id for item in items if isinstance(item, ReviewRow)] == ["104-r1", "104-r4"]
    found = [(problem.place.brief, problem.reason) for problem in problems]
    assert found[:3] == [
        ("104.json (reviews[0])", "empty review_text"),
        ("104.json (reviews[5])", "not a JSON object but str"),
        ("104.json (reviews[6])", "missing in the review: comments"),
    ]
    assert found[3] == ("105.json:2", "not JSON: Expecting ':' delimiter")
    assert found[4][1].startswith("unknown field 'surprise'")
    assert path.is_file()


def test_peerread_without_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder without review files"):
        read(source(format="peerread", path=tmp_path))


def test_generated() -> None:
    items = items_of(source(format="generated", seed=3, num_papers=2, images=True))
    rows = list(generate(3, 2))
    assert [item.text for item in items if isinstance(item, ReviewRow)] == [row["review_text"] for row in rows]
    assert all(item.drawn for item in items if isinstance(item, PaperRow))


def test_unknown_formats_and_scales_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="'jsonl'"):
        validate(Holder, {"source": {"format": "parquet", "path": "x"}})  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"rating_min \(5\) must be below rating_max \(5\)"):
        validate(Holder, {"source": {"format": "jsonl", "path": "x", "rating_min": 5, "rating_max": 5}})  # type: ignore[type-var]
