"""What a source yields: papers, decisions and reviews with checked values, and the rows that had none."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from prefmill.core.errors import nearest
from prefmill.core.records import Decision
from prefmill.reviews.decision_words import decision_in
from prefmill.reviews.markup import without_people
from prefmill.reviews.scale import Scale

_EXCERPT_CHARS, _SEARCHED_CHARS = 200, 2000
_MAX_ID_CHARS = 200  # longer text is no id but another column
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newline and tab
# Read by bytes.translate, the quickest way to ask: 0 for each of these in ASCII, and anything else stays.
_CONTROL_TO_ZERO = bytes(0 if _CONTROL.match(chr(code)) else code for code in range(256))
_PLAIN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}")  # nearly every id, known to be fit at once
_NOT_IN_ID = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# "6: marginally above", "3 good", "3. Good", "7/10", but not "6th", "4.5.1" or "6,5"
_LEADING_NUMBER = re.compile(r"\s*([+\u2212-]?\d+(?:\.\d+)?)(?!\w|\.\S|,\d)")
# "6-7", "5 -> 6", "5 (raised to 6)", "7 1/2", "6%", a sheet's "6-Jul", "6:00", and "4/5", where 5 must end the scale
_SECOND_NUMBER = re.compile(
    r"\s*(?:(?P<of>[/\u2044\u2215]|[(\[]?(?:out )?of\b)|[-=]*>+|-+|[\u2010-\u2015\u2212→⇒±~,;&|]|(?:to|or|and)\b"
    r"|[^\d\n]*\b(?:rais|lower|increas|decreas|chang|updat)ed to\b)"
    r"\s*(?P<number>[+-]?\d+(?:\.\d+)?)|\s*(?P<percent>%)|\s+[\d¼½¾]|:\d"
    r"|-(?i:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)(?:-\d+)?\s*$"
)
_DECIMAL_COMMA = re.compile(r"\s*[+\u2212-]?\d+,\d+(?![\w.,])")
_NUMBERS = (int, float)  # the types: to isinstance a bool is an int, and `true` would be a rating of 1
_MAX_NUMBER = sys.float_info.max
_FLOATS_SKIP = 2**53  # from here on, two whole numbers may be one float


class RowError(ValueError):
    """A row that cannot be used: what is wrong with it and what would fix it."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason, fix)  # both, as worker processes send these back pickled
        self.reason, self.fix = reason, fix

    def __str__(self) -> str:
        return self.reason


# Structs, as each row of a source makes one of each: a frozen dataclass takes ten times as long to make.
class Place(msgspec.Struct, frozen=True):
    """Where a row came from: the source's position in the configuration, its file, and line or item there."""

    source: int
    file: str
    line: int | None = None
    item: str | None = None

    def __str__(self) -> str:
        line = f"{self.file}:{self.line}" if self.line is not None else self.file
        return f"{line} ({self.item})" if self.item else line

    @property
    def brief(self) -> str:
        """The place without folders, for text that must not depend on where a file lies."""
        return str(msgspec.structs.replace(self, file=Path(self.file).name))


class PaperRow(msgspec.Struct, frozen=True):
    """What one row says of a paper; empty text and None mean that it does not say."""

    paper_id: str
    title: str
    abstract: str = ""
    text: str = ""
    decision: Decision | None = None
    venue: str = ""
    drawn: bool = False  # generated papers can have their page and figure drawn
    date: float | None = None  # of this version, where the source tells: the newest counts
    reviewed_as: str = ""  # the id under which it was reviewed, of a paper that was then committed to a venue


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """A decision that comes apart from the paper, for papers whose own row says none; the highest `rank` holds."""

    paper_id: str
    decision: Decision
    rank: int = 2  # a decision's note; 1: the venue's own group as venueid; 0: a meta-review's recommendation
    date: float | None = None
    note_id: str = ""  # of the note that says so: with it deleted, it is not said


class ReviewRow(msgspec.Struct, frozen=True):
    """A review as its line of the corpus is encoded; `rating` within `scale`, its source's, unset for 1 to 10."""

    review_id: str
    paper_id: str
    text: str
    rating: float
    confidence: float | None = None
    venue: str = ""
    sub_scores: dict[str, float] = {}
    scale: Scale | msgspec.UnsetType = msgspec.UNSET  # no key on 1 to 10, as in corpora before rows kept their scale
    date: float | msgspec.UnsetType = msgspec.UNSET  # of this version, where the source tells; no part of the corpus


