"""Ridge and elastic-net paths over all items, with weights that are not negative or of either sign.

Where many items tell a little, each too little to be chosen again in every sample of papers, shrinking all of them
predicts better than keeping few (Zou and Hastie 2005; Hastie, Tibshirani and Friedman 2009, section 3.6).
"""

from __future__ import annotations

import numpy as np

from prefmill.checklist.optimize.moments import Array

_TOLERANCE = 1e-7  # of a coefficient, relative to the largest that one item alone would get
_MAX_SWEEPS = 300
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
        last = _solve(gram, cross, absolute, (1 - l1_ratio) * strength * size, last, signed)
        found.append(last)
    return np.stack(found)


def _solve(gram: Array, cross: Array, absolute: Array, squared: Array, start: Array, signed: bool) -> Array:
    """Cyclic coordinate descent (Friedman, Hastie and Tibshirani 2010, equation 8)."""
    curvature = np.maximum(np.einsum("qkk->qk", gram) + squared[:, None], 1e-12)
    limit = _TOLERANCE * float(np.max(np.abs(cross) / curvature, initial=1e-12))
    found = start.copy()
    slope = cross - np.einsum("qkl,pql->pqk", gram, found)
    for _ in range(_MAX_SWEEPS):
        largest = 0.0
        for item in range(cross.shape[2]):
            pull = slope[..., item] + gram[:, item, item] * found[..., item]
            shrunk = np.maximum((np.abs(pull) if signed else pull) - absolute, 0.0) / curvature[:, item]
            new = np.sign(pull) * shrunk if signed else shrunk
            change = new - found[..., item]
            found[..., item] = new
            slope -= change[..., None] * gram[:, item]
            largest = max(largest, float(np.abs(change).max()))
        if largest <= limit:
            break
    return found
