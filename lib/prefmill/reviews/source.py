"""What every source of reviews has in common: its configuration and what a format has to supply."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Self, TypeVar

from msgspec import UNSET, UnsetType
from pydantic import Field, model_validator

from prefmill.core.config import ExternalPath, StrictConfig, later
from prefmill.core.records import Decision
from prefmill.reviews.decision_words import decision_in
from prefmill.reviews.files import PlainRow
from prefmill.reviews.markup import without_html
from prefmill.reviews.rows import (
    Item,
    RawRow,
    RowError,
    RowProblem,
    Skipped,
    Unknown,
    excerpt,
    half_a_pair,
    is_number,
    is_one_number,
    parse_confidence,
    parse_decision,
    parse_rating,
    parse_score,
    spelled,
    with_point,
    word_key,
)
from prefmill.reviews.scale import COMMON_SCALE, Scale
from prefmill.store.jsonl import to_json

# Between scores that a cell lists: `Novelty: 3 (fair)` a line as EasyChair has it, or an object as text.
_BETWEEN_SCORES = re.compile(r"[\n{}]|[,;|](?=[^:,;|\n]*:)|(?<=[\d)])[ \t]+(?=[^\W\d][^:,;()\n]*:)")
_AROUND_SCORE = " \t\r,;|'\""


class SourceConfig(StrictConfig, ABC):
    """A source: `rows` reads what its file holds, `items` says what one row means.

    `venue` names the venue of rows that name none, `id_prefix` goes before every id, so that sources that number
    from 1 can be put together. `rating_words` gives the numbers of ratings in words, within rating_min to rating_max;
    `lower_is_better` turns all ratings over (1 of 1 to 5 is 5). `confidence_words` gives the numbers of confidences
    (1 to 5), `decision_words` the decisions that a venue's own words mean. `html` reads texts that are HTML as text.
    """

    # Whole numbers, as those of the first release: 1.0 has another fingerprint, and corpora would be made again.
    rating_min: float = Field(1, allow_inf_nan=False)
    rating_max: float = Field(10, allow_inf_nan=False)
    # `later` keys are no part of the identity at their default, so corpora made before them stay valid.
    rating_words: dict[str, float] = later({})
    lower_is_better: bool = later(False)
    confidence_words: dict[str, Annotated[float, Field(ge=1, le=5)]] = later({})
    decision_words: dict[str, Decision] = later({})
    decimal_comma: bool = later(False)
    html: bool = later(False)
    venue: str = ""
    id_prefix: str = Field("", pattern=r"^[A-Za-z0-9_-]*$")  # ids name files
    ignore_extra_fields: bool = False

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.rating_min >= self.rating_max:
            raise ValueError(
                f"rating_min ({self.rating_min:g}) must be below rating_max ({self.rating_max:g}); where the lowest "
                "rating is the best, set lower_is_better: true"
            )
        for word, number in self.rating_words.items():
            if not self.rating_min <= number <= self.rating_max:
                bounds = f"{self.rating_min:g} to {self.rating_max:g}"
                raise ValueError(f"rating_words: {word!r} is {number:g}, outside rating_min to rating_max ({bounds})")
        return self

    def made_otherwise(self) -> dict[str, Any]:
        """A scale that is not 1 to 10: corpora made before rows kept it are not what is made now."""
        return {} if self.scale == COMMON_SCALE else {"scale": "kept"}

    # A cached property is no field: it is neither a key nor a part of the identity.
    @cached_property
    def previous_paper(self) -> list[Any]:
        """What the last row said of its paper and what became of it: a memory of one, for tables of reviews."""
        return []

    @cached_property
    def scale(self) -> Scale:
        """The lowest and the highest rating."""
        return float(self.rating_min), float(self.rating_max)

    @cached_property
    def written_scale(self) -> Scale | UnsetType:
        """The scale as a review's row has it."""
        return UNSET if self.scale == COMMON_SCALE else self.scale

    @cached_property
    def decisions_by_word(self) -> dict[str, Decision]:
        """`decision_words` as words are compared."""
        return _by_key(self.decision_words)

    @cached_property  # asked for every row
    def _ratings_by_word(self) -> dict[str, float]:
        return _by_key(self.rating_words)

    @cached_property
    def _confidences_by_word(self) -> dict[str, float]:
        return _by_key(self.confidence_words)

    def rating(self, value: Any) -> float:
        """A rating as this source writes it; raises RowError where it is none, or outside the scale."""
        rating = parse_rating(self.pointed(value), self.scale, self._ratings_by_word)
        # Rounded, as 1 + 5 - 2.3 is 2.7 and a little.
        rating = round(sum(self.scale) - rating, 6) if self.lower_is_better else rating
        if isinstance(value, str) and (said := decision_in(value)):
            self.ratings_by_words[said][rating] += 1
        return rating

    @cached_property
    def ratings_by_words(self) -> defaultdict[Decision, Counter[float]]:
        """How often each rating was given in words that accept, such as `6: weak accept`, or reject, so far."""
        return defaultdict(Counter)

    def confidence(self, value: Any) -> tuple[float | None, list[Item]]:
        """A confidence from 1 to 5, or None and in the list the word that nobody gave a number."""
        return _or_unknown(parse_confidence(self.pointed(value), self._confidences_by_word))

    def pointed(self, value: Any) -> Any:
        """`value` with a point in place of its decimal comma, where this source has commas."""
        return with_point(value) if self.decimal_comma else value

    def decision(self, value: Any) -> tuple[Decision | None, list[Item]]:
        """A decision, or None and in the list the words that mean none."""
        return _or_unknown(parse_decision(value, self.decisions_by_word))

    @property
    def missing_words(self) -> frozenset[str]:
        """The texts that stand for no value."""
        return frozenset()

    @abstractmethod
    def rows(self, source: int) -> Iterator[RawRow | PlainRow | RowProblem]:
        """The raw rows; `source` is this source's position in the configuration."""

    @abstractmethod
    def items(self, values: dict[str, Any]) -> list[Item]:
        """The papers, decisions and reviews in one raw row; raises RowError when it cannot be used."""


