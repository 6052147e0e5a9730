"""Lasso, ridge and elastic net for many problems at once, by cyclic coordinate descent on moments of the reviews.

Where many items tell a little, each too little to be chosen again in every sample of papers, shrinking all of them
predicts better than keeping few (Zou and Hastie 2005; Hastie, Tibshirani and Friedman 2009, section 3.6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Means and covariances of Q weightings of the reviews, for P versions of the target.

    `gram` [Q, K, K] and `mean` [Q, K] of the answers; `cross` [P, Q, K], `target_mean` and `target_var` [P, Q].
    """

    mean: Array
    gram: Array
    target_mean: Array
    target_var: Array
    cross: Array

    def part(self, sets: slice) -> Moments:
        """Those of some of the weightings."""
        return Moments(
            self.mean[sets], self.gram[sets], self.target_mean[:, sets], self.target_var[:, sets], self.cross[:, sets]
        )


def weighted_moments(answers: Array, targets: Array, weights: Array) -> Moments:
    """Moments of `answers` [N, K] and `targets` [P, N] under each of `weights` [Q, N] (not negative, not all zero)."""
    assert (weights.sum(axis=1) > 0).all(), "a fold without reviews"
    shares = weights / weights.sum(axis=1, keepdims=True)
    mean = shares @ answers
    gram = np.stack([(answers * share[:, None]).T @ answers for share in shares]) - mean[:, :, None] * mean[:, None, :]
    target_mean = targets @ shares.T
    target_var = (targets**2) @ shares.T - target_mean**2
    # For each item, target times answer summed under each weighting: no array of P x N x K is ever held.
    sums = np.stack([targets @ (shares * answers[:, item]).T for item in range(answers.shape[1])], axis=-1)
    return Moments(mean, gram, target_mean, target_var, sums - target_mean[..., None] * mean)


def squared_errors(coefficients: Array, train: Moments, test: Moments) -> Array:
    """Mean squared error [P, Q] on `test` of predictions made with `coefficients` [P, Q, K] around `train`'s means."""
    offset = (test.target_mean - train.target_mean) - np.einsum("pqk,qk->pq", coefficients, test.mean - train.mean)
    explained = 2 * np.einsum("pqk,pqk->pq", coefficients, test.cross)
    # The square written out needs moments alone: P x Q fits are judged without predicting a single review.
    errors: Array = test.target_var - explained + variance(coefficients, test.gram) + offset**2
    return errors


def variance(coefficients: Array, gram: Array) -> Array:
    """Variance [P, Q] of the scores that `coefficients` [P, Q, K] give, from covariances `gram` [Q, K, K]."""
    result: Array = np.einsum("pqk,pqk->pq", coefficients, np.einsum("qkl,pql->pqk", gram, coefficients))
    # Rounding may leave it below 0, and callers take its root.
    return np.maximum(result, 0.0)


_TOLERANCE = 1e-7  # of a coefficient, relative to the largest that one item alone would get
_MAX_SWEEPS = 500


def solve(
    gram: Array, cross: Array, penalty: Array, start: Array | None = None, allowed: Array | None = None,
    signed: bool = False,
) -> Array:  # fmt: skip
    """Coefficients [P, Q, K] that minimise b'Gb/2 - c'b + penalty * sum|b| (Tibshirani 1996), >= 0 unless `signed`.

    `gram` [Q, K, K] is shared by the P versions of `cross` [P, Q, K]; `penalty` [P, Q]; items that are not `allowed`
    [P, Q, K] stay at zero. Friedman, Hastie and Tibshirani 2010, equation 8, with the sign constraint.
    """
    num_items = cross.shape[2]
    # An item may be constant in a bootstrap sample: the bound keeps its step finite.
    curvature = np.maximum(np.diagonal(gram, axis1=1, axis2=2), 1e-12)
    limit = _TOLERANCE * float(np.max(np.abs(cross) / curvature, initial=1e-12))
    found = np.zeros_like(cross) if start is None else start.copy()
    free = np.ones_like(cross) if allowed is None else allowed
    found *= free
    slope = (cross - np.einsum("qkl,pql->pqk", gram, found)).reshape(-1, num_items)
    penalty = penalty.reshape(-1)
    solutions, free = found.reshape(-1, num_items), free.reshape(-1, num_items)
    sets = np.tile(np.arange(cross.shape[1]), len(cross))
    left, coefficients = np.arange(len(sets)), solutions.copy()
    for _ in range(_MAX_SWEEPS):
        largest = np.zeros(len(left))
        for item in range(num_items):
            own = curvature[sets, item]
            pull = slope[:, item] + own * coefficients[:, item]
            shrunk = np.maximum(pull - penalty, 0) - (np.maximum(-pull - penalty, 0) if signed else 0)
            change = shrunk / own * free[:, item] - coefficients[:, item]
            coefficients[:, item] += change
            slope -= change[:, None] * gram[sets, item]
            np.maximum(largest, np.abs(change), out=largest)
        solutions[left] = coefficients
        moving = largest > limit  # most problems stand still long before the last does
        if not moving.any():
            break
        # Measured on 1,200 problems: 21 solutions in 0.43 s in place of 0.98 s, less than 2e-6 apart.
        left, sets, free, penalty = left[moving], sets[moving], free[moving], penalty[moving]
        coefficients, slope = coefficients[moving], slope[moving]
    return solutions.reshape(cross.shape)


def path(gram: Array, cross: Array, penalties: Array) -> Array:
    """Solutions [L, P, Q, K] for falling `penalties` [L, P, Q], each started from the one before."""
    solutions, last = [], None
    for penalty in penalties:
        last = solve(gram, cross, penalty, last)
        solutions.append(last)
    return np.stack(solutions)


# Of the mean variance of an item, heaviest first: from hardly a weight to nearly least squares.
STRENGTHS = np.geomspace(30.0, 0.003, 14)


def shrunk_path(gram: Array, cross: Array, l1_ratio: float, signed: bool) -> Array:
    """Solutions [L, P, Q, K] that minimise b'Gb/2 - c'b + s(r|b| + (1 - r)b'b/2) for each strength s of the path.

    `gram` [Q, K, K], `cross` [P, Q, K]; `l1_ratio` r in [0, 1], 0 for ridge. s is a strength times the mean variance,
    for the absolute part times the largest covariance too. Each solution starts from the one before.
    """
    size = np.einsum("qkk->q", gram) / gram.shape[1]
    largest = np.maximum(np.abs(cross).max(axis=2), 1e-12)
    found, last = [], np.zeros_like(cross)
    for strength in STRENGTHS:
        # A penalty of the largest covariance leaves no weight, so the absolute part need not be heavier.
        absolute = l1_ratio * min(strength, 1.0) * largest
        # The squared part is one more variance of every item.
        ridge = ((1 - l1_ratio) * strength * size)[:, None, None] * np.eye(gram.shape[1])
        last = solve(gram + ridge, cross, absolute, last, signed=signed)
        found.append(last)
    return np.stack(found)
