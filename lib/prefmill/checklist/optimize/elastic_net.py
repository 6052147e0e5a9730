"""Ridge and elastic-net paths over all items, with weights that are not negative or of either sign.

Where many items tell a little, each too little to be chosen again in every sample of papers, shrinking all of them
predicts better than keeping few (Zou and Hastie 2005; Hastie, Tibshirani and Friedman 2009, section 3.6).
"""

from __future__ import annotations

import numpy as np

from prefmill.checklist.optimize.lasso import solve
from prefmill.checklist.optimize.moments import Array

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
