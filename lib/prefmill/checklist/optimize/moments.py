"""First and second moments of reviews under many weightings at once: all that least squares needs to know."""

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
            self.mean[sets],
            self.gram[sets],
            self.target_mean[:, sets],
            self.target_var[:, sets],
            self.cross[:, sets],
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
