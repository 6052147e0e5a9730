"""Sources with one review a row, its paper repeated on each: JSON lines and CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import astuple, replace
from pydantic import Field, model_validator

from prefmill.core.config import later
from prefmill.core.files import digest_json
from prefmill.reviews.decision_words import DECISIONS
from prefmill.reviews.files import CSV, JSON_LINES, PlainRow, as_row, csv_rows, files_at, json_rows, none_is_plain
from prefmill.reviews.openreview_forms import as_sections
from prefmill.reviews.rows import (
    Item,
    PaperRow,
    RawRow,
    ReviewRow,
    RowError,
    RowProblem,
    Skipped,
    check_fields,
    clean_text,
    excerpt,
    parse_id,
    required_text,
)
from prefmill.reviews.source import FileSource, SourceConfig, listed_scores, sub_scores_in
from prefmill.reviews.splits import title_key
from prefmill.store.jsonl import may_repeat_keys

REQUIRED_FIELDS = {"title", "review_text", "rating"}
# decision_raw, the venue's own wording, is allowed beside the decision and not read.
VALID_FIELDS = REQUIRED_FIELDS | {
    "paper_id", "review_id", "abstract", "text", "decision", "decision_raw", "confidence", "venue", "sub_scores",
}  # fmt: skip
_PAPER_FIELDS = ("paper_id", "title", "abstract", "text", "decision", "venue")
_SAID_OF_PAPER = {"title", "abstract", "text", "decision"}  # by a row that is not of a review alone
_TEXTS = {"review_text", "abstract", "text"}
_Columns = dict[str, str | list[str]]
_SUB_SCORE_COLUMN = "sub_scores."
# What pandas takes for a missing value in a table.
_MISSING = frozenset({
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip
_NAMES_FIX = ", or give the file's own names in columns of this source, such as columns: {review_text: reviewText}"
_DECISION_FIX = (
    f"use one of {', '.join(DECISIONS)}, leave it empty, or say in decision_words of this source which it means"
)


class _TableSource(FileSource):
    """Rows with the fields of `VALID_FIELDS`; `columns` names the file's own field for one where the two differ.

    Several fields that make up a text are a list there. Papers and reviews may be rows of their own, with one paper_id.
    """

    columns: _Columns = later({})

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        unknown = sorted(name for name in self.columns if name not in VALID_FIELDS and not _is_sub_score(name))
        if unknown:
            raise ValueError(f"columns: no field '{unknown[0]}'; fields: {', '.join(sorted(VALID_FIELDS))}")
        if several := sorted(name for name, own in self.columns.items() if own != str(own) and name not in _TEXTS):
            raise ValueError(
                f"columns: '{several[0]}' is one value: name one column; {', '.join(sorted(_TEXTS))} may have more"
            )
        return self

    def named(self, values: dict[str, Any]) -> dict[str, Any]:
        """A row by the names of `VALID_FIELDS`; raises RowError where it lacks what `columns` names."""
        if not self.columns:
            return values
        taken = set(chain.from_iterable([own] if isinstance(own, str) else own for own in self.columns.values()))
        if missing := sorted(taken - values.keys()):
            raise RowError(f"columns names '{missing[0]}', which the file has not", "correct columns of this source")
        # The file's own field of a name that stands for another one is one more: it must not take that one's place.
        rest = {
            f"{name} (the file's own)" if name in self.columns else name: value
            for name, value in values.items()
            if name not in taken
        }
        return rest | {field: _cell(values, own) for field, own in self.columns.items()}


class JsonlSource(_TableSource):
    """One JSON object a line, or a file that is an array of them, plain or packed, or one row of Parquet.

    An object is a review with its paper, a paper with a list `reviews` of objects, or holds such objects by their ids.
    """

    format: Literal["jsonl"]

    def rows(self, source: int) -> Iterator[RawRow | PlainRow | RowProblem]:
        """The objects of each file, those of a paper once for each of its reviews."""
        means_otherwise = self.columns or self.html or self.rating_words or self.lower_is_better
        plain = none_is_plain if means_otherwise else _plain_reader(self)
        for path in files_at(self.path, JSON_LINES, or_else=(".json",)):
            for found in json_rows(path, source, plain):
                for row in _entries(found):
                    if isinstance(row, RawRow) and isinstance(row.values.get("reviews"), list):
                        yield from unfold(row)
                    else:
                        yield row

    def items(self, values: dict[str, Any]) -> list[Item]:
        """The row's paper and review."""
        return row_items(self.named(values), self)


