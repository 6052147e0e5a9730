"""A row against its source: each way of disagreeing is named."""

from __future__ import annotations

from typing import Any

import pytest

from prefmill.core.records import Paper
from prefmill.datasets.examples import Answered, CheckedRow
from prefmill.datasets.registry import DatasetKey
from prefmill.datasets.source_checks import Claims, Source, source_problems
from prefmill.datasets.survey import rank
from prefmill.reviews.prompt import review_completion
from prefmill.reviews.scale import COMMON_SCALE


@pytest.fixture
def source(paper: Paper, scored: Any) -> Source:
    items = [scored("a", 8, 9), scored("b", 5, 4)]
    reviews = {item.review["review_id"]: item.review for item in items}
    return Source(paper, reviews, {item.evaluation["review_id"]: item.evaluation for item in items})


def row(source: Source, *ids: str) -> CheckedRow:
    answers = tuple(Answered(review_completion(source.reviews[item], COMMON_SCALE), "text", 5.0) for item in ids)
    key = DatasetKey("dpo" if len(ids) == 2 else "sft", "clean", "train")
    diffs = (3.0, 5.0) if len(ids) == 2 else (None, None)
    return CheckedRow(key, 1, ":".join(ids), "p", "prompt", answers, ids, (), *diffs)


def claims(source: Source, cut: str = "b") -> Claims:
    assert source.evaluations is not None
    return Claims(rank(source.evaluations[cut]), frozenset({"accepted"}))


def test_sound_rows_pass(source: Source) -> None:
    for ids in (("a",), ("b",), ("a", "b")):
        assert list(source_problems(row(source, *ids), source, claims(source))) == []
        assert list(source_problems(row(source, *ids), source._replace(evaluations=None), claims(source))) == []


def test_a_paper_of_another_split_or_decision(source: Source, paper: Paper) -> None:
    held_out = source._replace(paper={**paper, "split": "dev"})
    assert list(source_problems(row(source, "a"), held_out, claims(source))) == ["its paper p is of split dev"]
    rejected = source._replace(paper={**paper, "decision": "rejected"})
    assert list(source_problems(row(source, "a"), rejected, claims(source))) == []
    assert list(source_problems(row(source, "a", "b"), rejected, claims(source))) == [
        "its paper p is rejected, not accepted"
    ]


def test_a_review_that_is_not_there_or_says_something_else(source: Source) -> None:
    stranger = row(source, "a")._replace(review_ids=("z",))
    assert list(source_problems(stranger, source, claims(source))) == ["review z is not one of paper p"]
    edited = row(source, "a")._replace(answers=(Answered("Edited.\nRating: 8", "Edited.", 8.0),))
    (problem,) = source_problems(edited, source, claims(source))
    assert "not what review a says" in problem


def test_differences_are_derived_again(source: Source) -> None:
    wrong = row(source, "a", "b")._replace(rating_diff=2.0, checkmark_diff=9.0)
    assert list(source_problems(wrong, source, claims(source))) == [
        "rating_diff is 2.0, but the source gives 3",
        "checkmark_diff is 9.0, but the source gives 5",
    ]


def test_sft_rows_below_the_cut(source: Source) -> None:
    (problem,) = source_problems(row(source, "b"), source, claims(source, cut="a"))
    assert problem == "the review's checkmark score 4 is below the SFT cut at 9"
    assert list(source_problems(row(source, "a"), source, claims(source, cut="a"))) == []
