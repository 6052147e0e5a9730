"""Rating scales: an affine map of a venue's ratings changes no pair, and of a prompt only the bounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.checklist.scored import ScoredReview
from prefmill.core.errors import InputError
from prefmill.datasets.pairs import PairRules, pairs_of
from prefmill.reviews.prompt import asked_scale, review_completion, review_messages, split_completion
from prefmill.reviews.scale import COMMON_SCALE, Scale, VenueQuantiles, common_rating, prompt_scale, rescaled

RULES = PairRules(2.0, 1.0, None, frozenset())
BOUNDS = st.tuples(st.integers(-100, 100), st.integers(1, 200)).map(lambda b: (float(b[0]), float(b[0] + b[1])))
SHARES = st.lists(st.integers(0, 90), min_size=2, max_size=6).map(lambda places: [place / 90 for place in places])


def reviews(scale: Scale, shares: list[float]) -> list[ScoredReview]:
    rows: list[Any] = [
        {"review_id": f"r{n}", "paper_id": "p", "text": f"Text {n}.", "confidence": None, "venue": "v",
         "rating": scale[0] + share * (scale[1] - scale[0]), "sub_scores": {}, "scale": list(scale)}
        for n, share in enumerate(shares)
    ]  # fmt: skip
    ids = [{"review_id": row["review_id"], "paper_id": "p"} for row in rows]
    scores: list[Any] = [{**key, "checkmark_score": float(n * n % 7), "mean_p_yes": 0.5} for n, key in enumerate(ids)]
    return [ScoredReview(row, score) for row, score in zip(rows, scores, strict=True)]


def prompt(scale: Scale) -> str:
    paper: Any = {"paper_id": "p", "title": "T", "abstract": "A", "text": "", "scale": list(scale)}
    return review_messages(paper, "clean")[0]["content"]


def pair_ids(scale: Scale, shares: list[float], by_quantile: bool) -> list[str]:
    rows = reviews(scale, shares)
    quantiles = VenueQuantiles(row.review for row in rows)
    rules = replace(RULES, quantiles=quantiles, min_rating_diff=0.3) if by_quantile else RULES
    return [pair.pair_id for pair in pairs_of(rows, rules, Counter())]


@given(BOUNDS, BOUNDS, SHARES, st.booleans())
def test_an_affine_map_of_the_scale_changes_no_pair(
    one: Scale, other: Scale, shares: list[float], by_quantile: bool
) -> None:
    found = [pair_ids(scale, shares, by_quantile) for scale in (one, other)]
    assert found[0] == found[1]


@given(BOUNDS)
def test_a_prompt_differs_in_its_bounds_only(scale: Scale) -> None:
    common = prompt(COMMON_SCALE)
    assert prompt(scale) == common.replace("from 1 to 10.", f"from {scale[0]:g} to {scale[1]:g}.")
    assert asked_scale(prompt(scale)) == scale


@given(BOUNDS, st.integers(0, 90))
def test_a_completion_is_read_back_on_its_scale(scale: Scale, place: int) -> None:
    (scored,) = reviews(scale, [place / 90])
    text, rating = split_completion(review_completion(scored.review, scale), scale)
    assert text == "Text 0."
    assert rating == pytest.approx(scored.review["rating"], rel=1e-5, abs=1e-4)


def test_a_review_of_another_venue_is_put_on_the_prompts_scale() -> None:
    (scored,) = reviews((1.0, 5.0), [0.5])
    assert review_completion(scored.review, (-3.0, 3.0)).endswith("\nRating: 0")
    assert rescaled(3.0, (1.0, 5.0), COMMON_SCALE) == 5.5


def test_the_prompt_asks_for_the_most_frequent_scale() -> None:
    assert prompt_scale([(0.0, 10.0), (1.0, 5.0), (1.0, 5.0)]) == (1.0, 5.0)
    assert prompt_scale([]) == COMMON_SCALE


@pytest.mark.parametrize("line", ["Rating: 6,5", "Rating: 11", "Rating: -1", "Rating: 7/5"])
def test_no_rating_is_made_of_another_number(line: str) -> None:
    assert split_completion(f"Fine.\n{line}", (0.0, 10.0))[1] is None


@given(SHARES)
def test_quantiles_are_mid_ranks(shares: list[float]) -> None:
    rows = [scored.review for scored in reviews((0.0, 5.0), shares)]
    quantiles = VenueQuantiles(rows)
    assert [quantiles(row) for row in rows] == pytest.approx(
        [(sum(x < own for x in shares) + sum(x <= own for x in shares)) / 2 / len(shares) for own in shares]
    )


@given(SHARES, st.floats(0.01, 0.99))
def test_a_rating_is_accepted_from_its_venues_quantile_on(shares: list[float], place: float) -> None:
    rows = [scored.review for scored in reviews((0.0, 5.0), shares)]
    quantiles = VenueQuantiles(rows)
    threshold = quantiles.rating_at(rows[0]["venue"], place)
    assert [quantiles(row) >= place for row in rows] == [common_rating(row) >= threshold for row in rows]
    with pytest.raises(InputError, match=r"venue another(.|\n)*rating_unit=points"):
        quantiles.rating_at("another", place)