ValueT = TypeVar("ValueT")


def _by_key(words: Mapping[str, ValueT]) -> dict[str, ValueT]:
    return {word_key(word): value for word, value in words.items()}


def _or_unknown(value: ValueT | Unknown | None) -> tuple[ValueT | None, list[Item]]:
    return (None, [value]) if isinstance(value, Unknown) else (value, [])


def sub_scores_in(value: Any, config: SourceConfig) -> tuple[dict[str, float], list[Item]]:
    """Sub-scores by name, and the answers that are none: words, and two numbers such as 3-4."""
    value = listed_scores(value)
    # Sorted: the store compares them as JSON to see whether a review is listed twice word for word.
    scores = {name: float(score) for name, score in sorted(value.items()) if is_number(score)}
    if len(scores) == len(value):
        return scores, []
    given = [(name, config.pointed(score)) for name, score in sorted(value.items()) if score not in (None, "")]
    others = {name for name, score in given if isinstance(score, str) and not is_one_number(score)}
    scores = {name: parse_score(score, f"sub_scores.{name}") for name, score in given if name not in others}
    return scores, [Unknown("sub-score that is no number", name) for name in sorted(others)]


def listed_scores(value: Any) -> dict[str, Any]:
    """Scores by name, also of a text that lists them."""
    parts = [part.partition(":") for part in _BETWEEN_SCORES.split(value)] if isinstance(value, str) else []
    named = {name.strip(_AROUND_SCORE): score.strip(_AROUND_SCORE) for name, colon, score in parts if colon}
    named = named or value or {}
    if not isinstance(named, dict):
        raise RowError(f"sub_scores is not an object but {type(value).__name__}", "write names and numbers")
    return dict(named)


class FileSource(SourceConfig):
    """A source on disk: a file, or a folder of files at any depth."""

    path: ExternalPath


def read_source(config: SourceConfig, source: int) -> Iterator[tuple[RawRow | PlainRow, list[Item]] | RowProblem]:
    """Each row of a source with its items, or the problem with it. Raises InputError where no row can be read."""
    words = config.missing_words
    for row in config.rows(source):
        if isinstance(row, PlainRow):
            yield row, row.items
            continue
        if isinstance(row, RowProblem):
            yield row
            continue
        values = without_html(row.values) if config.html else row.values
        missing: list[tuple[str, str]] = []
        if row.may_hold_nan or words:  # most rows are known to hold none: to look takes a tenth of a row
            values, missing = without_missing(values, words)
        try:
            items = config.items(values)
            if missing:
                items += [Skipped(f"{text} as no value: {name}") for name, text in missing]
            yield row, items
        except RowError as error:
            if missing:
                told = ", ".join(f"{text} in {name}" for name, text in missing)
                error = RowError(f"{error.reason} ({told} is no value)", error.fix)
            yield problem_with(row, error)
        except UnicodeEncodeError:  # texts were looked at; what remains is the name of a score, of which an id is made
            yield problem_with(row, half_a_pair("a field's name"))


def without_missing(values: dict[str, Any], words: frozenset[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """`values` with None for NaN, as pandas writes what is missing, and for `words`; and the fields that held them."""
    found: dict[str, Any] = {}
    missing: list[tuple[str, str]] = []
    for name, value in values.items():
        kind = type(value)
        if kind is str:  # asked first: most values are text, and every row comes here
            if words and value in words:
                found[name] = None
                missing.append((name, value))
        elif kind is float and value != value:
            found[name] = None
            missing.append((name, "NaN"))
        elif kind is dict and value:
            inner, inside = without_missing(value, words)
            if inside:
                found[name] = inner
                missing += [(f"{name}.{key}", text) for key, text in inside]
    return ({**values, **found} if found else values), missing


def problem_with(row: RawRow | PlainRow, error: RowError) -> RowProblem:
    """The problem that `error` found in `row`."""
    try:
        shown = to_json(row.values)
    except ValueError:  # NaN
        shown = str(row.values)
    return RowProblem(row.place, spelled(error.reason), error.fix, excerpt(shown))
