"""How items are chosen and weighted: a lasso whose penalty and stability are judged on resampled papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefmill.checklist.optimize.config import SelectConfig
from prefmill.checklist.optimize.lasso import (
    Array,
    Moments,
    path,
    shrunk_path,
    solve,
    squared_errors,
    variance,
    weighted_moments,
)
from prefmill.checklist.optimize.targets import Target, read_labels, require_learnable, target_values
from prefmill.core.errors import InputError

Papers = NDArray[np.int64]
MODELS = ("chosen", "all_equal", "shrunk", "shrunk_signed")
_SMALLEST_PENALTY = 0.02  # of the one that leaves no item


@dataclass(frozen=True)
class Design:
    """The data: yes or no as `answers` [N, K] in units of their `spread` [K], `target` [N], `papers` [N]."""

    answers: Array
    spread: Array
    target: Array
    papers: Papers


@dataclass(frozen=True)
class Selection:
    """What was chosen for P versions of the target and Q training sets, in one array each.

    `penalties` [L, P, Q] and `errors` [L, P, Q] (mean squared, of the inner folds) with their standard errors;
    `chosen` [P, Q] the penalty's index; `stability` [P, Q, K] the share of bootstrap samples that chose the item;
    `model` [P, Q] the place in MODELS of the one that predicts the inner folds best; its `coefficients` [P, Q, K].
    """

    penalties: Array
    errors: Array
    error_ses: Array
    chosen: NDArray[np.int64]
    stability: Array
    model: NDArray[np.int64]
    coefficients: Array


def select(design: Design, targets: Array, training: Array, rules: SelectConfig, seed: int) -> Selection:
    """Choose items on each of `training` [Q, N] (0 or 1), for each of `targets` [P, N].

    The penalty is the largest whose grouped cross-validation error is within one standard error of the least
    (Hastie, Tibshirani and Friedman 2009, section 7.10); an item is kept when at least `min_stability` of the
    bootstrap samples of papers choose it at that penalty (Bach 2008); kept items are refitted by least squares.
    All of that is done in each inner fold too: where all items with equal weights predict the inner folds better
    than what it chose there, no choice is made (equal weights are hard to beat with few data: Dawes 1979). With
    `shrink`, all items with shrunk weights are taken where they predict these folds better by a standard error.
    """
    inner, held_out = _inner_sets(design.papers, training, rules.inner_folds, seed)
    sets = np.vstack([training, inner])
    found = weighted_moments(design.answers, targets, sets)
    test = weighted_moments(design.answers, targets, held_out)
    num_sets = len(training)
    penalties = _penalties(found.cross[:, :num_sets], rules.num_penalties)
    train = found.part(slice(num_sets, None))
    solutions = path(train.gram, train.cross, np.repeat(penalties, rules.inner_folds, axis=2))
    by_fold = np.stack([_by_fold(squared_errors(item, train, test), rules) for item in solutions])
    errors, error_ses = by_fold.mean(axis=-1), by_fold.std(axis=-1, ddof=1) / np.sqrt(rules.inner_folds)
    chosen = one_standard_error(errors, error_ses)
    penalty = np.take_along_axis(penalties, chosen[None], axis=0)[0]
    penalty = np.hstack([penalty, np.repeat(penalty, rules.inner_folds, axis=1)])
    stability = _stability(design, targets, sets, penalty, rules.num_bootstrap, seed)
    kept = (stability >= rules.min_stability).astype(float)
    fitted, equal = solve(found.gram, found.cross, np.zeros_like(penalty), allowed=kept), _equal(found, design.spread)
    models = [fitted, equal]
    if rules.shrink:
        signs = (False, True) if rules.signed else (False,)
        models += [_shrunk(found, train, test, num_sets, rules, signed) for signed in signs]
    folds = [_by_fold(squared_errors(item[:, num_sets:], train, test), rules) for item in models]
    model = _best(folds, rules)
    coefficients = np.take_along_axis(np.stack(models)[:, :, :num_sets], model[None, ..., None], axis=0)[0]
    return Selection(penalties, errors, error_ses, chosen, stability[:, :num_sets], model, coefficients)


def _shrunk(found: Moments, train: Moments, test: Moments, num_sets: int, rules: SelectConfig, signed: bool) -> Array:
    """Coefficients [P, Q * (1 + F), K] of all items, shrunk as much as predicts a training set's inner folds best."""
    solutions = shrunk_path(found.gram, found.cross, rules.l1_ratio, signed)
    errors = np.stack([_by_fold(squared_errors(item[:, num_sets:], train, test), rules).mean(-1) for item in solutions])
    best = errors.argmin(axis=0)
    place = np.hstack([best, np.repeat(best, rules.inner_folds, axis=1)])
    result: Array = np.take_along_axis(solutions, place[None, ..., None], axis=0)[0]
    return result


