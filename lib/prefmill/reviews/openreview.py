"""OpenReview note dumps, API 1 and 2: submissions, their official reviews and decisions.

A dump is what the API returns (JSON lines, an array, or an object with `notes`); replies may stand by themselves or
inside a submission's `details`. Review forms differ from venue to venue: text in a field that nobody named is a
section of the review, a number there is a sub-score, so that nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from msgspec import UNSET
from msgspec.structs import replace
from pydantic import Field, model_validator

from prefmill.core.records import Decision
from prefmill.reviews import openreview_forms as forms
from prefmill.reviews.files import JSON, PlainRow, as_row, files_at, json_rows
from prefmill.reviews.rows import (
    DecisionRow,
    DeletedRow,
    Item,
    PaperRow,
    RawRow,
    ReviewRow,
    RowError,
    RowProblem,
    Skipped,
    Unknown,
    clean_text,
    is_number,
    is_one_number,
    parse_id,
    parse_score,
    required_text,
)
from prefmill.reviews.source import FileSource

_RETRACTIONS: dict[str, Decision] = {
    "withdraw": "withdrawn",
    "withdrawal": "withdrawn",
    "desk_reject": "desk_rejected",
    "desk_rejection": "desk_rejected",
}
# Answers about the reviewer or the process, not about the paper.
_NOT_SECTIONS = re.compile(
    r"title|confidence|code_of_conduct|first_time_reviewer|experience_assessment|review_assessment.*|"
    r"flag_for_ethics_review|ethical_review_flag|ethics_expertise_needed|.*acknowledg.*|.*_id"
)
# The same in ARR's and ICML's words, counted as they came into reviews for long.
_ABOUT_REVIEWER = re.compile(
    r"(impact_of_)?knowledge_of_.*|.*author_identity.*|.*certification|.*_compliance|compliance_with_.*"
)
# Of a rating that changed, say: as a section it would tell the model and the judge what it is to be.
_RATING_NAME = re.compile(r"(\w+_)?rating(_\w+)?|(\w+_)?recommendation(_(before|after)_\w+)?")
_RATING_TEXT = re.compile(r"\s*[+-]?\d+(\.\d+)?\s*([:(/=-][^\n]{0,100})?")
# Not of workshops and tracks, whose reviewers and scales are others.
_VENUE_GROUP = re.compile(r"(\w+)\.\w+/(\d{4})/(?:conference/|-/)", re.IGNORECASE)
_FORUM = re.compile(r"forum\?id=([\w-]+)")  # by which a commitment names the paper as it was reviewed
_OF_NOTE = {"invitation", "invitations", "content"}
_OF_ONE_PAPER = re.compile(r"/(submission|paper)\d+(/.*)?$", re.IGNORECASE)


class OpenReviewSource(FileSource):
    """A dump of notes, or a folder of dumps such as one a forum; a `preset` sets the keys of one venue.

    The first of `rating_fields`, `confidence_fields` and `decision_fields` that a note has counts; `exclude_fields`
    are not read. Names of fields and invitations are compared without case.
    """

    format: Literal["openreview_v1", "openreview_v2"]
    preset: forms.Preset | None = None
    review_invitations: list[str] = Field(list(forms.REVIEW_INVITATIONS), min_length=1)
    decision_invitations: list[str] = list(forms.DECISION_INVITATIONS)
    decision_fields: list[str] = Field(list(forms.DECISION_FIELDS), min_length=1)
    rating_fields: list[str] = Field(list(forms.RATING_FIELDS), min_length=1)
    confidence_fields: list[str] = list(forms.CONFIDENCE_FIELDS)
    sub_score_fields: list[str] = list(forms.SUB_SCORE_FIELDS)
    exclude_fields: list[str] = []

    # Before the fields are checked, so that a key beside the preset replaces the preset's value.
    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, values: Any) -> Any:
        return {**forms.PRESETS.get(values.get("preset"), {}), **values} if isinstance(values, dict) else values

    def made_otherwise(self) -> dict[str, Any]:
        """Corpora are read again in which old notes or a form's answers counted, or a workshop as its conference."""
        return {
            **super().made_otherwise(),
            "notes": "newest, without the form's own answers and policies, of their own venue",
        }

    def rows(self, source: int) -> Iterator[RawRow | PlainRow | RowProblem]:
        """The notes, each submission followed by the replies inside it."""
        for path in files_at(self.path, JSON):
            for row in json_rows(path, source):
                if isinstance(row, RawRow):
                    yield from _unfold(row)
                else:
                    yield row

    def items(self, values: dict[str, Any]) -> list[Item]:
        """What one note is; notes of other kinds are skipped."""
        names = _invitation_names(values)
        if not names:
            raise RowError("not a note: no invitation", "dump whole notes, with id, forum, invitation(s) and content")
        if values.get("ddate"):
            note_id = parse_id(values.get("id"), "id", self.id_prefix)
            return [DeletedRow(note_id, _date(values)), Skipped("deleted note")]
        if values.get("referent") not in (None, "", values.get("id")):  # API 1 lists what a note said before beside it
            return [Skipped("earlier version of a note")]
        content = _content(values)
        # In OpenReview a submission is its own forum; each reply has the submission's id there.
        if values.get("forum", values.get("id")) == values.get("id"):
            return self._paper(values, content, names)
        if names & _lower(self.review_invitations):
            return self._review(values, content)
        return self._decision(values, content, names) or [self._passed_over(content, names)]

    def _paper(self, note: Mapping[str, Any], content: Mapping[str, Any], names: set[str]) -> list[Item]:
        found = forms.standing(content, _group(note), names, self.decisions_by_word)
        link = _FORUM.search(str(content.get("paper_link")))
        paper = PaperRow(
            paper_id=parse_id(note.get("id"), "id", self.id_prefix),
            title=required_text(content.get("title"), "content.title"),
            abstract=clean_text(content.get("abstract"), "content.abstract"),
            decision=found.decision,
            venue=self.venue or _venue(note),
            date=_date(note),
            reviewed_as=f"{self.id_prefix}{link[1]}" if link else "",
        )
        accepted = [DecisionRow(paper.paper_id, "accepted", rank=1)] if found.accepted_group else []
        return [paper, *accepted, *([Unknown("venue", found.unknown)] if found.unknown else [])]

    def _review(self, note: Mapping[str, Any], content: Mapping[str, Any]) -> list[Item]:
        if len(content) < len(note["content"]):
            raise RowError("two fields have one name, case aside", "rename or remove one of them")
        rating = _first(content, self.rating_fields)
        if rating is None:
            raise RowError(
                f"review without a rating; its fields: {', '.join(sorted(content))}",
                "name the field in rating_fields of this source, or remove the note",
            )
        confidence, unknown = self.confidence(_first(content, self.confidence_fields))
        read = _lower((*self.rating_fields, *self.confidence_fields, *self.exclude_fields))
        rest = {name: value for name, value in content.items() if name not in read}
        scores, sections, left_out = _split_content(rest, _lower(self.sub_score_fields))
        for name, value in _given(content, self.rating_fields)[1:]:  # behind the one that was taken
            if is_one_number(str(value)):
                scores[name] = parse_score(value, f"content.{name}")
            else:
                left_out.append(Unknown("second rating in words", name))
        review = ReviewRow(
            review_id=parse_id(note.get("id"), "id", self.id_prefix),
            paper_id=self._paper_id(note),
            text=required_text(forms.as_sections(sections), "review"),
            rating=self.rating(rating),
            scale=self.written_scale,
            confidence=confidence,
            venue=self.venue or _venue(note),
            sub_scores=dict(sorted(scores.items())),
            date=UNSET if (date := _date(note)) is None else date,
        )
        return [review, *unknown, *left_out]

    def _decision(self, note: Mapping[str, Any], content: Mapping[str, Any], names: set[str]) -> list[Item]:
        """The decision that a note brings, if it is of a kind that does."""
        for name in sorted(names & _RETRACTIONS.keys()):
            return [self._decision_row(note, _RETRACTIONS[name])]
        if not names & _lower(self.decision_invitations):
            return []
        said = _first(content, self.decision_fields)
        by_chair = forms.META_REVIEW in names
        if said is None and by_chair:  # most venues' meta-reviews leave the decision to its own note
            return []
        if said is None:
            raise RowError(
                f"decision note without a decision; its fields: {', '.join(sorted(content))}",
                "name the field in decision_fields of this source, fill it in, or remove the note",
            )
        decision, unknown = self.decision(said)
        return unknown if decision is None else [self._decision_row(note, decision, rank=0 if by_chair else 2)]

    def _passed_over(self, content: Mapping[str, Any], names: set[str]) -> Item:
        """A note of another kind; what has a review's grades, such as an `Emergency_Review`, is told."""
        is_rated = all(_given(content, wanted) for wanted in (self.rating_fields, self.confidence_fields))
        # min: a set of strings has another order in every process, and summaries would differ.
        if is_rated and not names & _lower(self.decision_invitations):
            return Unknown("rated note that review_invitations does not name", min(names))
        return Skipped(min(names))

    def _decision_row(self, note: Mapping[str, Any], decision: Decision, rank: int = 2) -> DecisionRow:
        return DecisionRow(self._paper_id(note), decision, rank, _date(note), f"{self.id_prefix}{note.get('id')}")

    def _paper_id(self, note: Mapping[str, Any]) -> str:
        return parse_id(note.get("forum"), "forum", self.id_prefix)