class CsvSource(_TableSource):
    """A CSV file with a header, or Parquet.

    Cells end at commas, or at the semicolons or tabs of the header. Sub-scores are columns named `sub_scores.<name>`.
    """

    format: Literal["csv"]
    columns: _Columns = Field(default_factory=dict)

    @cached_property
    def missing_words(self) -> frozenset[str]:
        """Those of pandas, but for words that this source explains."""
        return _MISSING.difference(self.rating_words, self.confidence_words, self.decision_words)

    def rows(self, source: int) -> Iterator[RawRow | RowProblem]:
        """The rows of each file."""
        return (row for path in files_at(self.path, CSV) for row in csv_rows(path, source))

    def items(self, values: dict[str, Any]) -> list[Item]:
        """The row's paper and review."""
        named = self.named(values)
        # A CSV row cannot leave out a column: an empty cell is a review without that sub-score.
        sub_scores = {
            name.removeprefix(_SUB_SCORE_COLUMN): cell
            for name, cell in named.items()
            if _is_sub_score(name) and cell not in (None, "")
        }
        rest = {name: cell for name, cell in named.items() if not _is_sub_score(name)}
        listed = listed_scores(rest.get("sub_scores"))
        if not rest.get("confidence") and (name := next((name for name in listed if "confidence" in name.lower()), "")):
            rest["confidence"] = listed.pop(name)
        return row_items({**rest, "sub_scores": {**listed, **sub_scores}}, self)


def _cell(values: dict[str, Any], own: str | list[str]) -> Any:
    return values[own] if isinstance(own, str) else as_sections({name: clean_text(values[name], name) for name in own})


def row_items(values: dict[str, Any], config: SourceConfig, drawn: bool = False) -> list[Any]:
    """The paper and the review of one row, or the one that it has; raises RowError naming the field at fault."""
    names = values.keys()
    is_paper = "title" in names and not names & {"review_text", "rating"}
    if is_paper and (config.ignore_extra_fields or names <= VALID_FIELDS):
        return [_paper(list(map(values.get, _PAPER_FIELDS)), config, drawn), Skipped("row of a paper alone")]
    alone = {"paper_id", "review_text", "rating"} <= names and not names & _SAID_OF_PAPER
    required = REQUIRED_FIELDS - {"title"} if alone else REQUIRED_FIELDS
    check_fields(values, required, VALID_FIELDS, config.ignore_extra_fields, "row", _NAMES_FIX)
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


def _entries(row: RawRow | PlainRow | RowProblem) -> Iterator[RawRow | PlainRow | RowProblem]:
    """A row, or where it is an object of nothing but objects, as of papers by their ids, each of these."""
    values = row.values if isinstance(row, RawRow) else {}
    if not values or not all(isinstance(value, dict) for value in values.values()):
        yield row
        return
    yield from (RawRow(replace(row.place, item=excerpt(name)), value) for name, value in values.items())


def unfold(
    row: RawRow, beside: Callable[[dict[str, Any], int], dict[str, Any]] = lambda paper, _: paper
) -> Iterator[RawRow | RowProblem]:
    """A paper's reviews, each with what stands `beside` it: by default what the row says of the paper."""
    paper = {name: value for name, value in row.values.items() if name != "reviews"}
    for index, entry in enumerate(row.values["reviews"]):
        review = as_row(entry, replace(row.place, item=f"reviews[{index}]"))
        if isinstance(review, RawRow):
            more = beside(paper, index)
            said = review.values
            if both := sorted(name for name in more.keys() & said.keys() if more[name] != said[name]):
                reason = f"'{both[0]}' stands in the paper and in its review"
                yield RowProblem(review.place, reason, "rename one of the two, or leave it out", excerpt(entry))
                continue
            review.values.update(more)
        yield review


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


def _plain_reader(config: JsonlSource) -> Callable[[bytes], list[Item] | None]:
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


def _is_sub_score(name: str) -> bool:
    return name.startswith(_SUB_SCORE_COLUMN)