def _best(folds: list[Array], rules: SelectConfig) -> NDArray[np.int64]:
    """The model [P, Q] by errors [P, Q, F] of each: a later one must be better, a shrunk one by a standard error."""
    model: NDArray[np.int64] = (folds[1].mean(axis=-1) < folds[0].mean(axis=-1)).astype(np.int64)
    best = np.where(model[..., None], folds[1], folds[0])
    for place, errors in enumerate(folds[2:], 2):
        gain = best - errors
        # Of the paired difference: what makes a fold hard for both models is no doubt about which is better.
        surely = gain.mean(axis=-1) > gain.std(axis=-1, ddof=1) / np.sqrt(rules.inner_folds)
        model, best = np.where(surely, place, model), np.where(surely[..., None], errors, best)
    return model


def assign_inner_folds(papers: Papers, training: Array, num_folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for every review [Q, N], dealt out among the papers of each training set: none is empty there."""
    unique, first, index = np.unique(papers, return_index=True, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(unique))
    places = np.cumsum(training[:, first[order]] > 0, axis=1) % num_folds
    folds = np.empty_like(places)
    folds[:, order] = places
    result: NDArray[np.int64] = folds[:, index]
    return result


def one_standard_error(errors: Array, error_ses: Array) -> NDArray[np.int64]:
    """The index of the largest penalty, [P, Q], whose error [L, P, Q] is within one standard error of the least."""
    best = errors.argmin(axis=0)
    bound = np.take_along_axis(errors + error_ses, best[None], axis=0)
    # Penalties fall, so the first one within the bound is the largest.
    return np.asarray((errors <= bound).argmax(axis=0), dtype=np.int64)


def _inner_sets(papers: Papers, training: Array, num_folds: int, seed: int) -> tuple[Array, Array]:
    """Training and held-out part [Q * F, N] of every inner fold, a training set's folds together."""
    # Another seed than the outer folds have, so that inner folds do not follow their order.
    folds = assign_inner_folds(papers, training, num_folds, seed + 1)
    held_out = folds[:, None, :] == np.arange(num_folds)[None, :, None]
    shape = (-1, training.shape[1])
    return (training[:, None] * ~held_out).reshape(shape), (training[:, None] * held_out).reshape(shape)


def _by_fold(values: Array, rules: SelectConfig) -> Array:
    """[P, Q * F] as [P, Q, F]."""
    return values.reshape(len(values), -1, rules.inner_folds)


def _penalties(cross: Array, count: int) -> Array:
    # From the largest covariance on no weight is above 0. Where all are below 0, a penalty must not be.
    largest = np.maximum(cross.max(axis=2), 1e-12)
    penalties: Array = np.geomspace(1.0, _SMALLEST_PENALTY, count)[:, None, None] * largest
    return penalties


def _equal(found: Moments, spread: Array) -> Array:
    """Coefficients [P, Q, K] of the same weight for every yes, its size by least squares and not negative."""
    direction = np.broadcast_to(spread, found.cross.shape)
    size = np.maximum(found.cross @ spread, 0) / np.maximum(variance(direction, found.gram), 1e-12)
    result: Array = size[..., None] * direction
    return result


def _stability(design: Design, targets: Array, training: Array, penalty: Array, num_bootstrap: int, seed: int) -> Array:
    """The share [P, Q, K] of bootstrap samples of papers in which an item gets a positive coefficient.

    A small training set may have none of the papers of a sample, which then tells nothing of it.
    """
    unique, index = np.unique(design.papers, return_inverse=True)
    generator = np.random.default_rng(seed + 2)
    counts, num_samples = np.zeros((*penalty.shape, design.answers.shape[1])), np.zeros(len(training))
    for _ in range(num_bootstrap):
        # A paper's number of draws is its weight: a bootstrap sample without a copy of any review.
        drawn = generator.multinomial(len(unique), np.full(len(unique), 1 / len(unique)))[index]
        weights = training * drawn
        has_papers = weights.any(axis=1)
        sample = weighted_moments(design.answers, targets, weights[has_papers])
        counts[:, has_papers] += solve(sample.gram, sample.cross, penalty[:, has_papers]) > 0
        num_samples += has_papers
    result: Array = counts / np.maximum(num_samples, 1)[:, None]
    return result


Row = Mapping[str, Any]


def answers(reviews: Sequence[Row], ids: Sequence[str]) -> tuple[Array, Array]:
    """Yes as 0 or 1, and P(yes), [N, K] each."""
    values = np.array([[row["answers"][name][:2] for name in ids] for row in reviews], dtype=np.float64)
    # Without ids numpy gives [N, 0] and no last axis.
    values = values.reshape(len(reviews), len(ids), 2)
    return values[..., 0], values[..., 1]


def with_target(reviews: Sequence[Row], config: SelectConfig, outer_folds: int) -> tuple[list[Row], Array, int]:
    """The reviews that have a target, their targets [N], and how many labels were of no dev review.

    Raises InputError where there are too few, or nothing varies.
    """
    labels = read_labels(config.labels) if config.labels else {}
    values = target_values(config.target, reviews, config.accept_rating, labels)
    if labels and reviews and not values:
        raise InputError(
            "no label is of a dev review", where=config.labels, got=f"{len(labels)} labels, such as of {min(labels)!r}",
            expected=f"ids of dev reviews, such as {reviews[0]['review_id']!r}",
            fix="write review ids as the corpus has them, or give dev a larger share in ingest_reviews",
        )  # fmt: skip
    chosen = [row for row in reviews if row["review_id"] in values]
    papers = {row["paper_id"] for row in chosen}
    require_learnable(config.target, values, len(papers), config.min_labels, max(outer_folds, config.inner_folds))
    target = np.array([values[row["review_id"]] for row in chosen])
    return chosen, target, len(set(labels) - {row["review_id"] for row in reviews})


def design_of(reviews: Sequence[Row], target: Array, ids: Sequence[str]) -> Design:
    """The data for the choice among `ids`.

    The spread of the answers says nothing of the target, so that it may be taken from all reviews.
    """
    yes, _ = answers(reviews, ids)
    spread = yes.std(axis=0)
    assert (spread > 0).all(), "constant items are dropped before"
    _, papers = np.unique([row["paper_id"] for row in reviews], return_inverse=True)
    # In units of their spread one penalty is as strict with rare answers as with frequent ones.
    return Design(yes / spread, spread, target, papers.astype(np.int64))


def baseline_features(reviews: Sequence[Row], target: Target) -> dict[str, Array]:
    """What the baselines are fitted on: length or rating, each with its square, as extremes may differ from both.

    The rating is none where it is the target itself.
    """
    columns = {"length_only": np.log1p([row["num_words"] for row in reviews])}
    if target != "rating":
        columns["rating_only"] = np.array([row["rating"] for row in reviews], dtype=np.float64)
    return {name: np.column_stack([values, values**2]) for name, values in columns.items()}
