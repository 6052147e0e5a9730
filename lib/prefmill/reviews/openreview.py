"""OpenReview note dumps, API 1 and 2: submissions, their official reviews and decisions.

A dump is what the API returns (JSON lines, an array, or an object with `notes`); replies may stand by themselves or
inside a submission's `details`. Review forms differ from venue to venue, so no content field is unknown: numbers with
a label are sub-scores, other text is a section of the review.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from prefmill.core.records import Decision
from prefmill.reviews.files import as_row, json_rows
from prefmill.reviews.rows import (
    DecisionRow,
    Item,
    PaperRow,
    RawRow,
    ReviewRow,
    RowError,
    RowProblem,
    Skipped,
    clean_text,
    decision_in,
    parse_confidence,
    parse_decision,
    parse_id,
    parse_score,
    required_text,
)
from prefmill.reviews.source import FileSource

_REVIEWS = {"official_review", "review"}
_DECISIONS = {"decision", "acceptance_decision"}
_RETRACTIONS: dict[str, Decision] = {
    "withdraw": "withdrawn",
    "withdrawal": "withdrawn",
    "desk_reject": "desk_rejected",
    "desk_rejection": "desk_rejected",
}
# Answers about the reviewer or the process, not about the paper.
_NOT_SECTIONS = re.compile(
    r"title|confidence|code_of_conduct|first_time_reviewer|experience_assessment|review_assessment.*|"
    r"flag_for_ethics_review|.*acknowledg.*|.*_id"
)
_SUB_SCORE = re.compile(r"\s*\d+(?:\.\d+)?\s*(?:[:=].*|[a-z]+)?\s*")  # "3 good", "4: clear", "2"
_DEFAULT_RATING_FIELDS = ("rating", "recommendation", "overall_recommendation", "overall_assessment", "overall_rating")
_VENUE_GROUP = re.compile(r"(\w+)\.\w+/(\d{4})/")


class OpenReviewSource(FileSource):
    """A dump of notes; the first of `rating_fields` that a review has is its rating, `exclude_fields` are not read."""

    format: Literal["openreview_v1", "openreview_v2"]
    rating_fields: tuple[str, ...] = Field(_DEFAULT_RATING_FIELDS, min_length=1)
    exclude_fields: tuple[str, ...] = ()

    def rows(self, source: int) -> Iterator[RawRow | RowProblem]:
        """The notes, each submission followed by the replies inside it."""
        for row in json_rows(self.path, source):
            if isinstance(row, RowProblem):
                yield row
            else:
                yield from _unfold(row)

    def items(self, values: dict[str, Any]) -> list[Item]:
        """What one note is; notes of other kinds are skipped."""
        names = _invitation_names(values)
        if not names:
            raise RowError("not a note: no invitation", "dump whole notes, with id, forum, invitation(s) and content")
        if values.get("ddate"):
            return [Skipped("deleted note")]
        content = _content(values, wrapped=self.format == "openreview_v2")
        if values.get("forum", values.get("id")) == values.get("id"):
            return [self._paper(values, content, names)]
        if names & _REVIEWS:
            return [self._review(values, content)]
        decision = _decision(content, names)
        if decision is not None:
            return [DecisionRow(self._paper_id(values), decision)]
        return [Skipped(min(names))]

    def _paper(self, note: Mapping[str, Any], content: Mapping[str, Any], names: set[str]) -> PaperRow:
        return PaperRow(
            paper_id=parse_id(note.get("id"), "id", self.id_prefix),
            title=required_text(content.get("title"), "content.title"),
            abstract=clean_text(content.get("abstract"), "content.abstract"),
            decision=_standing(content, names),
            venue=self.venue or _venue(note),
        )

    def _review(self, note: Mapping[str, Any], content: Mapping[str, Any]) -> ReviewRow:
        rating_field = next((name for name in self.rating_fields if name in content), None)
        if rating_field is None:
            raise RowError(
                f"review without a rating; its fields: {', '.join(sorted(content))}",
                "name the field in rating_fields of this source, or remove the note",
            )
        unread = {*self.rating_fields, *self.exclude_fields}
        scores, sections = _split_content({name: value for name, value in content.items() if name not in unread})
        return ReviewRow(
            review_id=parse_id(note.get("id"), "id", self.id_prefix),
            paper_id=self._paper_id(note),
            text=required_text(_join(sections), "review"),
            rating=self.rating(content[rating_field]),
            scale=self.scale,
            confidence=parse_confidence(content.get("confidence")),
            venue=self.venue or _venue(note),
            sub_scores=scores,
        )

    def _paper_id(self, note: Mapping[str, Any]) -> str:
        return parse_id(note.get("forum"), "forum", self.id_prefix)


def _unfold(row: RawRow) -> Iterator[RawRow | RowProblem]:
    details = row.values.get("details")
    yield dataclasses.replace(row, place=dataclasses.replace(row.place, item=_note_name(row.values)))
    if isinstance(details, dict):
        replies = details.get("replies") or details.get("directReplies") or []
        for reply in replies if isinstance(replies, list) else [replies]:
            name = _note_name(reply) if isinstance(reply, dict) else "reply"
            yield as_row(reply, dataclasses.replace(row.place, item=name))


def _note_name(note: Mapping[str, Any]) -> str:
    return f"note {note.get('id')}"


def _invitation_names(note: Mapping[str, Any]) -> set[str]:
    """The last parts of a note's invitations, in lower case: `official_review`, `decision`, ..."""
    invitations = note.get("invitations") or [note.get("invitation")]
    return {str(item).rsplit("/", 1)[-1].lower() for item in invitations if item} - {"edit"}


