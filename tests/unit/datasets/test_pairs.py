"""Pairs: both judgements must favour the chosen review by enough; every other pair is counted by its reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.errors import InputError
from prefmill.datasets.pairs import REMEDIES, Dropped, PairRules, fault, orient, pairs_of, read_exclude


def rules(**changes: Any) -> PairRules:
    defaults: dict[str, Any] = {"max_pairs_per_paper": None, "exclude": frozenset()}
    return PairRules(**{"min_rating_diff": 2, "min_checkmark_diff": 2, **defaults, **changes})


def test_chosen_has_the_higher_rating_in_either_order(scored: Any) -> None:
    high, low = scored("a", rating=8, score=6), scored("b", rating=5, score=3)
    for pair in (orient(high, low), orient(low, high)):
        assert pair.pair_id == "a:b"
        assert (pair.rating_diff, pair.checkmark_diff) == (3, 3)


@pytest.mark.parametrize(
    ("high", "low", "expected"),
    [
        ((7, 5), (5, 3), None),
        ((6.5, 9), (5, 3), "rating_diff_too_small"),
        ((6, 9), (6, 3), "rating_diff_too_small"),
        ((8, 3), (5, 6), "rating_and_checkmark_disagree"),
        ((8, 3), (5, 3.5), "rating_and_checkmark_disagree"),
        ((8, 4), (5, 3), "checkmark_diff_too_small"),
        ((8, 3), (5, 3), "checkmark_diff_too_small"),
    ],
)
def test_fault(scored: Any, high: tuple[float, float], low: tuple[float, float], expected: Dropped | None) -> None:
    pair = orient(scored("a", *low), scored("b", *high))
    assert fault(pair, rules()) == expected


def test_a_difference_of_0_lets_ties_in(scored: Any) -> None:
    pair = orient(scored("a", 5, 3), scored("b", 8, 3))
    assert fault(pair, rules(min_checkmark_diff=0)) is None
    assert fault(orient(scored("a", 5, 3.5), scored("b", 8, 3)), rules(min_checkmark_diff=0)) == (
        "rating_and_checkmark_disagree"
    )


def test_binary_fractions_do_not_fall_short_of_a_threshold(scored: Any) -> None:
    assert 4.1 - 2.1 < 2
    assert fault(orient(scored("a", 4.1, 4.1), scored("b", 2.1, 2.1)), rules()) is None


def test_same_text_and_excluded(scored: Any) -> None:
    twins = orient(scored("a", 8, 8, text="Same  words."), scored("b", 4, 4, text="Same words.\n"))
    assert fault(twins, rules()) == "same_text"
    pair = orient(scored("a", 8, 8), scored("b", 4, 4))
    assert fault(pair, rules(exclude={"a:b"})) == "excluded"
    assert fault(pair, rules(exclude={"b:a"})) is None


def test_pairs_of_counts_every_pair_once(scored: Any) -> None:
    reviews = [scored("a", 9, 9), scored("b", 5, 5), scored("c", 4, 1), scored("d", 1, 4)]
    dropped: Counter[Dropped] = Counter()
    kept = pairs_of(reviews, rules(), dropped)
    assert [pair.pair_id for pair in kept] == ["a:b", "a:c", "a:d"]
    assert dropped == {"rating_diff_too_small": 1, "checkmark_diff_too_small": 1, "rating_and_checkmark_disagree": 1}


def test_order_of_reviews_does_not_matter(scored: Any) -> None:
    reviews = [scored("a", 9, 9), scored("b", 5, 5), scored("c", 2, 1)]
    results = [pairs_of(order, rules(), Counter()) for order in (reviews, reviews[::-1])]
    assert results[0] == results[1]


def test_limit_keeps_the_largest_contrast(scored: Any) -> None:
    reviews = [scored("a", 9, 9), scored("b", 5, 6), scored("c", 2, 1)]
    dropped: Counter[Dropped] = Counter()
    assert [pair.pair_id for pair in pairs_of(reviews, rules(max_pairs_per_paper=2), dropped)] == ["a:c", "b:c"]
    assert dropped == {"over_max_pairs_per_paper": 1}


def test_read_exclude(tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text("# from forensics\na:b\n\n  c:d \n")
    assert read_exclude(path) == {"a:b", "c:d"}
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read the exclude file"):
        read_exclude(path)


def test_every_reason_has_a_remedy() -> None:
    assert set(REMEDIES) == set(Dropped.__args__)  # type: ignore[attr-defined]
