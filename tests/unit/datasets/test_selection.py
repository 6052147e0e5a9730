"""The SFT cut: the best fraction, ties by mean P(yes) and then by a hash, whatever the order of the rows."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.datasets.survey import Rank, Ranking, num_selected, rank


def ranking(ranks: list[Rank]) -> Ranking:
    found = Ranking()
    for item in ranks:
        found.add(item)
    return found


@pytest.mark.parametrize(
    ("num_reviews", "fraction", "expected"),
    [(10, 0.2, 2), (14, 0.2, 2), (15, 0.2, 3), (100, 0.29, 29), (3, 0.2, 1), (7, 1.0, 7)],
)
def test_num_selected_rounds_down_but_never_to_none(num_reviews: int, fraction: float, expected: int) -> None:
    assert num_selected(num_reviews, fraction) == expected


def test_rank_orders_by_score_then_probability_then_hash() -> None:
    def evaluation(review_id: str, score: float, p: float) -> Rank:
        empty = {"paper_id": "", "answers": {}, "engine": ""}
        return rank({"review_id": review_id, "checkmark_score": score, "mean_p_yes": p, **empty})  # type: ignore[typeddict-item]

    first, second = sorted(["a", "b"], key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    ordered = [evaluation("z", 5, 0), evaluation("y", 4, 0.9), evaluation(first, 4, 0.5), evaluation(second, 4, 0.5)]
    assert sorted(ordered, reverse=True)[::-1] == ordered


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.5])), min_size=1, max_size=40),
    st.floats(0.01, 1.0),
    st.integers(),
)
def test_cut_selects_exactly_the_fraction_in_any_order(
    values: list[tuple[int, float]], fraction: float, seed: int
) -> None:
    ranks = [Rank(-float(score), -p, index) for index, (score, p) in enumerate(values)]
    expected = sorted(ranks)[: num_selected(len(ranks), fraction)]
    random.Random(seed).shuffle(ranks)
    cut = ranking(ranks).cut(fraction)
    assert sorted(item for item in ranks if item <= cut) == expected


def test_ties_at_the_cut_are_counted() -> None:
    found = ranking([Rank(-5, 0, 1), Rank(-4, 0, 2), Rank(-4, 0, 3), Rank(-4, 0, 4), Rank(-1, 0, 5)])
    cut = found.cut(0.4)
    assert cut == Rank(-4, 0, 2)
    assert found.num_tied(cut) == 3
