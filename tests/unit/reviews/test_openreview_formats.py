"""Known answers of OpenReview's two formats: what a note of each means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from read_sources import items_of, read, source, write

from prefmill.reviews.rows import DecisionRow, PaperRow, ReviewRow, Skipped


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
    assert items_of(config) == [ReviewRow("r", "f2", "Fine.", 4.0, None, "ICLR 2024", {}, (1.0, 5.0))]
