"""Reviews that are nearly right: one number of two, half of a note, the file beside the one that is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.errors import InputError
from prefmill.reviews import files
from prefmill.reviews.decision_words import decision_in
from prefmill.reviews.markup import without_html
from prefmill.reviews.rows import (
    DecisionRow,
    PaperRow,
    RawRow,
    ReviewRow,
    RowError,
    Skipped,
    Unknown,
    parse_rating,
)
from tests.unit.reviews.read_sources import ROW, items_of, read, source, write


@pytest.mark.parametrize(
    "text",
    [
        "5 (raised to 6)", "6, changed to 8",
        "4/5", "3 out of 5", "4 (out of 5)", "6-7", "6 - 7", "6 or 7", "5 -> 6", "5→6", "6 to 7", "6, 7", "6;7", "6±1",
        "60%",
        "6\u22127", "6\u20117", "5 => 6", "5 > 6", "6 and 7", "6 & 7", "6 | 7", "4\u20445", "7 1/2", "7 ½", "6-jul",
        "6-jul-24",
    ],
)  # fmt: skip
def test_two_numbers_and_another_scale_are_no_rating(text: str) -> None:
    with pytest.raises(RowError, match="no number on the scale 1 to 10") as caught:
        parse_rating(text, (1, 10))
    assert parse_rating(text, (1, 10), {text: 6}) == 6, caught.value.fix


@pytest.mark.parametrize(
    ("text", "scale", "rating"),
    [("7/10", (1, 10), 7), ("4 out of 5", (1, 5), 4), ("60%", (0, 100), 60), ("10: Top 5%", (1, 10), 10),
     ("1-strong reject", (1, 10), 1), ("3-marginal", (1, 10), 3),
     ("-2 (reject)", (-3, 3), -2), ("\u22122", (-3, 3), -2), ("6 (was 5)", (1, 10), 6)],
)  # fmt: skip
def test_one_number_with_words_is_a_rating(text: str, scale: tuple[float, float], rating: float) -> None:
    assert parse_rating(text, scale) == rating


@pytest.mark.parametrize(
    "text", ["Unaccepted", "No acceptance", "Not recommended for acceptance", "The paper cannot be accepted"]
)
def test_a_denied_acceptance_is_a_rejection(text: str) -> None:
    assert decision_in(text) == "rejected"
    assert decision_in("Accept: no concerns, not even small ones") == "accepted"


def test_answers_in_words_and_confidences_on_another_scale_are_counted(tmp_path: Path) -> None:
    row = {**ROW, "confidence": 80, "sub_scores": {"clarity": "good", "novelty": "3 fair", "impact": None}}
    items = items_of(source(format="jsonl", path=write(tmp_path / "x.jsonl", row)))
    review = next(item for item in items if isinstance(item, ReviewRow))
    assert (review.confidence, review.sub_scores) == (None, {"novelty": 3.0})
    unknown = [item for item in items if isinstance(item, Unknown)]
    assert unknown == [Unknown("confidence", "80"), Unknown("sub-score that is no number", "clarity")]


@pytest.mark.parametrize("text", ["3-4", "3–4", "3 -> 4", "2 to 3", "3;4", "1:5", "3 1/2", "3 5", "½"])
@pytest.mark.parametrize("form", ["object", "cell", "note"])
def test_two_numbers_are_no_sub_score(tmp_path: Path, text: str, form: str) -> None:
    """The first of them was the score; in a cell the rest of `3-4` became the next one's name."""
    if form == "note":
        given = note(content={"rating": {"value": 6}, "summary": {"value": "Long."}, "clarity": {"value": text}})
        items, _ = notes_of(tmp_path / "x.jsonl", given)
    else:
        scores = {"clarity": text, "novelty": "4/5"} if form == "object" else f"clarity: {text}, novelty: 4/5"
        path = write(tmp_path / "x.jsonl", {**ROW, "sub_scores": scores})
        items = items_of(source(format="jsonl", path=path, columns={"venue": "venue"}))
        assert Unknown("sub-score that is no number", "clarity") in items
    (review,) = (item for item in items if isinstance(item, ReviewRow))
    assert review.sub_scores == ({} if form == "note" else {"novelty": 4.0})
    assert (text in review.text) == (form == "note")  # a section of the review, as other answers in words


def note(**values: Any) -> dict[str, Any]:
    return {
        "id": "n1", "forum": "f1", "invitations": ["A.cc/2024/C/Submission1/-/Official_Review"],
        "content": {"rating": {"value": "6: good"}, "summary": {"value": "Long."}}, **values,
    }  # fmt: skip


def notes_of(path: Path, *notes: dict[str, Any], version: int = 2) -> tuple[list[Any], list[Any]]:
    path.write_text("".join(json.dumps(item) + "\n" for item in notes))
    items, problems = read(source(format=f"openreview_v{version}", path=path))
    return [item for item in items if not isinstance(item, (PaperRow, DecisionRow))], problems


