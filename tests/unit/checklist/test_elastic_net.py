"""Shrunk weights: against the closed form, the conditions of an optimum, and reviews of three conferences."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import nnls

from prefmill.checklist.engine import LexicalConfig
from prefmill.checklist.items import load_checklist
from prefmill.checklist.lexical import LexicalEngine
from prefmill.checklist.optimize.config import SelectConfig
from prefmill.checklist.optimize.export_step import spread_over
from prefmill.checklist.optimize.held_out import (
    checklist_scores,
    correlation,
    fitted_scores,
    outer_training,
    permutation_test,
    permuted,
)
from prefmill.checklist.optimize.lasso import STRENGTHS, shrunk_path, weighted_moments
from prefmill.checklist.optimize.selection import MODELS, Design, select
from prefmill.core.statistics import Resampling

REVIEWS = Path(__file__).parents[4] / "shared" / "data" / "reviews" / "iclr_reviews.jsonl.gz"
RULES = SelectConfig(inner_folds=5, num_penalties=12, num_bootstrap=10, min_stability=0.9)
RESAMPLING = Resampling(1000, 0, 0.95)


def problem(seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    answers = (generator.random((200, 6)) < 0.5) + 0.3 * generator.normal(size=(200, 6))
    targets = np.stack([answers @ generator.normal(size=6) + generator.normal(size=200) for _ in range(2)])
    found = weighted_moments(answers, targets, generator.random((3, 200)))
    return found.gram, found.cross


def test_signed_ridge_is_the_closed_form() -> None:
    gram, cross = problem()
    size = np.einsum("qkk->q", gram) / 6
    for strength, solution in zip(STRENGTHS, shrunk_path(gram, cross, 0.0, signed=True), strict=True):
        whole = gram + strength * size[:, None, None] * np.eye(6)
        expected = np.linalg.solve(whole[None], cross[..., None])[..., 0]
        np.testing.assert_allclose(solution, expected, atol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_an_elastic_net_meets_the_conditions_of_an_optimum(signed: bool) -> None:
    gram, cross = problem(1)
    size, largest = np.einsum("qkk->q", gram) / 6, np.abs(cross).max(axis=2)
    for strength, solution in zip(STRENGTHS, shrunk_path(gram, cross, 0.5, signed), strict=True):
        absolute = 0.5 * min(strength, 1.0) * largest[..., None]
        pull = cross - np.einsum("qkl,pql->pqk", gram, solution) - 0.5 * strength * size[:, None] * solution
        used = solution != 0
        np.testing.assert_allclose(pull[used], (absolute * np.sign(solution))[used], atol=1e-5)
        assert ((np.abs(pull) if signed else pull) <= absolute + 1e-5)[~used].all()
        assert signed or (solution >= 0).all()


def test_a_checklist_of_one_item_still_has_scores_that_differ() -> None:
    assert spread_over({"a": 0.4}, 24) == {"a": 24.0}
    assert spread_over({"a": 3.0, "b": -1.0}, 24) == {"a": 18.0, "b": -6.0}


@pytest.fixture(scope="module")
def ratings() -> Design:
    """The shipped items, by rule, on 700 papers' reviews, with their ratings."""
    if not REVIEWS.is_file():
        pytest.skip("the shared reviews are not beside this checkout")
    engine, answers, target, papers = LexicalEngine(LexicalConfig(evidence=False), load_checklist()), [], [], []
    with gzip.open(REVIEWS) as stream:
        rows = [json.loads(line) for line in stream]
    some = sorted({row["paper_id"] for row in rows})[::3]
    for row in (row for row in rows if row["paper_id"] in set(some)):
        paper: Any = {"paper_id": row["paper_id"], "title": "", "abstract": "", "text": ""}
        (outcome,) = engine.score([(paper, [{**row, "text": row["review_text"]}])])
        answers.append([float(answer["yes"]) for answer in outcome.answers.values()])
        target.append(float(row["rating"]))
        papers.append(some.index(row["paper_id"]))
    yes = np.array(answers)
    yes = yes[:, (yes.mean(axis=0) > 0.02) & (yes.mean(axis=0) < 0.98)]
    return Design(yes / yes.std(axis=0), yes.std(axis=0), np.array(target), np.array(papers))


def held_out(design: Design, scores: Any) -> float:
    return correlation(scores, design, outer_training(design.papers, 5, 0), RESAMPLING).value


def _by_nnls(design: Design, rows: Any) -> Any:
    """What scipy's non-negative least squares of the `rows` predicts for all others; 0 for themselves."""
    used = rows > 0
    means, level = design.answers[used].mean(axis=0), design.target[used].mean()
    weights, _ = nnls(design.answers[used] - means, design.target[used] - level)
    return np.where(used, 0.0, (design.answers - means) @ weights + level)


@pytest.mark.slow
def test_on_real_reviews_it_predicts_as_well_as_all_items_by_least_squares(ratings: Design) -> None:
    training = outer_training(ratings.papers, 5, 0)
    sparse, shrunk, signed = (
        held_out(ratings, checklist_scores(ratings, training, rules, 0))
        for rules in (RULES.model_copy(update={"shrink": False}), RULES, RULES.model_copy(update={"signed": True}))
    )
    free = held_out(ratings, fitted_scores(ratings.answers, ratings.target, training))
    assert min(shrunk, 0.28) > sparse
    assert shrunk >= held_out(ratings, np.sum([_by_nnls(ratings, rows) for rows in training], axis=0))
    assert signed > free - 0.01  # ridge of both signs beside least squares over all items
    everything = np.ones((1, len(ratings.target)))
    assert MODELS[select(ratings, ratings.target[None], everything, RULES, 0).model.item()] == "shrunk"


@pytest.mark.slow
def test_on_shuffled_ratings_there_is_no_signal(ratings: Design) -> None:
    training = outer_training(ratings.papers, 3, 0)
    (shuffled,) = permuted(ratings.target, ratings.papers, 1, seed=5)
    design = Design(ratings.answers, ratings.spread, shuffled, ratings.papers)
    rules = SelectConfig(inner_folds=3, num_penalties=8, num_bootstrap=10, min_stability=0.9, signed=True)
    assert permutation_test(design, training, rules, 0, 19, lambda *_: None)[1] > 0.05
    assert permutation_test(ratings, training, rules, 0, 19, lambda *_: None)[1] == 0.05
