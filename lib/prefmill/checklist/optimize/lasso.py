"""The lasso with weights that are not negative, for many problems at once, by cyclic coordinate descent on moments."""

from __future__ import annotations

import numpy as np

from prefmill.checklist.optimize.moments import Array

_TOLERANCE = 1e-7  # of a coefficient, relative to the largest that one item alone would get
_MAX_SWEEPS = 500


def solve(gram: Array, cross: Array, penalty: Array, start: Array | None = None, allowed: Array | None = None) -> Array:
    """Coefficients [P, Q, K] >= 0 that minimise b'Gb/2 - c'b + penalty * sum(b) (Tibshirani 1996, constrained).

    `gram` [Q, K, K] is shared by the P versions of `cross` [P, Q, K]; `penalty` [P, Q]; items that are not `allowed`
    [P, Q, K] stay at zero. Friedman, Hastie and Tibshirani 2010, equation 8, with the sign constraint.
    """
    curvature = np.maximum(np.diagonal(gram, axis1=1, axis2=2), 1e-12)
    coefficients = np.zeros_like(cross) if start is None else start.copy()
    if allowed is not None:
        coefficients = coefficients * allowed
    slope = cross - np.einsum("qkl,pql->pqk", gram, coefficients)
    limit = _TOLERANCE * float(np.max(np.abs(cross) / curvature, initial=1e-12))
    for _ in range(_MAX_SWEEPS):
        largest = 0.0
        for item in range(cross.shape[2]):
            old = coefficients[:, :, item]
            new = np.maximum(0.0, old + (slope[:, :, item] - penalty) / curvature[:, item])
            change = new - old if allowed is None else (new - old) * allowed[:, :, item]
            size = float(np.abs(change).max())
            if size > 0:
                coefficients[:, :, item] = old + change
                slope -= change[:, :, None] * gram[None, :, item, :]
                largest = max(largest, size)
        if largest <= limit:
            break
    return coefficients


def path(gram: Array, cross: Array, penalties: Array) -> Array:
    """Solutions [L, P, Q, K] for falling `penalties` [L, P, Q], each started from the one before."""
    solutions, last = [], None
    for penalty in penalties:
        last = solve(gram, cross, penalty, last)
        solutions.append(last)
    return np.stack(solutions)