def test_what_stands_bare_in_a_wrapped_note_is_kept(tmp_path: Path) -> None:
    content = {**note()["content"], "weaknesses": "Bare.", "odd": {"text": "?"}, "hidden": {"readers": ["x"]}}
    (review, unknown), _ = notes_of(tmp_path / "x.jsonl", note(content=content))
    assert "Bare." in review.text
    assert unknown == Unknown("field", "odd")


def test_an_earlier_version_is_no_second_review_and_two_fields_of_one_name_are_a_fault(tmp_path: Path) -> None:
    old = {"invitation": "A.cc/2020/C/Paper1/-/Official_Review", "content": {"rating": "6", "review": "a"}}
    items, _ = notes_of(
        tmp_path / "x.jsonl", note(**old, referent=None), note(**old, id="n2", referent="n1"), version=1
    )
    assert [type(item) for item in items] == [ReviewRow, Skipped]
    old["content"] = {"rating": "6", "review": "a", "Review": "b"}
    _, problems = notes_of(tmp_path / "x.jsonl", note(**old), version=1)
    assert "one name" in problems[0].reason


def test_peerreads_score_is_a_rating_and_a_null_id_is_made_of_the_title(tmp_path: Path) -> None:
    paper = {"id": "1", "title": "T", "reviews": [{"comments": "c", "SCORE": 4}]}
    items = items_of(source(format="peerread", path=write(tmp_path / "x.json", paper)))
    assert [item.rating for item in items if isinstance(item, ReviewRow)] == [4]
    made, review = items_of(source(format="peerread", path=write(tmp_path / "x.json", {**paper, "id": None})))
    assert isinstance(made, PaperRow)
    assert isinstance(review, ReviewRow)
    assert (made.paper_id, len(made.paper_id)) == (review.paper_id, 16)


