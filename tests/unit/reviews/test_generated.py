"""The generated corpus: known factors are re-measured exactly, the language is small, the pairs are as promised."""

from __future__ import annotations

import itertools
import random
import re
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.core.errors import ConfigError
from prefmill.reviews import synthetic_text as phrases
from prefmill.reviews.generated import NUM_TITLES, compose, generate, generate_paper, quality_factors

FACTOR_NAMES = list(phrases.FACTORS)
WORDS = dict.fromkeys(phrases.SLOTS, "word") | {"seeds": "three seeds"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(generate(0, 3000))


def num_factors(row: dict[str, Any]) -> int:
    return sum(quality_factors(row["review_text"]).values())


@given(st.sets(st.sampled_from(FACTOR_NAMES)), st.integers(0, 12), st.integers(1, 10), st.integers())
def test_factors_written_are_the_factors_measured(factors: set[str], num_vague: int, rating: int, seed: int) -> None:
    text = compose(random.Random(seed), WORDS, sorted(factors), num_vague, rating)
    assert {name for name, held in quality_factors(text).items() if held} == factors


def test_measure_ignores_case_and_loose_punctuation_but_wants_whole_sentences() -> None:
    assert quality_factors("there are NO error bars on tundra .")["statistics"]
    assert not any(quality_factors("There are no error bars on").values())
    assert not any(quality_factors("").values())


def test_every_phrase_names_its_factor_alone() -> None:
    for name, template in ((name, text) for name, texts in phrases.FACTORS.items() for text in texts):
        assert [held for held, yes in quality_factors(template % WORDS).items() if yes] == [name], template


def test_no_vague_sentence_opening_or_verdict_holds_a_factor() -> None:
    for template in (*phrases.VAGUE, *phrases.OPENINGS, *(text for _, text in phrases.VERDICTS)):
        assert not any(quality_factors(template % WORDS).values()), template


def test_any_slice_can_be_made_by_itself(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["paper_id"] == "g0-0000777"] == generate_paper(0, 777)
    assert generate_paper(1, 777) != generate_paper(0, 777)


def test_titles_and_ids_are_distinct(rows: list[dict[str, Any]]) -> None:
    titles = {row["paper_id"]: row["title"] for row in rows}
    assert len(titles) == len(set(titles.values())) == 3000
    assert len({row["review_id"] for row in rows}) == len(rows)


def test_the_language_is_small(rows: list[dict[str, Any]]) -> None:
    texts = (row[key] for row in rows for key in ("title", "abstract", "text", "review_text"))
    assert len({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)}) < 500
    lengths = [len(row["review_text"].split()) for row in rows]
    assert min(lengths) >= 30
    assert max(lengths) <= 140
    assert 60 <= statistics.mean(lengths) <= 100


@pytest.mark.slow
def test_factors_spread_and_length_is_only_a_rough_sign_of_them(rows: list[dict[str, Any]]) -> None:
    counts, lengths = [num_factors(row) for row in rows], [len(row["review_text"].split()) for row in rows]
    assert set(counts) == set(range(len(FACTOR_NAMES) + 1))
    assert statistics.stdev(counts) > 3
    assert 0.4 < statistics.correlation(counts, lengths) < 0.75
    assert any(count >= 7 and length < 70 for count, length in zip(counts, lengths, strict=True))
    assert any(count <= 2 and length > 85 for count, length in zip(counts, lengths, strict=True))


@pytest.mark.slow
def test_decisions_ratings_and_pairs_are_as_promised(rows: list[dict[str, Any]]) -> None:
    papers = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["paper_id"])]
    assert {len(paper) for paper in papers} == {3, 4, 5}
    accepted = [paper for paper in papers if paper[0]["decision"] == "accepted"]
    assert 0.35 < len(accepted) / len(papers) < 0.47
    agree, disagree = _wide_pairs(accepted)
    assert agree > len(accepted)
    assert 0.05 < disagree / (agree + disagree) < 0.25


def _wide_pairs(papers: list[list[dict[str, Any]]]) -> tuple[int, int]:
    """Same-paper pairs two or more apart in rating and in factors: where both point one way, and where not."""
    agreements = []
    for paper in papers:
        for one, two in itertools.combinations([(row["rating"], num_factors(row)) for row in paper], 2):
            rating, count = one[0] - two[0], one[1] - two[1]
            if abs(rating) >= 2 and abs(count) >= 2:
                agreements.append(rating * count > 0)
    return sum(agreements), len(agreements) - sum(agreements)


@pytest.mark.parametrize("num_papers", [0, -1, NUM_TITLES + 1])
def test_more_papers_than_titles_are_refused(num_papers: int) -> None:
    with pytest.raises(ConfigError, match="num_papers"):
        next(generate(0, num_papers))
