"""Lines that are read while they are decoded mean what they mean when they are looked at twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.reviews.files import PlainRow
from prefmill.reviews.rows import PaperRow, ReviewRow, RowProblem
from prefmill.reviews.source import read_source
from tests.unit.reviews.read_sources import ROW, items_of, source

FULL = {
    **ROW, "abstract": "A", "text": "T: t", "decision": "accepted", "decision_raw": "Accept", "venue": "V",
    "confidence": 4, "sub_scores": {"b": 2, "a": 1.5},
}  # fmt: skip
# Values where decoding by type and the second look could differ.
CHANGES: list[dict[str, Any]] = [
    {}, {"rating": 10}, {"rating": 10.5}, {"rating": 0}, {"rating": True}, {"rating": "6: good"}, {"rating": None},
    {"rating": 2**70}, {"rating": float("nan")}, {"confidence": 0}, {"confidence": 5}, {"confidence": 6},
    {"confidence": ""}, {"confidence": "sure"}, {"confidence": None}, {"sub_scores": {}}, {"sub_scores": None},
    {"sub_scores": []}, {"sub_scores": {"a": None}}, {"sub_scores": {"a": "good", "b": 1}}, {"sub_scores": {"a": True}},
    {"sub_scores": {"a": -0.0}}, {"sub_scores": {"\ud800": 1}}, {"decision": None}, {"decision": "Accept (Poster)"},
    {"decision": "perhaps"}, {"decision": ""}, {"decision_raw": {"a": 1, "b": 2}}, {"decision_raw": 'so: "yes": no'},
    {"abstract": None, "text": None, "venue": None}, {"abstract": 3}, {"title": "?"}, {"title": ""}, {"title": None},
    {"paper_id": 7}, {"paper_id": "a/b"}, {"paper_id": True}, {"review_id": ".r"}, {"review_id": ""}, {"review_id": 3},
    {"review_text": " \r\n a\x07 \x7f\u00e9 "}, {"review_text": "\ud800"}, {"review_text": "\u200b"},
    {"review_text": '"k": "v": {"a": 1}'}, {"review_text": None}, {"review_text": "<br /> &amp;"}, {"other": 1},
]  # fmt: skip
NOT_A_ROW = ["", " ", "[1]", "3", '{"a":', "[" * 100_000, '{"title":' * 100_000, json.dumps(ROW) + " x"]


def lines() -> list[bytes]:
    """Full and short rows with each change, each between two rows of its paper that are well formed."""
    found = []
    for number, change in enumerate(CHANGES):
        for row in (FULL, ROW):
            good = [{**row, "review_id": f"r{number}{letter}"} for letter in "ab"]
            found += [json.dumps(values) for values in (good[0], {**row, **change}, good[1])]
    twice = [json.dumps(row)[:-1] + f', "{key}" :{value}}}' for row in (FULL, ROW) for key, value in (("rating", 3),)]
    twice += [json.dumps(FULL).replace('"b": 2', '"b": 2, "b": 3')]
    escaped = [json.dumps(FULL).replace('"rating"', '"r\\u0061ting"'), json.dumps(FULL).replace(": 6", ": 1e999")]
    whole = json.dumps(FULL).encode()
    return [line.encode() for line in (*found, *twice, *escaped, *NOT_A_ROW)] + [whole.replace(b"Fine", b"\xff"), whole]


@pytest.mark.parametrize(
    "options",
    [{}, {"id_prefix": "x-", "venue": "W"}, {"rating_min": -3, "rating_max": 11}, {"ignore_extra_fields": True}],
)
def test_a_line_means_the_same_at_the_first_look_and_at_the_second(tmp_path: Path, options: dict[str, Any]) -> None:
    """The oracle is the way of lines that need a second look; `rating_words` of no row's sends all of them there."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join(lines()))
    first = source(format="jsonl", path=path, **options)
    second = source(format="jsonl", path=path, rating_words={"of no row": 5}, **options)
    assert sum(isinstance(row, PlainRow) for row in first.rows(0)) > len(CHANGES)
    assert not any(isinstance(row, PlainRow) for row in second.rows(0))
    for one, other in zip(read_source(first, 0), read_source(second, 0), strict=True):
        if isinstance(one, RowProblem) or isinstance(other, RowProblem):
            assert one == other
        else:
            assert (one[0].place, one[1]) == (other[0].place, other[1])
            assert repr(one[1]) == repr(other[1])  # the order of sub-scores as well, and the types of numbers


@pytest.mark.parametrize(
    ("option", "title", "text", "rating"),
    [
        ({"columns": {"title": "venue", "venue": "title"}}, "V", "Fine &amp; good.", 6),
        ({"html": True}, "T", "Fine & good.", 6),
        ({"rating_words": {"6": 2}}, "T", "Fine &amp; good.", 2),
        ({"lower_is_better": True}, "T", "Fine &amp; good.", 5),
    ],
)
def test_what_a_source_says_of_its_rows_holds_for_well_formed_ones(
    tmp_path: Path, option: dict[str, Any], title: str, text: str, rating: float
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({**ROW, "venue": "V", "review_text": "Fine &amp; good."}))
    paper, review = items_of(source(format="jsonl", path=path, **option))
    assert isinstance(paper, PaperRow)
    assert isinstance(review, ReviewRow)
    assert (paper.title, review.text, review.rating) == (title, text, rating)
