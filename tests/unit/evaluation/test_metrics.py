"""Metrics on reviews small enough to work out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prefmill.evaluation.metrics import MEASURES, average, f1_score, measure, measure_review, rank_correlation
from prefmill.evaluation.rows import EvaluatedReview, PaperFacts
from prefmill.reviews.text_statistics import distinct_share, ngrams, repeated_share, words


def review(
    paper: str, text: str, rating: float | None, yes: tuple[bool, ...], factors: int | None = None, human: bool = False
) -> EvaluatedReview:
    """A scored review whose items are q0, q1, ..."""
    generation: Any = {"paper_id": paper, "sample": 0, "text": text, "rating": rating, "truncated": False}
    answers = {f"q{index}": {"yes": answer, "p_yes": 0.5} for index, answer in enumerate(yes)}
    evaluation: Any = {"answers": answers, "checkmark_score": float(sum(yes))}
    held = None if factors is None else {f"f{index}": index < factors for index in range(3)}
    return EvaluatedReview(generation, evaluation, held, human)


PAPERS = {
    "a": PaperFacts("accepted", (8.0, 6.0), 6),
    "b": PaperFacts("rejected", (3.0, 5.0), 6),
    "c": PaperFacts(None, (), 6),
}


def test_words_and_ngrams() -> None:
    assert words("It's well-written, isn't it? 3.5 §2") == ["it's", "well-written", "isn't", "it", "3", "5", "2"]
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert distinct_share(["a", "b", "a", "b"], 2) == pytest.approx(2 / 3)
    assert distinct_share(["a"], 2) is None
    assert repeated_share(["a", "b", "a", "b"], 2) == pytest.approx(2 / 3)
    assert repeated_share(["a", "b", "c"], 4) == 0


def test_a_recommendation_is_right_when_it_agrees_with_the_decision() -> None:
    def correct(paper: str, rating: float | None) -> float | None:
        return measure_review(review(paper, "x", rating, ()), PAPERS[paper]).get("recommendation_correct")

    assert correct("a", 6) == 1
    assert correct("a", 5.5) == 0
    assert correct("b", 6) == 0
    assert correct("b", 1) == 1
    assert correct("b", None) == 0  # no recommendation is not a right one, not even for a rejected paper
    assert correct("c", 6) is None
    strict = replace(PAPERS["a"], accept_rating=7)  # each paper's own: a venue's quantile differs from another's
    assert measure_review(review("a", "x", 6.5, ()), strict)["recommendation_correct"] == 0
    assert measure_review(review("w", "x", 3, ()), PaperFacts("withdrawn", (), 6))["recommendation_correct"] == 1


def test_the_rating_error_is_against_the_other_people() -> None:
    model = measure_review(review("a", "x", 4, ()), PAPERS["a"])
    human = measure_review(review("a", "x", 8, (), human=True), PAPERS["a"])
    assert model["rating_error"] == 3  # from the mean of 8 and 6
    assert human["rating_error"] == 2  # from the 6 of the other one
    assert "rating_error" not in measure_review(review("a", "x", None, ()), PAPERS["a"])
    assert "rating_error" not in measure_review(review("c", "x", 4, ()), PAPERS["c"])


def test_an_empty_review_is_counted() -> None:
    values = measure_review(review("a", " \n", None, (False,)), PAPERS["a"])
    assert (values["empty"], values["num_words"], values["has_rating"], values["checkmark_score"]) == (1, 0, 0, 0)
    assert "distinct_2" not in values


def test_every_paper_counts_the_same_however_many_reviews_it_has() -> None:
    reviews = [
        review("a", "one two", 7, (True, True), 3),
        review("a", "one two three", None, (True, False), 2),
        review("b", "one two", 6, (False, False), 1),
        review("c", "", 5, (False, True), 0),
    ]
    found = measure(reviews, PAPERS, {"q0": "Zero?", "q1": "One?"})
    overall = found["overall"]
    assert overall["checkmark_score"] == pytest.approx((1.5 + 0 + 1) / 3, abs=1e-6)
    assert overall["num_factors"] == pytest.approx((2.5 + 1 + 0) / 3, abs=1e-6)
    assert overall["has_rating"] == pytest.approx(2.5 / 3, abs=1e-6)
    assert overall["recommendation_correct"] == pytest.approx(0.25)  # a: half right, b: wrong, c: undecided
    assert overall["recommendation_f1"] == pytest.approx(0.5)  # one true positive, one false, one missed
    assert (overall["num_decided_papers"], overall["num_empty"]) == (2, 1)
    assert overall["repeated_reviews"] == 0.5
    assert [item["yes_share"] for item in found["items"]] == pytest.approx([1 / 3, 0.5], abs=1e-6)
    assert found["items"][0]["question"] == "Zero?"
    assert [factor["share"] for factor in found["factors"]] == pytest.approx([2 / 3, 1 / 3, 1 / 6], abs=1e-6)
    assert found["papers"][0]["scores"] == [2.0, 1.0]
    assert [paper["confusion"] for paper in found["papers"]] == [[1, 0, 1], [0, 1, 0], None]


def test_without_a_generated_corpus_there_are_no_factors() -> None:
    found = measure([review("a", "x y", 7, (True,))], PAPERS, {"q0": "?"})
    assert found["factors"] is None
    assert found["overall"]["num_factors"] is None
    assert found["overall"]["rating_rank_correlation"] is None


def test_f1_and_averages() -> None:
    assert f1_score(2, 1, 1) == pytest.approx(2 / 3, abs=1e-6)
    assert f1_score(0, 0, 0) is None
    assert average([1, None, 2]) == 1.5
    assert average([None]) is None


def test_rank_correlation_with_ties() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 45]) == 1
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5 of variances 4.5 and 5
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5, abs=1e-6)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2], [1, 2]) is None


def test_values_are_shown_as_one_reads_them() -> None:
    by_name = {item.name: item for item in MEASURES}
    assert by_name["checkmark_score"].show(3.14159) == "3.14"
    assert by_name["has_rating"].show(0.976) == "97.6%"
    assert by_name["checkmark_score"].show_difference(-1.5) == "−1.50"
    assert by_name["has_rating"].show_difference(0.012) == "+1.2"
    assert by_name["has_rating"].show_difference(-0.0001) == "0.0"