@dataclass(frozen=True, slots=True)
class DeletedRow:
    """A note that was deleted by this date: older versions of it do not count, nor reviews of a paper that it was."""

    note_id: str
    date: float | None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is no paper, decision or review and need not be, by the name its source gives it."""

    kind: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A value whose meaning is not known and that its row can do without: left out, counted and named."""

    field: str
    value: str

    def __str__(self) -> str:
        return f"{spelled(self.field)} {excerpt(self.value)!r}"


Item = PaperRow | DecisionRow | ReviewRow | DeletedRow | Skipped | Unknown


@dataclass(frozen=True, slots=True)
class RowProblem:
    """A row that cannot be used."""

    place: Place
    reason: str
    fix: str
    excerpt: str


class RawRow(msgspec.Struct, frozen=True):
    """One raw row as its file holds it, before its meaning is known."""

    place: Place
    values: dict[str, Any]
    may_hold_nan: bool = True


def excerpt(raw: Any) -> str:
    """The beginning of a row, to recognise it by, without people's names and addresses: it goes into logs."""
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else str(raw)
    text = without_people(spelled(text[:_SEARCHED_CHARS]))
    return text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "..."


def spelled(text: str) -> str:
    """`text` with escapes for what no UTF-8 file can take (half of a surrogate pair) and what a terminal would obey."""
    shown = text.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), shown)


def check_fields(
    values: Mapping[str, Any], required: set[str], valid: set[str], ignore_extra: bool, what: str, or_else: str = ""
) -> None:
    """Raises RowError when a required field is missing or, unless they are ignored, an unknown one is there."""
    # Two set comparisons pass nearly every row; only faulty rows pay for the rest.
    if required <= values.keys() <= valid:
        return
    if missing := sorted(required - values.keys()):
        reason = f"missing in the {what}: {', '.join(missing)}"
        raise RowError(reason, f"add what is missing, or remove the {what}{or_else}")
    if not ignore_extra and (extra := sorted(values.keys() - valid)):
        hint = nearest(extra[0], sorted(valid))
        raise RowError(
            f"unknown field '{extra[0]}'{hint}; valid fields: {', '.join(sorted(valid))}",
            "rename or remove the field, or set ignore_extra_fields: true for this source",
        )


def clean_text(value: object, name: str) -> str:
    """Text without surrounding space and control characters (newline and tab stay); None is no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{name} is not text but {type(value).__name__}", f"write {name} as text")
    if value.isascii() and 0 not in value.encode().translate(_CONTROL_TO_ZERO):
        return value.strip()
    value = _CONTROL.sub("", value.replace("\r\n", "\n").replace("\r", "\n"))
    try:
        value.isascii() or value.encode()  # nearly all is ASCII, and that is known without a copy
    except UnicodeEncodeError:
        raise half_a_pair(name) from None
    return value.strip()


def half_a_pair(what: str) -> RowError:
    """The error of text that no UTF-8 file can hold."""
    return RowError(f"{what} holds half of a surrogate pair", "write the character whole, as UTF-8")


def required_text(value: Any, name: str) -> str:
    """As `clean_text`; raises RowError when nothing is left that can be seen."""
    text = clean_text(value, name)
    if not text or not (text.isascii() or any(unicodedata.category(letter)[0] not in "CZ" for letter in text)):
        raise RowError(f"empty {name}", f"fill in {name}, or remove the row")
    return text


def parse_id(value: Any, name: str, prefix: str = "") -> str:
    """An id as it is given: text of one line, such as `10.1000/abc` or an address."""
    if isinstance(value, str) and _PLAIN_ID.fullmatch(value):
        return prefix + value
    # bool is an int to isinstance, and `true` no id. pandas makes floats of whole numbers where one is missing.
    is_whole = type(value) is int or (type(value) is float and value.is_integer() and abs(value) < _FLOATS_SKIP)
    identifier = f"{value:.0f}" if is_whole else required_text(value, name)
    if _NOT_IN_ID.search(identifier) or len(identifier) > _MAX_ID_CHARS:
        raise RowError(
            f"{name} {excerpt(identifier)!r} is no id", f"use at most {_MAX_ID_CHARS} characters, all on one line"
        )
    return prefix + identifier


def parse_score(value: Any, name: str) -> float:
    """A finite number, or the one that text such as `6: marginally above the threshold` begins with."""
    match = _LEADING_NUMBER.match(value) if isinstance(value, str) else None
    number = float(match[1].replace("\u2212", "-")) if match else value
    if not is_number(number):
        raise RowError(f"{name} is not a number: {excerpt(repr(value))}", f"give {name} a number, or remove the row")
    return float(number) + 0.0  # no -0, whose line in the corpus would be another than that of 0


def is_number(value: Any) -> bool:
    """Whether `value` is a number, neither NaN nor infinite, that a float can hold."""
    return type(value) in _NUMBERS and -_MAX_NUMBER <= value <= _MAX_NUMBER


def is_one_number(text: str, highest: float | None = None) -> bool:
    """Whether `text` begins with a number and not with two (3-4), but for its scale's end (4/5), `highest` if given."""
    number = _LEADING_NUMBER.match(text)
    second = _SECOND_NUMBER.match(text, number.end()) if number else None
    end = second and (100 if second["percent"] else float(second["number"]) if second["of"] else None)
    return number is not None and (second is None or (end is not None and highest in (None, end)))