@pytest.mark.parametrize("chunk", [16, 23, 1 << 20])
def test_a_dump_of_several_answers_is_read_to_its_end(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", chunk)
    pages = [json.dumps({"notes": [{"id": f"{page}{note}"} for note in range(2)], "count": 4}) for page in range(2)]
    for text in (
        "\n".join(pages),
        "".join(pages) + "\n",
        '[{"id": "00"}, {"id": "01"}]\n[]\n[{"id": "10"}, {"id": "11"}]',
    ):
        found = list(files.json_rows(write(tmp_path / "x.json", text), 0))
        assert [row.values["id"] for row in found if isinstance(row, RawRow)] == ["00", "01", "10", "11"]
        assert len(found) == 4
    with pytest.raises(InputError, match="text behind an array"):
        list(files.json_rows(write(tmp_path / "x.json", '[{"id": "00"}]\n{"id": "01"}\n'), 0))


@pytest.mark.parametrize(
    ("group", "venue"),
    [
        ("aclweb.org/ACL/ARR/2024/June", "aclweb.org/ACL/ARR/2024/June"),
        ("TMLR", "TMLR"),
        ("ICLR.cc/2024/Conference", "ICLR 2024"),
    ],
)
def test_all_papers_of_a_venue_have_one_venue(tmp_path: Path, group: str, venue: str) -> None:
    notes = [note(id=f"n{n}", invitations=[f"{group}/Submission{n}/-/Official_Review"]) for n in (1, 2)]
    reviews, _ = notes_of(tmp_path / "x.jsonl", *notes)
    assert [review.venue for review in reviews] == [venue] * 2


def test_a_second_rating_is_kept_or_counted(tmp_path: Path) -> None:
    content = {**note()["content"], "recommendation": {"value": "8: accept"}, "overall_rating": {"value": "high"}}
    (review, unknown), _ = notes_of(tmp_path / "x.jsonl", note(content=content))
    assert (review.rating, review.sub_scores) == (6, {"recommendation": 8})
    assert unknown == Unknown("second rating in words", "overall_rating")


def test_a_nan_in_a_note_deletes_nothing(tmp_path: Path) -> None:
    content = {**note()["content"], "confidence": {"value": float("nan")}}
    (review, *skipped), problems = notes_of(tmp_path / "x.jsonl", note(content=content, ddate=float("nan")))
    assert (review.rating, review.confidence, problems) == (6, None, [])
    assert skipped == [Skipped(f"NaN as no value: {name}") for name in ("content.confidence.value", "ddate")]


def test_a_scale_whose_best_is_its_lowest_is_turned_over(tmp_path: Path) -> None:
    rows = [{**ROW, "review_id": f"r{n}", "rating": value} for n, value in enumerate((1, "2: good", 2.3, "worst"))]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    turned = source(format="jsonl", path=path, rating_max=5, rating_words={"worst": 5}, lower_is_better=True)
    assert [item.rating for item in items_of(turned) if isinstance(item, ReviewRow)] == [5, 4, 3.7, 1]
    with pytest.raises(ValueError, match="lower_is_better: true"):
        source(format="jsonl", path=path, rating_min=5, rating_max=1)


@pytest.mark.parametrize("text", ["6-Jul", "06:05:00"])
def test_a_date_that_a_sheet_makes_is_refused_in_its_own_spelling(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "x.jsonl", {**ROW, "rating": text})
    _, (problem,) = read(source(format="jsonl", path=path))
    assert "no number on the scale" in problem.reason
    assert items_of(source(format="jsonl", path=path, rating_words={text: 6}))


def test_words_for_ratings_hold_for_numbers_too() -> None:
    assert [parse_rating(value, (1, 5), {"1": 5, "2.5": 3}) for value in (1, 1.0, "1", 2.5, 4)] == [5, 5, 5, 3, 4]


@pytest.mark.parametrize("text", ["\u200b\u200b", "\ufeff", "\u202e \u2060"])
def test_what_nobody_sees_is_no_review(tmp_path: Path, text: str) -> None:
    _, (problem,) = read(source(format="jsonl", path=write(tmp_path / "x.jsonl", {**ROW, "review_text": text})))
    assert problem.reason == "empty review_text"
    assert items_of(source(format="jsonl", path=write(tmp_path / "x.jsonl", {**ROW, "review_text": f"{text}👍"})))


@pytest.mark.parametrize("name", ["final_rating", "rating_after_rebuttal", "Preliminary_Rating"])
def test_a_rating_that_nobody_named_is_counted_and_not_read_to_the_model(tmp_path: Path, name: str) -> None:
    content = {**note()["content"], name: {"value": "8: accept"}, "justification_for_rating": {"value": "3 reasons."}}
    (review, unknown), _ = notes_of(tmp_path / "x.jsonl", note(content=content))
    assert "8" not in review.text
    assert "3 reasons." in review.text
    assert unknown == Unknown("rating that rating_fields does not name", name.lower())
    config = source(format="openreview_v2", path=tmp_path / "x.jsonl", rating_fields=[name, "rating"])
    (review,) = items_of(config)
    assert isinstance(review, ReviewRow)
    assert (review.rating, review.sub_scores) == (8, {"rating": 6})


def test_replies_inside_replies_are_read(tmp_path: Path) -> None:
    inner = note(id="n2", details={"replies": [note(id="n3")]})
    items, _ = notes_of(tmp_path / "x.jsonl", note(details={"directReplies": [inner]}))
    assert [review.review_id for review in items] == ["n1", "n2", "n3"]


HTML = '<p>It&#39;s <b>good</b> &amp; new.</p>\r\n<div class="x">a < b and c > d, &lt;p&gt;<br /><br/>End'


def test_html_is_read_as_text_where_a_source_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps({**ROW, "review_text": HTML}))
    *_, review = [
        item for item in items_of(source(format="jsonl", path=path, html=True)) if isinstance(item, ReviewRow)
    ]
    assert review.text == "It's good & new.\na < b and c > d, <p>\nEnd"
    *_, kept = [item for item in items_of(source(format="jsonl", path=path)) if isinstance(item, ReviewRow)]
    assert "<br />" in kept.text
    for plain in ("a < b and c > d", "R&D; AT&T", "<think> if x<i and y>j", "p < .05; a<b>c?"[:9]):
        assert without_html({"x": [plain]}) == {"x": [plain]}


def test_ticked_boxes_and_answers_about_the_reviewer_are_no_part_of_a_review(tmp_path: Path) -> None:
    """As ARR's form and that of NeurIPS 2025 ask them: a model would learn to write them."""
    boxes = {
        "best_paper": "No", "limitations": "yes.", "needs_ethics_review": "No", "Knowledge_of_paper": "Before it",
        "Impact_of_Knowledge_of_Paper": "Not at all", "Knowledge_of_or_educated_guess_at_author_identity": "No",
        "reviewer_certification": "I certify it", "publication_ethics_policy_compliance": "I used no such tool",
        "ethical_concerns": ["NO or VERY MINOR ethics concerns only"], "best_paper_justification": "No, it is short.",
    }  # fmt: skip
    content = {**note()["content"], **{name: {"value": value} for name, value in boxes.items()}}
    (review, *left_out), _ = notes_of(tmp_path / "x.jsonl", note(content=content))
    assert review.text == "## Summary\nLong.\n\n## Best paper justification\nNo, it is short."
    assert sorted(item.kind for item in left_out) == [
        *["answer about the reviewer"] * 5, *["section without content (N/A, yes, no)"] * 4,
    ]  # fmt: skip