def _content(note: Mapping[str, Any], wrapped: bool) -> dict[str, Any]:
    """The note's content by field, unwrapped where API 2 wraps each value."""
    content = note.get("content")
    if not isinstance(content, dict):
        raise RowError("note without content", "dump whole notes, with id, forum, invitation(s) and content")
    is_wrapped = any(isinstance(value, dict) and "value" in value for value in content.values())
    if content and is_wrapped != wrapped:
        right = "openreview_v2" if is_wrapped else "openreview_v1"
        raise RowError(f"the content is in the form of {right}", f"set format: {right} for this source")
    if not wrapped:
        return content
    return {name: value.get("value") for name, value in content.items() if isinstance(value, dict)}


def _standing(content: Mapping[str, Any], names: set[str]) -> Decision | None:
    """What a submission's own fields say of its fate."""
    group = str(content.get("venueid") or "").rsplit("/", 1)[-1]
    if group == "Submission":  # under review
        return None
    for text in (*sorted(names), group, str(content.get("venue") or "")):
        decision = decision_in(text)
        if decision is not None:
            return decision
    return None


def _decision(content: Mapping[str, Any], names: set[str]) -> Decision | None:
    for name in sorted(names & _RETRACTIONS.keys()):
        return _RETRACTIONS[name]
    if not names & _DECISIONS:
        return None
    decision = parse_decision(content.get("decision") or content.get("recommendation"))
    if decision is None:
        raise RowError("decision note without a decision", "fill in content.decision, or remove the note")
    return decision


def _split_content(content: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """A review's sub-scores and its sections of text, by field."""
    scores, sections = {}, {}
    for name, value in content.items():
        if _NOT_SECTIONS.fullmatch(name) or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) or (isinstance(value, str) and _SUB_SCORE.fullmatch(value)):
            scores[name] = parse_score(value, f"content.{name}")
        elif isinstance(value, str) and value.strip():
            sections[name] = clean_text(value, f"content.{name}")
    return dict(sorted(scores.items())), sections


def _join(sections: Mapping[str, str]) -> str:
    if len(sections) == 1:
        return next(iter(sections.values()))
    return "\n\n".join(f"## {name.replace('_', ' ').capitalize()}\n{text}" for name, text in sections.items())


def _venue(note: Mapping[str, Any]) -> str:
    """`ICLR 2024` from an invitation of ICLR.cc/2024/Conference."""
    invitations = note.get("invitations") or [note.get("invitation")]
    match = _VENUE_GROUP.match(str(invitations[0]))
    return f"{match[1]} {match[2]}" if match else str(invitations[0]).split("/-/", 1)[0]
