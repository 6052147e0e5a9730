"""How items are chosen and weighted: a lasso whose penalty and stability are judged on resampled papers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefmill.checklist.optimize.lasso import path, solve
from prefmill.checklist.optimize.moments import Array, Moments, squared_errors, weighted_moments

Papers = NDArray[np.int64]
_SMALLEST_PENALTY = 0.02  # of the one that leaves no item


@dataclass(frozen=True)
class SelectionRules:
    """How strict the choice is; every number follows from these and the data."""

    num_folds: int
    num_penalties: int
    num_bootstrap: int
    min_stability: float
    seed: int


@dataclass(frozen=True)
class Selection:
    """What was chosen for P versions of the target and Q training sets, in one array each.

    `penalties` [L, P, Q] and `errors` [L, P, Q] (mean squared, of the inner folds) with their standard errors;
    `chosen` [P, Q] the penalty's index; `stability` [P, Q, K] the share of bootstrap samples that chose the item;
    `coefficients` [P, Q, K] of the items kept, refitted without penalty.
    """

    penalties: Array
    errors: Array
    error_ses: Array
    chosen: NDArray[np.int64]
    stability: Array
    coefficients: Array


def select(answers: Array, targets: Array, papers: Papers, training: Array, rules: SelectionRules) -> Selection:
    """Choose items on each of `training` [Q, N] (0 or 1), for `answers` [N, K], `targets` [P, N], `papers` [N].

    The penalty is the largest whose grouped cross-validation error is within one standard error of the least
    (Hastie, Tibshirani and Friedman 2009, section 7.10); an item is kept when at least `min_stability` of the
    bootstrap samples of papers choose it at that penalty (Bach 2008); kept items are refitted by least squares.
    """
    whole = weighted_moments(answers, targets, training)
    penalties = _penalties(whole, rules.num_penalties)
    errors, error_ses = _inner_errors(answers, targets, papers, training, penalties, rules)
    chosen = one_standard_error(errors, error_ses)
    penalty = np.take_along_axis(penalties, chosen[None], axis=0)[0]
    stability = _stability(answers, targets, papers, training, penalty, rules)
    kept = (stability >= rules.min_stability).astype(float)
    coefficients = solve(whole.gram, whole.cross, np.zeros_like(penalty), allowed=kept)
    return Selection(penalties, errors, error_ses, chosen, stability, coefficients)


def assign_folds(papers: Papers, num_folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for every review [N]; the reviews of a paper share one, and folds differ by at most one paper."""
    unique, index = np.unique(papers, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(unique))
    folds: NDArray[np.int64] = (order % num_folds)[index]
    return folds


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
    return np.asarray((errors <= bound).argmax(axis=0), dtype=np.int64)


def _penalties(whole: Moments, count: int) -> Array:
    largest = np.maximum(whole.cross.max(axis=2), 1e-12)
    penalties: Array = np.geomspace(1.0, _SMALLEST_PENALTY, count)[:, None, None] * largest
    return penalties


def _inner_errors(
    answers: Array, targets: Array, papers: Papers, training: Array, penalties: Array, rules: SelectionRules
) -> tuple[Array, Array]:
    """Mean and standard error [L, P, Q] over the inner folds of the held-out mean squared error."""
    folds = assign_inner_folds(papers, training, rules.num_folds, rules.seed + 1)
    errors = []
    for fold in range(rules.num_folds):
        inside = folds == fold
        train = weighted_moments(answers, targets, training * ~inside)
        test = weighted_moments(answers, targets, training * inside)
        solutions = path(train.gram, train.cross, penalties)
        errors.append(np.stack([squared_errors(item, train, test) for item in solutions]))
    stacked = np.stack(errors)
    return stacked.mean(axis=0), stacked.std(axis=0, ddof=1) / np.sqrt(rules.num_folds)


def _stability(
    answers: Array, targets: Array, papers: Papers, training: Array, penalty: Array, rules: SelectionRules
) -> Array:
    """The share [P, Q, K] of bootstrap samples of papers in which an item gets a positive coefficient."""
    unique, index = np.unique(papers, return_inverse=True)
    generator = np.random.default_rng(rules.seed + 2)
    counts = np.zeros_like(penalty)[..., None] + np.zeros(answers.shape[1])
    for _ in range(rules.num_bootstrap):
        drawn = generator.multinomial(len(unique), np.full(len(unique), 1 / len(unique)))[index]
        sample = weighted_moments(answers, targets, training * drawn)
        counts += solve(sample.gram, sample.cross, penalty) > 0
    return counts / rules.num_bootstrap