def _date(note: Mapping[str, Any]) -> float | None:
    """When this version of a note was made, as the API counts; `tmdate` is true where `mdate` may be set by hand."""
    return next((note[name] for name in ("tmdate", "mdate") if is_number(note.get(name))), None)


def _lower(names: Sequence[str]) -> set[str]:
    return {name.lower() for name in names}


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of `names` that has one."""
    return next((value for _, value in _given(fields, names)), None)


def _given(fields: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, Any]]:
    return [(name.lower(), fields[name.lower()]) for name in names if fields.get(name.lower()) not in (None, "")]


def _unfold(row: RawRow) -> Iterator[RawRow | RowProblem]:
    """A note and those in it, or those in what holds notes, such as an object of forums by their ids."""
    found, inside = row.values, list(_objects_in(row.values))
    is_note = bool(found.keys() & _OF_NOTE)
    if is_note or not inside:
        yield replace(row, place=replace(row.place, item=f"note {found.get('id')}"))
    if is_note:
        # The API uses the name that was asked for; what else is there is of the form, or what notes said before.
        details = found.get("details")
        replies = (details.get("replies") or details.get("directReplies") or []) if isinstance(details, dict) else []
        inside = [*filter(_holds_note, inside), *(replies if isinstance(replies, list) else [replies])]
    for entry in inside:
        inner = as_row(entry, replace(row.place, item="reply" if is_note else None))
        yield from [inner] if isinstance(inner, RowProblem) else _unfold(inner)


def _objects_in(holder: Any) -> Iterator[dict[str, Any]]:
    """The objects in a list or an object, those in lists too, but for a note's own parts."""
    parts = holder if isinstance(holder, list) else [holder[key] for key in holder if key not in ("content", "details")]
    for part in parts:
        yield from [part] if isinstance(part, dict) else _objects_in(part) if isinstance(part, list) else []