def with_point(value: Any) -> Any:
    """`value` with a point where it is text that begins with a number with a decimal comma, such as 6,5."""
    return value.replace(",", ".", 1) if isinstance(value, str) and _DECIMAL_COMMA.match(value) else value


def parse_rating(value: Any, scale: Scale, words: Mapping[str, float] | None = None) -> float:
    """A rating within `scale`; `words` gives the number of a rating in words."""
    if words and type(value) in _NUMBERS:
        value = words.get(f"{value:g}", value)
    rating = parse_score(_as_number(value, scale, words or {}), "rating")
    if not scale[0] <= rating <= scale[1]:
        raise RowError(
            f"rating {rating:g} is outside the scale {scale[0]:g} to {scale[1]:g}",
            "correct the rating, or set rating_min and rating_max of this source to its venue's scale",
        )
    return rating


def _as_number(value: Any, scale: Scale, words: Mapping[str, float]) -> Any:
    """What `parse_score` can read; raises RowError, with the key to set, for text that is no rating."""
    if not isinstance(value, str):
        return value
    if (number := words.get(word_key(value))) is not None:
        return number
    if is_one_number(value, scale[1]):
        return value
    raise _no_rating(value, scale)


def _no_rating(text: str, scale: Scale) -> RowError:
    shown = repr(excerpt(text))
    if _DECIMAL_COMMA.match(text):
        fix = "write a point, or set decimal_comma: true for this source"
        return RowError(f"rating {shown} has a decimal comma", fix)
    if _LEADING_NUMBER.match(text):
        return RowError(
            f"rating {shown} is no number on the scale {scale[0]:g} to {scale[1]:g}",
            "write one number, say in rating_words of this source what it means, or set rating_min and rating_max to "
            "the scale that it is on",
        )
    return RowError(
        f"rating is not a number: {shown}",
        "give the number of each of the venue's words in rating_words of this source, such as "
        f"rating_words: {{{excerpt(text.strip())!r}: 1}}, or remove rows without a rating",
    )


def word_key(text: str) -> str:
    """A word as it is compared: without case and surplus space."""
    return " ".join(text.casefold().split())


def parse_confidence(value: Any, words: Mapping[str, float] | None = None) -> float | Unknown | None:
    """A confidence from 1 to 5, None where there is none; a word that `words` lacks and another number are unknown."""
    if value is None or value == "":
        return None
    number = (words or {}).get(word_key(value)) if isinstance(value, str) else None
    if number is None and isinstance(value, str) and not is_one_number(value, 5):
        return Unknown("confidence", value)
    confidence = parse_score(value if number is None else number, "confidence")
    # A venue's own scale, 0 to 100 say, is no reason to lose its reviews.
    return confidence if 1 <= confidence <= 5 else Unknown("confidence", str(value))


def parse_decision(value: Any, words: Mapping[str, Decision] | None = None) -> Decision | Unknown | None:
    """A decision in prefmill's words, in `words` or in a venue's, or whether it was accepted; None for none."""
    if isinstance(value, bool):
        return "accepted" if value else "rejected"
    text = clean_text(f"{value:g}" if type(value) in _NUMBERS else value, "decision")
    if not text:
        return None
    return (words or {}).get(word_key(text)) or decision_in(text) or Unknown("decision", text)
