"""Sources with one review a row, its paper repeated on each: JSON lines and CSV."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from prefmill.core.config import later
from prefmill.core.errors import nearest
from prefmill.reviews.files import CSV, JSON_LINES, PlainRow, csv_rows, files_at, json_rows, none_is_plain
from prefmill.reviews.nested import apart, entries
from prefmill.reviews.openreview_forms import as_sections
from prefmill.reviews.row_items import REQUIRED_FIELDS, VALID_FIELDS, plain_reader, row_items
from prefmill.reviews.rows import Item, Place, RawRow, RowError, RowProblem, clean_text
from prefmill.reviews.source import FileSource, listed_scores

_TEXTS = {"review_text", "abstract", "text"}
_Columns = dict[str, str | list[str]]
_SUB_SCORE_COLUMN = "sub_scores."
# What pandas takes for a missing value in a table.
_MISSING = frozenset({
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip


class _TableSource(FileSource):
    """Rows with the fields of `VALID_FIELDS`; `columns` names the file's own field for one where the two differ.

    Several fields that make up a text are a list there, and a field inside an object is a path, `content.rating`: lists
    on the way are a paper's reviews. Papers and reviews may be rows of their own, with one paper_id.
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

    @cached_property
    def own_names(self) -> frozenset[str]:
        """The file's own names in `columns`."""
        return frozenset(chain.from_iterable(map(_names, self.columns.values())))

    @property
    def may_lack(self) -> frozenset[str]:
        """Those of `own_names` that not every row has."""
        return frozenset()

    def apart(self, row: RawRow | PlainRow | RowProblem) -> Iterator[RawRow | PlainRow | RowProblem]:
        """A row, or the reviews inside it that `columns` names."""
        if not (self.columns and isinstance(row, RawRow)):
            return iter([row])
        rating = str(self.columns.get("rating", "rating"))
        return apart(row, self.own_names | {rating}, rating)

    def named(self, values: dict[str, Any]) -> dict[str, Any]:
        """A row by the names of `VALID_FIELDS`; raises RowError where it lacks what `columns` names."""
        if not self.columns:
            return values
        taken = self.own_names
        if missing := sorted(taken - values.keys() - self.may_lack):
            lacks = f"columns names '{missing[0]}', which the file has not{nearest(missing[0], list(values))}"
            raise RowError(lacks, "correct columns of this source")
        # The file's own field of a name that stands for another one is one more: it must not take that one's place.
        rest = {
            f"{name} (the file's own)" if name in self.columns else name: value
            for name, value in values.items()
            if name not in taken
        }
        given = {field: own for field, own in self.columns.items() if values.keys() & _names(own)}
        return rest | {field: _cell(values, own) for field, own in given.items()}


class JsonlSource(_TableSource):
    """One JSON object a line, or a file that is an array of them, plain or packed, or one row of Parquet.

    An object is a review with its paper, a paper with a list `reviews` of objects, or holds such objects by their ids.
    """

    format: Literal["jsonl"]

    def rows(self, source: int) -> Iterator[RawRow | PlainRow | RowProblem]:
        """The objects of each file, those of a paper once for each of its reviews."""
        means_otherwise = self.columns or self.html or self.rating_words or self.lower_is_better
        plain = none_is_plain if means_otherwise else plain_reader(self)
        named = VALID_FIELDS | {name.partition(".")[0] for name in self.own_names}
        self._found.clear()
        for path in files_at(self.path, JSON_LINES, or_else=(".json",)):
            for found in json_rows(path, source, plain):
                if isinstance(found, PlainRow):  # nearly all are: generators around each took an eighth of reading
                    yield found
                    continue
                for row in entries(found, named):
                    yield from self.apart(row)
        # Told last, as one row may lack what another has.
        for name in sorted(self.own_names - self._found) if self._found else ():
            fix = "correct columns of this source"
            yield RowProblem(Place(source, str(self.path)), f"columns names '{name}', which no row has", fix, "")

    def items(self, values: dict[str, Any]) -> list[Item]:
        """The row's paper and review."""
        if not self.columns:
            return row_items(values, self)
        self._found.update(values.keys() & self.own_names)
        rest, scores = _sub_scores_apart(self.named(values))
        try:
            return row_items({**rest, "sub_scores": {**listed_scores(rest.get("sub_scores")), **scores}}, self)
        except RowError as error:
            if lacking := sorted((REQUIRED_FIELDS & self.columns.keys()) - rest.keys()):
                error = RowError(
                    f"{error.reason} (columns names '{self.columns[lacking[0]]}', which the row has not)",
                    f"correct columns of this source, or {error.fix}",
                )
            raise error from None

    @property
    def may_lack(self) -> frozenset[str]:
        """All: JSON leaves out what is empty, and papers and reviews may be rows of their own."""
        return self.own_names

    @cached_property
    def _found(self) -> set[str]:
        """Those of `own_names` that a row had so far."""
        return set()


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

    def rows(self, source: int) -> Iterator[RawRow | PlainRow | RowProblem]:
        """The rows of each file."""
        return (
            row for path in files_at(self.path, CSV) for found in csv_rows(path, source) for row in self.apart(found)
        )

    def items(self, values: dict[str, Any]) -> list[Item]:
        """The row's paper and review."""
        rest, sub_scores = _sub_scores_apart(self.named(values))
        listed = listed_scores(rest.get("sub_scores"))
        if not rest.get("confidence") and (name := next((name for name in listed if "confidence" in name.lower()), "")):
            rest["confidence"] = listed.pop(name)
        return row_items({**rest, "sub_scores": {**listed, **sub_scores}}, self)


def _names(own: str | list[str]) -> set[str]:
    return {own} if isinstance(own, str) else set(own)


def _cell(values: dict[str, Any], own: str | list[str]) -> Any:
    if isinstance(own, str):
        return values[own]
    own = [name for name in own if name in values]
    # Of `content.strengths` and `content.questions` the headings are what they do not share.
    shared = {name.rpartition(".")[0] for name in own}
    length = len(shared.pop()) + 1 if len(shared) == 1 and shared != {""} else 0
    return as_sections({name[length:]: clean_text(values[name], name) for name in own})


def _sub_scores_apart(named: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row without its columns of sub-scores, and these by their names.

    A CSV row cannot leave out a column: an empty cell is a review without that sub-score.
    """
    scores = {
        name.removeprefix(_SUB_SCORE_COLUMN): cell
        for name, cell in named.items()
        if _is_sub_score(name) and cell not in (None, "")
    }
    return {name: cell for name, cell in named.items() if not _is_sub_score(name)}, scores


def _is_sub_score(name: str) -> bool:
    return name.startswith(_SUB_SCORE_COLUMN)
