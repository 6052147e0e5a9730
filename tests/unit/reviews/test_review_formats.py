"""Known answers of every source format: what a row of each means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from prefmill.config import validate
from prefmill.errors import ConfigError, InputError
from prefmill.reviews.generated import generate
from prefmill.reviews.rows import DecisionRow, Item, PaperRow, Problem, ReviewRow, Skipped
from prefmill.reviews.source import SourceConfig, read_source
from prefmill.reviews.sources import Source


class Holder(BaseModel):
    """A configuration with one source."""

    source: Source


def source(**values: Any) -> SourceConfig:
    return Holder.model_validate_json(json.dumps({"source": values}, default=str)).source


def read(config: SourceConfig) -> tuple[list[Item], list[Problem]]:
    """All items, and all problems."""
    items: list[Item] = []
    problems = []
    for row in read_source(config, 0):
        if isinstance(row, Problem):
            problems.append(row)
        else:
            items += row[1]
    return items, problems


def items_of(config: SourceConfig) -> list[Item]:
    items, problems = read(config)
    assert problems == []
    return items


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


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


def test_jsonl(tmp_path: Path) -> None:
    assert items_of(source(format="jsonl", path=write(tmp_path / "x.jsonl", json.dumps(ROW)))) == [PAPER, REVIEW]


def test_jsonl_with_only_what_is_required(tmp_path: Path) -> None:
    row = {"paper_id": "1", "title": "T", "review_id": "r", "review_text": "x", "rating": 1}
    config = source(format="jsonl", path=write(tmp_path / "x.jsonl", json.dumps(row)), venue="W", id_prefix="acl-")
    expected = [PaperRow("acl-1", "T", venue="W"), ReviewRow("acl-r", "acl-1", "x", 1.0, None, "W", {})]
    assert items_of(config) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rating": float("nan")}, "rating is not a number: nan"),
        ({"rating": None}, "rating is not a number: None"),
        ({"rating": 11}, "rating 11 is outside the scale 1 to 10"),
        ({"confidence": float("nan")}, "confidence is not a number"),
        ({"sub_scores": {"a": float("inf")}}, "sub_scores.a is not a number"),
        ({"sub_scores": [1]}, "sub_scores is not an object but list"),
        ({"review_text": " \n\x00"}, "empty review_text"),
        ({"title": ""}, "empty title"),
        ({"decision": "maybe"}, "unknown decision 'maybe'"),
        ({"paper_id": "a/b"}, "cannot name a file"),
        ({"ratings": 3}, "unknown field 'ratings' (did you mean 'rating'?); valid fields: abstract, confidence, "),
    ],
)
def test_a_row_at_fault_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps(ROW) + "\n" + json.dumps({**ROW, **change}) + "\n")
    items, problems = read(source(format="jsonl", path=path))
    assert items == [PAPER, REVIEW]
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
    assert items_of(source(format="jsonl", path=path, ignore_extra_fields=True)) == [PAPER, REVIEW]


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


def v1_note(identifier: str, invitation: str, content: dict[str, Any], **more: Any) -> dict[str, Any]:
    invitation = f"ICLR.cc/2023/Conference/{invitation}"
    return {"id": identifier, "forum": "f1", "invitation": invitation, "content": content, **more}


V1_REVIEW = {
    "title": "Official review",
    "summary_of_the_paper": "It studies graphs.",
    "strength_and_weaknesses": "Strong.\nWeak.",
    "correctness": "3: Some of the claims have minor issues. A few statements are not well-supported.",
    "first_time_reviewer": "",
    "recommendation": "6: marginally above the acceptance threshold",
    "confidence": "4: You are confident in your assessment, but not absolutely certain.",
}
V1_NOTES = [
    v1_note("f1", "-/Blind_Submission", {"title": "Graphs", "abstract": "About graphs.", "authors": ["A. B."]}),
    v1_note("r1", "Paper1/-/Official_Review", V1_REVIEW, replyto="f1"),
    v1_note("c1", "Paper1/-/Official_Comment", {"comment": "Thanks."}, replyto="r1"),
    v1_note("d1", "Paper1/-/Decision", {"decision": "Accept: poster", "comment": "Fine."}),
    v1_note("r2", "Paper1/-/Official_Review", V1_REVIEW, ddate=1234),
]
V1_ITEMS = [
    PaperRow("f1", "Graphs", "About graphs.", "", None, "ICLR 2023"),
    ReviewRow(
        "r1",
        "f1",
        "## Summary of the paper\nIt studies graphs.\n\n## Strength and weaknesses\nStrong.\nWeak.",
        6.0,
        4.0,
        "ICLR 2023",
        {"correctness": 3.0},
    ),
    Skipped("official_comment"),
    DecisionRow("f1", "accepted"),
    Skipped("deleted note"),
]


@pytest.mark.parametrize("form", ["array", "lines", "answer"])
def test_openreview_v1(tmp_path: Path, form: str) -> None:
    content = {
        "array": json.dumps(V1_NOTES, indent=1),
        "lines": "\n".join(json.dumps(note) for note in V1_NOTES),
        "answer": json.dumps({"notes": V1_NOTES, "count": 5}),
    }[form]
    assert items_of(source(format="openreview_v1", path=write(tmp_path / "notes.json", content))) == V1_ITEMS


def test_openreview_v1_with_replies_inside_the_submission(tmp_path: Path) -> None:
    submission = {**V1_NOTES[0], "details": {"directReplies": V1_NOTES[1:]}}
    path = write(tmp_path / "notes.json", [submission])
    assert items_of(source(format="openreview_v1", path=path)) == V1_ITEMS


def test_openreview_v1_of_older_venues(tmp_path: Path) -> None:
    """In 2018 and 2019 the last part of an invitation stood after a slash only, and a review was one text."""
    review = {"title": "ok", "review": "I like it.", "rating": "7: Good paper, accept", "confidence": "3: fairly"}
    note = {
        "id": "r",
        "forum": "f",
        "invitation": "ICLR.cc/2018/Conference/-/Paper5/Official_Review",
        "content": review,
    }
    config = source(format="openreview_v1", path=write(tmp_path / "n.json", [note]))
    assert items_of(config) == [ReviewRow("r", "f", "I like it.", 7.0, 3.0, "ICLR 2018", {})]


def v2_note(identifier: str, invitations: list[str], content: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": identifier,
        "forum": "f2",
        "invitations": [f"ICLR.cc/2024/Conference/{name}" for name in invitations],
        "content": {key: {"value": value} for key, value in content.items()},
        **more,
    }


def v2_submission(**content: Any) -> dict[str, Any]:
    return v2_note(
        "f2", ["-/Submission", "-/Post_Submission", "-/Edit"], {"title": "Trees", "abstract": "Oaks.", **content}
    )


V2_REVIEW = {
    "summary": "On trees.",
    "soundness": "3 good",
    "presentation": 4,
    "strengths": "Tall.",
    "questions": "1. Why trees?",
    "flag_for_ethics_review": ["No ethics review needed."],
    "rating": 8,
    "confidence": 5,
    "code_of_conduct": "Yes",
}


def test_openreview_v2(tmp_path: Path) -> None:
    submission = v2_submission(venue="ICLR 2024 oral", venueid="ICLR.cc/2024/Conference")
    review = v2_note("r9", ["Submission7/-/Official_Review", "Submission7/-/Edit"], V2_REVIEW)
    comment = v2_note("c9", ["Submission7/-/Rebuttal"], {"comment": "No."})
    submission["details"] = {"replies": [review, comment]}
    text = "## Summary\nOn trees.\n\n## Strengths\nTall.\n\n## Questions\n1. Why trees?"
    assert items_of(source(format="openreview_v2", path=write(tmp_path / "n.jsonl", json.dumps(submission)))) == [
        PaperRow("f2", "Trees", "Oaks.", "", "accepted", "ICLR 2024"),
        ReviewRow("r9", "f2", text, 8.0, 5.0, "ICLR 2024", {"presentation": 4.0, "soundness": 3.0}),
        Skipped("rebuttal"),
    ]


@pytest.mark.parametrize(
    ("venue", "venueid", "decision"),
    [
        ("Submitted to ICLR 2024", "ICLR.cc/2024/Conference/Rejected_Submission", "rejected"),
        ("ICLR 2024 Conference Withdrawn Submission", "ICLR.cc/2024/Conference/Withdrawn_Submission", "withdrawn"),
        ("ICLR 2024 Conference Desk Rejected", "ICLR.cc/2024/Conference/Desk_Rejected_Submission", "desk_rejected"),
        ("ICLR 2024 Conference Submission", "ICLR.cc/2024/Conference/Submission", None),
        ("Submitted to ICLR 2024", "ICLR.cc/2024/Conference/Submission", None),
        ("ICLR 2024 poster", "ICLR.cc/2024/Conference", "accepted"),
        ("ICLR 2024", "ICLR.cc/2024/Conference", None),
    ],
)
def test_openreview_v2_decision_from_the_venue(tmp_path: Path, venue: str, venueid: str, decision: str | None) -> None:
    path = write(tmp_path / "n.json", [v2_submission(venue=venue, venueid=venueid)])
    (paper,) = items_of(source(format="openreview_v2", path=path))
    assert isinstance(paper, PaperRow)
    assert paper.decision == decision


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (V1_NOTES[1], "the content is in the form of openreview_v1"),
        ({"id": "x"}, "not a note: no invitation"),
        (v2_note("d", ["S/-/Decision"], {"comment": "?"}), "decision note without a decision"),
        (v2_note("r", ["S/-/Official_Review"], {"summary": "x"}), "review without a rating; its fields: summary"),
        (v2_note("r", ["S/-/Official_Review"], {"rating": 5}), "empty review"),
        ({**v2_note("r", ["S/-/Official_Review"], {}), "content": None}, "note without content"),
    ],
)
def test_a_note_at_fault_is_named(tmp_path: Path, note: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "n.json", json.dumps([v2_submission(), note], indent=1))
    items, problems = read(source(format="openreview_v2", path=path))
    assert len(items) == 1
    assert problems[0].reason.startswith(reason)
    assert problems[0].place.item == f"note {note['id']}"
    assert problems[0].place.line is not None
    assert problems[0].fix


def test_openreview_fields_can_be_chosen(tmp_path: Path) -> None:
    review = v2_note("r", ["S/-/Review"], {"score": "4 = ok", "private": "hush", "main": "Fine."})
    path = write(tmp_path / "n.json", [review])
    config = source(
        format="openreview_v2", path=path, rating_fields=["score"], exclude_fields=["private"], rating_max=5
    )
    assert items_of(config) == [ReviewRow("r", "f2", "Fine.", 4.0, None, "ICLR 2024", {})]


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
    ReviewRow("104-r0", "104", "Sound.", 4.0, 3.0, "ACL 2017", {"clarity": 5.0}),
    Skipped("meta-review"),
    Skipped("comment without a recommendation"),
    ReviewRow("104-r3", "104", "Odd.", 2.0, None, "ACL 2017", {}),
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
    assert sum(isinstance(item, ReviewRow) for item in items) == 4  # those of 104 and, without its paper, of 106
    found = [(problem.place.brief, problem.reason) for problem in problems]
    assert found[:3] == [
        ("104.json (reviews[0])", "empty comments"),
        ("104.json (reviews[5])", "not a JSON object but str"),
        ("104.json (reviews[6])", "missing in the review: comments"),
    ]
    assert found[3] == ("105.json:2", "not JSON: Expecting ':' delimiter")
    assert found[4][1].startswith("unknown field 'surprise'")
    assert path.is_file()


def test_peerread_without_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no PeerRead review files"):
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
