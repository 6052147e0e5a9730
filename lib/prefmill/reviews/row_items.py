"""What a row with prefmill's own names for its fields means: its paper and its review."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import astuple

from prefmill.core.files import digest_json
from prefmill.reviews.decision_words import DECISIONS
from prefmill.reviews.nested import rating_path
from prefmill.reviews.rows import (
    Item,
    PaperRow,
    ReviewRow,
    RowError,
    Skipped,
    check_fields,
    clean_text,
    parse_id,
    required_text,
)
from prefmill.reviews.source import SourceConfig, sub_scores_in
from prefmill.reviews.splits import title_key
from prefmill.store.jsonl import may_repeat_keys

REQUIRED_FIELDS = {"title", "review_text", "rating"}
# decision_raw, the venue's own wording, is allowed beside the decision and not read.
VALID_FIELDS = REQUIRED_FIELDS | {
    "paper_id", "review_id", "abstract", "text", "decision", "decision_raw", "confidence", "venue", "sub_scores",
}  # fmt: skip
_PLAIN_FIELDS = sorted(VALID_FIELDS - {"sub_scores", "decision_raw"})
_PAPER_FIELDS = ("paper_id", "title", "abstract", "text", "decision", "venue")
_SAID_OF_PAPER = {"title", "abstract", "text", "decision"}  # by a row that is not of a review alone
_NAMES_FIX = ", or give the file's own names in columns of this source, such as columns: {%s}"
_OTHER_NAMES = {
    "title": ("paper_title", "submission_title"),
    "review_text": ("review", "comments", "comment", "review_content", "review_body", "main_review", "body"),
    "rating": ("score", "overall", "overall_score", "overall_rating", "overall_recommendation", "recommendation"),
}  # of fields that every row needs, as tables call them
_DECISION_FIX = (
    f"use one of {', '.join(DECISIONS)}, leave it empty, or say in decision_words of this source which it means"
)


def row_items(values: dict[str, Any], config: SourceConfig, drawn: bool = False) -> list[Any]:
    """The paper and the review of one row, or the one that it has; raises RowError naming the field at fault."""
    names = values.keys()
    is_paper = "title" in names and not names & {"review_text", "rating"}
    if is_paper and (config.ignore_extra_fields or names <= VALID_FIELDS):
        return [_paper(list(map(values.get, _PAPER_FIELDS)), config, drawn), Skipped("row of a paper alone")]
    alone = {"paper_id", "review_text", "rating"} <= names and not names & _SAID_OF_PAPER
    required = REQUIRED_FIELDS - {"title"} if alone else REQUIRED_FIELDS
    or_else = "" if required <= names else _NAMES_FIX % _named_otherwise(values)
    check_fields(values, required, VALID_FIELDS, config.ignore_extra_fields, "row", or_else)
    if wrapped := [name for name in _PLAIN_FIELDS if type(values.get(name)) is dict]:
        paths = ", ".join(f"{name}: {name}.{next(iter(values[name]), 'value')}" for name in wrapped)
        fix = f"name what is in it in columns of this source: columns: {{{paths}}}"
        raise RowError(f"{wrapped[0]} is an object", fix)
    paper = None if alone else _paper(list(map(values.get, _PAPER_FIELDS)), config, drawn)
    paper_id = paper.paper_id if paper else parse_id(values["paper_id"], "paper_id", config.id_prefix)
    confidence, unknown = config.confidence(values.get("confidence"))
    scores, in_words = sub_scores_in(values.get("sub_scores"), config)
    text, rating = required_text(values["review_text"], "review_text"), config.rating(values["rating"])
    review_id = values.get("review_id")
    review = ReviewRow(
        # Else by what it says, so that it is the same wherever its row stands; the same words again count once.
        review_id=parse_id(review_id, "review_id", config.id_prefix)
        if review_id not in (None, "")
        else f"{paper_id}-{_digest([text, rating, confidence, scores])}",
        paper_id=paper_id,
        text=text,
        rating=rating,
        scale=config.written_scale,
        confidence=confidence,
        venue=paper.venue if paper else _venue(values.get("venue"), config),
        sub_scores=scores,
    )
    return [*([paper] if paper else []), review, *unknown, *in_words]


def _named_otherwise(values: dict[str, Any]) -> str:
    """`columns` for such a row: the fields it has by other names, else a place for the name of one that it needs."""
    found = _spelled(values)
    has_rating = any(pair.startswith("rating:") for pair in found)
    # Ratings in a list may be those of all reviews beside each review's own.
    may_be_inside = isinstance(values.get("rating", []), dict | list) and not has_rating
    if may_be_inside and (path := rating_path(values)):
        found.append(path)
    return ", ".join(found) or f"{min(REQUIRED_FIELDS - values.keys())}: COLUMN"


def _spelled(values: dict[str, Any]) -> list[str]:
    """`rating: Rating` for each field that stands there in another spelling, or by another name that is often its."""
    own = {_letters(name): name for name in values if name not in VALID_FIELDS}
    # HotCRP's column `review` is the review's number.
    words = {_letters(name) for name in values if " " in str(values[name]).strip()}
    found = []
    for field in sorted(VALID_FIELDS - values.keys()):
        others = [_letters(name) for name in _OTHER_NAMES.get(field, ())]
        ways = [_letters(field), *(way for way in others if field != "review_text" or way in words)]
        found += [f"{field}: {own[way]}" for way in ways if way in own][:1]
    return found


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


class _PlainFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A row as nearly all are: its names and types are checked while it is decoded. `_PAPER_FIELDS` come first."""

    paper_id: str
    title: str
    abstract: str | UnsetType | None = UNSET
    text: str | UnsetType | None = UNSET
    decision: str | UnsetType | None = UNSET
    venue: str | UnsetType | None = UNSET
    review_id: str
    review_text: str
    rating: float
    confidence: float | UnsetType | None = UNSET
    sub_scores: dict[str, float] | UnsetType | None = UNSET
    decision_raw: str | UnsetType | None = UNSET


