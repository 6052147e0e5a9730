"""Values from outside are read as meant, or refused with a reason and a fix."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.reviews.decision_words import decision_in
from prefmill.reviews.rows import (
    RowError,
    Unknown,
    clean_text,
    excerpt,
    parse_confidence,
    parse_decision,
    parse_id,
    parse_rating,
    parse_score,
)


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (6, 6.0),
        (3.5, 3.5),
        ("6: marginally above the acceptance threshold", 6.0),
        ("3 good", 3.0),
        (" 10 ", 10.0),
        ("7/10", 7.0),
        ("4.5 = between", 4.5),
        ("3. Weak accept", 3.0),  # HotCRP's choices
        ("-1", -1.0),
    ],
)
def test_scores_as_venues_write_them(value: Any, score: float) -> None:
    assert parse_score(value, "rating") == score


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "NaN",
        "accept",
        "6th",
        "1.2.3",
        "3.Weak",
        True,
        float("nan"),
        float("inf"),
        10**400,
        "9" * 400,
        [6],
        {"value": 6},
    ],
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match="rating is not a number") as caught:
        parse_rating(value, (1, 10))
    assert caught.value.fix


@pytest.mark.parametrize("value", [0.99, 10.01, -3, "11: beyond"])
def test_ratings_off_the_scale_are_refused(value: Any) -> None:
    with pytest.raises(RowError, match="outside the scale 1 to 10") as caught:
        parse_rating(value, (1, 10))
    assert "rating_min" in caught.value.fix


def test_confidence_may_be_missing_but_not_wrong() -> None:
    assert parse_confidence(None) is None
    assert parse_confidence("") is None
    assert parse_confidence("4: confident") == 4.0
    assert parse_confidence("4/5") == 4.0
    assert parse_confidence("4. Expert") == 4.0
    for value in (80, "4/10", "3-4", "4 (out of 7)"):
        assert parse_confidence(value) == Unknown("confidence", str(value))
    with pytest.raises(RowError, match="not a number"):
        parse_confidence([4])


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("accepted", "accepted"),
        ("Accept (Poster)", "accepted"),
        ("Accept: notable-top-5%", "accepted"),
        ("ICLR 2024 oral", "accepted"),
        ("Talk", "accepted"),
        ("Top-25%", "accepted"),
        ("rejected", "rejected"),
        ("Reject", "rejected"),
        ("Submitted to ICLR 2023", "rejected"),
        ("Invite to Workshop Track", "rejected"),
        ("withdrawn", "withdrawn"),
        ("Withdrawn_Submission", "withdrawn"),
        ("desk_rejected", "desk_rejected"),
        ("Desk Rejected Submission", "desk_rejected"),
        # What an area chair recommends, and words that hold "accept" and mean its opposite.
        ("5: Marginally below acceptance threshold", "rejected"),
        ("6: Marginally above acceptance threshold", "accepted"),
        ("Don't accept", "rejected"),
        ("Fails to be acceptable", "rejected"),
        ("Inacceptable", "rejected"),
        ("Accepted with minor revision", "accepted"),
        ("Reject and resubmit", "rejected"),
    ],
)
def test_decisions_as_venues_write_them(text: str, decision: str) -> None:
    assert parse_decision(text) == decision


@pytest.mark.parametrize("text", ["ICLR 2024", "Workshop on Behavioral Data", "Stalking Horses", "Conference"])
def test_a_venue_is_no_decision(text: str) -> None:
    assert decision_in(text) is None


def test_no_decision_is_none_and_an_unknown_one_is_said_to_be() -> None:
    assert parse_decision(None) is None
    assert parse_decision(" ") is None
    assert parse_decision("maybe") == Unknown("decision", "maybe")
    assert parse_decision("May be", {"may be": "withdrawn"}) == "withdrawn"


def test_text_keeps_newlines_tabs_and_addresses_and_loses_controls() -> None:
    assert clean_text(" a\r\nb\rc\td\x00\x1b[0m e@f.org\x85 \n", "text") == "a\nb\nc\td[0m e@f.org"
    with pytest.raises(RowError, match="surrogate"):
        clean_text("broken \ud800", "text")
    with pytest.raises(RowError, match="not text but int"):
        clean_text(3, "text")


@given(st.text())
def test_clean_text_is_idempotent_and_encodable(text: str) -> None:
    try:
        cleaned = clean_text(text, "text")
    except RowError:
        return
    assert clean_text(cleaned, "text") == cleaned
    assert "\x00" not in cleaned
    cleaned.encode()


@pytest.mark.parametrize("value", ["a\nb", "x" * 201, "a\u0085b\tc"])
def test_text_that_is_no_id_is_refused(value: str) -> None:
    with pytest.raises(RowError, match="is no id"):
        parse_id(value, "paper_id")


@pytest.mark.parametrize(
    "value", ["10.1000/abc.1", "arXiv:2401.00001v2", "https://openreview.net/forum?id=x&n=1", "Paper 12", "../x", ".a"]
)
def test_ids_are_kept_as_they_are_given(value: str) -> None:
    assert parse_id(value, "paper_id", "p-") == f"p-{value}"


def test_ids_take_a_prefix() -> None:
    assert parse_id("-1x2_y", "paper_id", "acl-") == "acl--1x2_y"
    with pytest.raises(RowError, match="empty paper_id"):
        parse_id("", "paper_id")
    assert parse_id(12, "paper_id", "b") == "b12"
    assert parse_id(12.0, "paper_id") == "12"  # as pandas writes it where another row has none
    for value in (True, 12.5, 2.0**53):
        with pytest.raises(RowError, match="not text but"):
            parse_id(value, "paper_id")


def test_excerpts_are_short_and_encodable() -> None:
    assert len(excerpt("x" * 10_000)) < 210
    excerpt("\ud800").encode()
    excerpt(b"\xff\xfe").encode()
