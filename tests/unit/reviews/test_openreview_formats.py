"""Known answers of OpenReview's two formats: what a note of each means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from read_sources import items_of, read, source, write

from prefmill.core.errors import InputError
from prefmill.reviews.rows import DecisionRow, DeletedRow, PaperRow, ReviewRow, Skipped, Unknown
from prefmill.reviews.scale import COMMON_SCALE


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
    DecisionRow("f1", "accepted", note_id="d1"),
    DeletedRow("r2", None),
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
        ("ICLR 2022 Submitted", "ICLR.cc/2024/Conference", "rejected"),  # the group alone did not mean acceptance
        ("EMNLP 2023 Findings", "", "accepted"),
        ("Decision pending for TMLR", "TMLR/Decision_Pending", None),
        ("Accepted by TMLR", "TMLR", "accepted"),
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


def test_the_venues_group_as_venueid_is_acceptance_unless_a_decision_says_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "n.json", [v2_submission(venue="ICLR 2024", venueid="ICLR.cc/2024/Conference")])
    paper, decision = items_of(source(format="openreview_v2", path=path))
    assert (paper.decision, decision) == (None, DecisionRow("f2", "accepted", rank=1))  # type: ignore[union-attr]


def test_an_invitation_that_was_taken_back_decides_nothing(tmp_path: Path) -> None:
    note = v2_submission()
    note["invitations"] += ["V/S/-/Desk_Rejection", "V/S/-/Desk_Rejection_Reversion"]
    (paper,) = items_of(source(format="openreview_v2", path=write(tmp_path / "n.json", [note])))
    assert paper.decision is None  # type: ignore[union-attr]


def test_what_is_unknown_is_named_and_costs_no_review(tmp_path: Path) -> None:
    notes = [
        v2_submission(venue="Forest Days 2025", venueid="dblp.org/forest"),
        v2_note("d", ["S/-/Decision"], {"decision": "Honourable"}),
        v2_note("r", ["S/-/Official_Review"], {"rating": 5, "main": "x", "confidence": "sure", "files": {"a": 1}}),
    ]
    path = write(tmp_path / "n.json", notes)
    found = items_of(source(format="openreview_v2", path=path))
    assert [str(item) for item in found if isinstance(item, Unknown)] == [
        "venue 'Forest Days 2025'", "decision 'Honourable'", "confidence 'sure'", "field 'files'",
    ]  # fmt: skip
    words = {"decision_words": {"honourable": "accepted", "Forest days 2025": "rejected"}}
    known = items_of(source(format="openreview_v2", path=path, confidence_words={"Sure": 4}, **words))
    assert [item.decision for item in known if isinstance(item, PaperRow | DecisionRow)] == ["rejected", "accepted"]
    assert [item.confidence for item in known if isinstance(item, ReviewRow)] == [4.0]


FORMS = {  # a venue's review form, the note of its decision, and what they mean
    "iclr_2017": ({"review": "x", "rating": "9: Top 15%"}, "paper1/official/review", 9, (1, 10),
                  {"decision": "Invite to Workshop Track"}, "paper1/acceptance", "rejected"),
    "iclr_2019": ({"review": "x", "rating": "3: Clear"}, "Paper1/Official_Review", 3, (1, 10),
                  {"metareview": "ok", "recommendation": "Accept (Poster)"}, "Paper1/Meta_Review", "accepted"),
    "iclr_2020": ({"review": "x", "rating": "6: Weak Accept"}, "Paper1/Official_Review", 6, (1, 8),
                  {"decision": "Accept (Talk)"}, "Paper1/Decision", "accepted"),
    "iclr_2023": ({"summary": "x", "recommendation": "5: marginally"}, "Paper1/Official_Review", 5, (1, 10),
                  {"decision": "Accept: notable-top-25%"}, "Paper1/Decision", "accepted"),
    "iclr_2026": ({"summary": "x", "rating": 0}, "Submission1/Official_Review", 0, (0, 10),
                  {"decision": "Reject"}, "Submission1/Decision", "rejected"),
    "neurips_2025": ({"summary": "x", "rating": 6}, "Submission1/Official_Review", 6, (1, 6),
                     {"decision": "Accept (spotlight)"}, "Submission1/Decision", "accepted"),
    "emnlp_2023": ({"Reasons_To_Accept": "x", "Soundness": "4: Strong"}, "Submission1/Official_Review", 4, (1, 5),
                   {"decision": "Accept-Findings"}, "Submission1/Decision", "accepted"),
    "arr": ({"paper_summary": "x", "overall_assessment": "3.5"}, "Submission1/Official_Review", 3.5, (1, 5),
            {"decision": "Reject"}, "Submission1/Decision", "rejected"),
    "colm": ({"reasons_to_accept": "x", "rating": 7}, "Submission1/Official_Review", 7, (1, 10),
             {"decision": "Accept"}, "Submission1/Decision", "accepted"),
    "tmlr": ({"summary_of_contributions": "x", "claims_and_evidence": "Yes"}, "Paper1/Review", 1, (0, 1),
             {"recommendation": "Accept with minor revision"}, "Paper1/Decision", "accepted"),
}  # fmt: skip


@pytest.mark.parametrize("preset", FORMS)
def test_a_preset_reads_its_venues_form(tmp_path: Path, preset: str) -> None:
    review, invited, rating, scale, decision, decided, verdict = FORMS[preset]
    notes = [v2_note("r", [f"-/{invited}"], review), v2_note("d", [f"-/{decided}"], decision)]
    read_review, read_decision = items_of(
        source(format="openreview_v2", preset=preset, path=write(tmp_path / "n.json", notes))
    )
    assert isinstance(read_review, ReviewRow)
    assert isinstance(read_decision, DecisionRow)
    assert (read_review.rating, read_review.scale or COMMON_SCALE, read_review.text) == (rating, scale, "x")
    assert read_decision.decision == verdict


def test_a_key_beside_a_preset_holds(tmp_path: Path) -> None:
    config = source(format="openreview_v2", preset="iclr_2026", path=tmp_path, rating_max=6, id_prefix="a-")
    assert (config.scale, config.id_prefix) == ((0.0, 6.0), "a-")


def test_a_folder_of_forums_is_read_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b", "a"):
        note = {**v2_submission(), "id": name, "forum": name}
        reply = {**v2_note(f"r{name}", ["S/-/Official_Review"], {"rating": 5, "main": "Fine."}), "forum": name}
        write(
            tmp_path / "forums" / name / "notes.json", json.dumps({**note, "details": {"replies": [reply]}}, indent=1)
        )
    found = items_of(source(format="openreview_v2", path=tmp_path / "forums"))
    assert [item.paper_id for item in found if isinstance(item, PaperRow | ReviewRow)] == ["a", "a", "b", "b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder without review files"):
        items_of(source(format="openreview_v2", path=tmp_path / "empty"))


def test_a_rated_note_of_another_invitation_is_told(tmp_path: Path) -> None:
    """Emergency reviews were counted as skipped, beside comments, in summary.json alone."""
    notes = [
        v1_note("e1", "Paper1/-/Emergency_Review", V1_REVIEW),
        v1_note("m1", "Paper1/-/Meta_Review", {"metareview": "Fine.", "rating": "8", "confidence": "4"}),
        v1_note("x1", "Paper1/-/Ethics_Review", {"recommendation": "1: no issues"}),
    ]
    path = write(tmp_path / "notes.json", json.dumps(notes))
    found = items_of(source(format="openreview_v1", path=path))
    told = Unknown("rated note that review_invitations does not name", "emergency_review")
    assert found == [told, Skipped("meta_review"), Skipped("ethics_review")]
    given = ["official_review", "emergency_review"]
    assert isinstance(items_of(source(format="openreview_v1", path=path, review_invitations=given))[0], ReviewRow)