_decode_plain = msgspec.json.Decoder(_PlainFields).decode


def plain_reader(config: SourceConfig) -> Callable[[bytes], list[Item] | None]:
    """As `row_items` of a line, in half of the time; None where the line is at fault or needs a second look."""
    # Asked for here, as a configuration's attributes take long to find.
    (low, high), prefix, scale, previous = config.scale, config.id_prefix, config.written_scale, config.previous_paper

    def read(line: bytes) -> list[Item] | None:
        try:
            row: Any = astuple(_decode_plain(line))
            num_absent = row.count(UNSET)
            if num_absent > (row[-1] is UNSET):  # decision_raw is not looked at, and in few files
                row = [None if value is UNSET else value for value in row]
            *said, review_id, review_text, rating, confidence, scores, _ = row
            if (
                may_repeat_keys(line, len(row) - num_absent + len(scores or ()))
                or not low <= rating <= high
                or not (confidence is None or 1 <= confidence <= 5)
            ):
                return None
            paper = previous[1] if previous and previous[0] == said else _paper(said, config, drawn=False)
            if not scores or len(scores) > 1:
                scores = dict(sorted(scores.items())) if scores else {}
            review_id, text = parse_id(review_id, "review_id", prefix), required_text(review_text, "review_text")
            return [
                paper,
                ReviewRow(review_id, paper.paper_id, text, rating + 0.0, confidence, paper.venue, scores, scale),
            ]
        except ValueError:  # a RowError as well: `row_items` says what is wrong
            return None

    return read


def _paper(said: list[Any], config: SourceConfig, drawn: bool) -> PaperRow:
    """The paper of a row that has `said` this in its `_PAPER_FIELDS`.

    It is the one of the row before where that says the same, as each review repeats its paper.
    """
    if config.previous_paper and config.previous_paper[0] == said:
        known: PaperRow = config.previous_paper[1]
        return known
    paper_id, title, abstract, text, decided, venue = said
    decision, unknown = config.decision(decided)
    if unknown:
        raise RowError(f"unknown {unknown[0]}", _DECISION_FIX)
    title = required_text(title, "title")
    paper = PaperRow(
        # Two spellings of a title are one paper, so they have one id too.
        paper_id=parse_id(
            paper_id if paper_id not in (None, "") else _digest(title_key(title)), "paper_id", config.id_prefix
        ),
        title=title,
        abstract=clean_text(abstract, "abstract"),
        text=clean_text(text, "text"),
        decision=decision,
        venue=_venue(venue, config),
        drawn=drawn,
    )
    # In place, as a configuration is frozen.
    config.previous_paper[:] = [said, paper]
    return paper


def _venue(value: Any, config: SourceConfig) -> str:
    return clean_text(value, "venue") or config.venue


def _digest(said: Any) -> str:
    return digest_json(said)[:16]