def _holds_note(value: dict[str, Any]) -> bool:
    return bool(value.keys() & _OF_NOTE) or any(map(_holds_note, _objects_in(value)))


def _invitation_names(note: Mapping[str, Any]) -> set[str]:
    """The last parts of a note's invitations, in lower case: `official_review`, `decision`, ..."""
    invitations = note.get("invitations") or [note.get("invitation")]
    # API 2 adds `/-/Edit` to notes that a venue edited, whatever their kind.
    return {str(item).rsplit("/", 1)[-1].lower() for item in invitations if item} - {"edit"}


def _content(note: Mapping[str, Any]) -> dict[str, Any]:
    """The note's content by field in lower case, unwrapped where API 2 wraps each value."""
    content = note.get("content")
    if not isinstance(content, dict):
        raise RowError("note without content", "dump whole notes, with id, forum, invitation(s) and content")
    # Told by each value, as a dump may hold notes of both; a value that is hidden has its readers alone.
    return {name.lower(): value.get("value", _shown(value)) if isinstance(value, dict) else value
            for name, value in content.items()}  # fmt: skip


def _shown(value: dict[str, Any]) -> dict[str, Any] | None:
    return None if value.keys() <= {"readers", "writers", "signatures"} else value


def _split_content(
    content: Mapping[str, Any], sub_scores: set[str]
) -> tuple[dict[str, float], dict[str, str], list[Item]]:
    """A review's sub-scores and its sections of text, by field, and what has no place among them."""
    scores: dict[str, float] = {}
    sections: dict[str, str] = {}
    left_out: list[Item] = []
    for name, value in content.items():
        # bool is asked for first: to Python True is an int, and a ticked box would be a sub-score of 1.
        if _NOT_SECTIONS.fullmatch(name) or isinstance(value, bool) or value is None:
            continue
        if isinstance(value, (int, float)) or (name in sub_scores and is_one_number(str(value))):
            scores[name] = parse_score(value, f"content.{name}")
            continue
        text = _section(name, value)
        if _ABOUT_REVIEWER.fullmatch(name):
            left_out.append(Skipped("answer about the reviewer"))
        elif text and _RATING_NAME.fullmatch(name) and _RATING_TEXT.fullmatch(text):
            left_out.append(Unknown("rating that rating_fields does not name", name))
        elif text is None:
            left_out.append(Unknown("field", name))
        elif not forms.says_nothing(text):
            sections[name] = text
        elif text:
            left_out.append(Skipped("section without content (N/A, yes, no)"))
    return scores, sections, left_out


def _section(name: str, value: Any) -> str | None:
    """Text, or the lines of a list; None for anything else."""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        return None
    return "\n".join(filter(None, (clean_text(part, f"content.{name}") for part in parts)))


def _group(note: Mapping[str, Any]) -> str:
    """The venue's group, such as `ICLR.cc/2024/Conference`."""
    invitations = note.get("invitations") or [note.get("invitation")]
    # An invitation may be of one submission (`.../Paper7/-/Revision`): the shortest group is the venue's.
    return str(note.get("domain") or min((str(item).split("/-/", 1)[0] for item in invitations if item), key=len))


def _venue(note: Mapping[str, Any]) -> str:
    """`ICLR 2024` from an invitation of ICLR.cc/2024/Conference."""
    invitations = note.get("invitations") or [note.get("invitation")]
    match = _VENUE_GROUP.match(str(invitations[0]))
    # Else the group, less the submission: with a venue for each paper, quantiles of a venue would say nothing.
    return f"{match[1]} {match[2]}" if match else _OF_ONE_PAPER.sub("", str(invitations[0]).split("/-/", 1)[0])
