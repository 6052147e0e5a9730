"""Papers whose reviews lie inside them, under names of their own: a row a review, by the paths that `columns` names."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from typing import Any

from msgspec.structs import replace

from prefmill.reviews.files import PlainRow, as_row
from prefmill.reviews.rows import RawRow, RowProblem, Skipped, excerpt
from prefmill.store.jsonl import parse_json

_RATING = re.compile(r"rating|score|recommendation|overall", re.IGNORECASE)
_COLUMNS = ("title", "review_text", "rating")  # of which a review has one each
_OF_ROWS = {"data", "rows", "examples", "items", "records", "results", "papers", "submissions"}  # in what holds rows


def apart(row: RawRow, paths: Collection[str], rating: str) -> Iterator[RawRow | PlainRow | RowProblem]:
    """`row` with the values at `paths` (such as `reviews.content.rating`) by these names, once for each rating.

    Lists on the way are the reviews, be it a list of objects or a list for each of their fields. Where the rating is
    one value the row is one review.
    """
    values = dict(row.values)
    holders = {path.partition(".")[0] for path in paths if "." in path and path not in values}
    for name in sorted(holders & values.keys()):
        values |= _leaves(name, _decoded(values.pop(name)))
    ratings = [] if values.get(rating.partition(".")[0]) == [] else values.get(rating)
    lists = {path: values[path] for path in paths if isinstance(values.get(path), list)}
    if lists and ratings is None and rating not in values:
        reason = f"no '{rating}' for the reviews in '{min(lists)}'"
        fix = f"name it in columns of this source, such as columns: {{{rating_path(row.values)}}}"
        yield RowProblem(row.place, reason, fix, excerpt(row.values))
        return
    if not isinstance(ratings, list):
        yield replace(row, values=values)
        return
    if odd := sorted(path for path, found in lists.items() if len(found) != len(ratings)):
        reason = f"'{rating}' has {len(ratings)} values and '{odd[0]}' {len(lists[odd[0]])}"
        yield RowProblem(row.place, reason, "name columns with a value for each review", excerpt(row.values))
    elif not ratings:
        yield PlainRow(row.place, b"{}", [Skipped("paper without a review")])
    else:
        for index in range(len(ratings)):
            place = replace(row.place, item=f"{rating}[{index}]")
            yield replace(row, place=place, values=values | {path: found[index] for path, found in lists.items()})


def entries(row: RawRow | PlainRow | RowProblem, named: Collection[str]) -> Iterator[RawRow | PlainRow | RowProblem]:
    """A row, those of a paper's list `reviews`, or those in what holds rows: papers by their ids, lists such as `data`.

    What has a field that is `named` is a row.
    """
    if not isinstance(row, RawRow):
        yield row
        return
    if _is_by_columns(row.values):
        fix = 'write an object a review, as pandas does with to_json(path, orient="records", lines=True)'
        yield RowProblem(row.place, "a table column by column, where rows are expected", fix, excerpt(row.values))
        return
    values = {} if row.values.keys() & named else row.values
    if values and all(isinstance(value, dict) for value in values.values()):
        for name, value in values.items():
            yield from _of_one(RawRow(replace(row.place, item=excerpt(name)), value), named)
        return
    lists = {name: value for name, value in values.items() if value and _is_of_objects(value)}
    if not lists.keys() & _OF_ROWS:  # of one paper
        yield from _of_one(row, named)
        return
    for name, found in lists.items():
        for index, value in enumerate(found):
            yield from _of_one(RawRow(replace(row.place, item=f"{excerpt(name)}[{index}]"), value), named)


def _of_one(row: RawRow, named: Collection[str]) -> Iterator[RawRow | RowProblem]:
    """A row, or a paper's reviews."""
    is_paper = isinstance(row.values.get("reviews"), list) and "reviews" not in named
    yield from unfold(row) if is_paper else [row]


def _is_by_columns(values: dict[str, Any]) -> bool:
    """Whether they are a whole table as pandas writes it by columns, its default, or with orient="split" or "list"."""
    if values.keys() - {"index"} == {"columns", "data"} or all(type(values.get(name)) is list for name in _COLUMNS):
        return True
    first = next(iter(values.values()), None)
    if not (isinstance(first, dict) and first and all(map(str.isdecimal, first))):
        return False
    if any(isinstance(cell, dict) for cell in first.values()):  # a paper's reviews by their numbers
        return False
    return all(isinstance(column, dict) and column.keys() == first.keys() for column in values.values())


def _is_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


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


def rating_path(values: dict[str, Any]) -> str:
    """`rating: PATH` of what looks like the rating inside a row; empty where nothing does."""
    inner = chain.from_iterable(_leaves(name, _decoded(value)) for name, value in values.items())
    found = (path for path in inner if "." in path and _RATING.search(path.rpartition(".")[2]))
    return next((f"rating: {path}" for path in found), "")


def _leaves(path: str, value: Any) -> dict[str, Any]:
    """What is in an object by its path; of a list of objects a list by the path of each field, None where one lacks it.

    An empty list has no fields: it is all that there is at its path.
    """
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for name, inner in value.items():
            found |= _leaves(f"{path}.{name}", inner)
        return found
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        return {path: value}
    rows = [_leaves(path, entry) for entry in value]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _decoded(cell: Any) -> Any:
    """A cell of a table that holds objects as text, in JSON or as Python prints them; other values as they are."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{")):
        return cell
    for read in (lambda text: parse_json(text.encode()), ast.literal_eval):
        try:
            return read(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return cell
