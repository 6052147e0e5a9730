"""An upper bound of a response's log-likelihood from the same masked passes as the lower one (SPG, arXiv 2510.09541).

U(y|x) = (1/b) sum_i log E[ w 1(i masked) p(y_i | y with others masked, x)^b ], w as for the lower bound, so that
E[w 1(i masked)] = 1. By Jensen it is at least that bound for every b > 0. It bounds log p, the model's likelihood over
random orders, where b is at least the number of tokens (Hoelder); SPG takes b = 1.5 and leaves out a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upper_bounds(
    logps: Tensor, sample: Tensor, column: Tensor, weights: Tensor, lengths: Tensor, width: int, power: float
) -> Tensor:
    """U of S samples, [S] float64, from masked tokens' log-probabilities [C] and the `weights` [C] of their draws.

    `sample` and `column` [C] say whose they are, `lengths` [S] how many tokens a response has, `width` is of a row.
    Each token's weights are scaled to sum to 1, as they do in the mean; tokens that no draw masked count as the others.
    """
    place = sample * width + column
    size = len(lengths) * width
    scaled = power * logps.double()
    # Largest first: p^b of an unlikely token is 0 in any precision.
    top = torch.full((size,), -torch.inf, dtype=torch.float64, device=logps.device)
    top = top.scatter_reduce(0, place, scaled.detach(), "amax")
    zeros = torch.zeros_like(top)
    share = zeros.index_add(0, place, weights.double() * torch.exp(scaled - top[place]))
    seen = zeros.index_add(0, place, weights.double())
    masked = seen > 0
    means = (share / seen).where(masked, torch.ones_like(seen))
    tokens = means.log() + top.masked_fill(~masked, 0.0)
    totals = (tokens / power).view(-1, width).sum(1)
    result: Tensor = totals * lengths / masked.view(-1, width).sum(1)
    return result
