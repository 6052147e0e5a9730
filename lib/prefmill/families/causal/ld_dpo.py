"""LD-DPO (Liu et al. 2024, arXiv 2409.06411): what a response says beyond the length of its rival counts less.

log pi(y) becomes the sum over the first min(|y_w|, |y_l|) tokens plus alpha times that over the others (eq. 11), for
policy and reference alike. alpha = 1 is DPO; every objective but `sft`, which compares nothing, is had of these sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefmill.families.causal.scorer import Batch
from prefmill.training.data import Pair
from prefmill.training.family import Family
from prefmill.training.objectives import PairScores


@dataclass(frozen=True)
class DesensitizedFamily(Family):
    """A causal family whose pairs are scored by desensitized sums; `alpha` in [0, 1]."""

    alpha: float = 1.0

    def pair_scores(
        self, model: Any, batch: Any, ref_chosen: Tensor | None = None, ref_rejected: Tensor | None = None
    ) -> PairScores:
        """The scores of a batch's pairs; lengths stay those of the whole responses."""
        tokens = self.score(model, per_token(batch))
        sides = (batch.lengths, batch.chosen, batch.rejected)
        chosen, rejected = pair_sums(tokens, *sides, self.alpha)
        whole, _ = pair_sums(tokens, *sides, alpha=1.0)
        lengths = batch.lengths.to(tokens.dtype)
        return PairScores(
            chosen, rejected, lengths[batch.chosen], lengths[batch.rejected], ref_chosen, ref_rejected,
            chosen_whole=whole,
        )  # fmt: skip

    def reference_sides(self, scores: Tensor, index: int, pair: Any) -> tuple[Tensor, Tensor]:
        """A pair's rows of `reference_sums`."""
        return scores[index, 0], scores[index, 1]


def per_token(batch: Batch) -> Batch:
    """`batch` with a score for each of its C completion tokens instead of one a response."""
    count = len(batch.target)
    # The scorer sums by owner: with an owner for every token it sums nothing.
    return replace(batch, owner=torch.arange(count, device=batch.target.device), lengths=torch.ones_like(batch.target))


def reference_sums(tokens: Tensor, lengths: Sequence[int], pairs: Sequence[Pair], alpha: float) -> Tensor:
    """The sums of both sides of a group's pairs, [N, 2], from the log-likelihoods of all its responses' tokens, [C]."""
    chosen, rejected = (torch.tensor([getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected"))
    return torch.stack(pair_sums(tokens.cpu(), torch.tensor(lengths), chosen, rejected, alpha), dim=1)


def pair_sums(tokens: Tensor, lengths: Tensor, chosen: Tensor, rejected: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Desensitized sums of N pairs, [N] each, from log-likelihoods of tokens [C], response after response.

    `lengths` [S] are the responses', `chosen` and `rejected` [N] places in [0, S).
    """
    # A response may be in several pairs: it has other weights beside a longer rival.
    sides = torch.cat([chosen, rejected])
    shared = torch.minimum(lengths[chosen], lengths[rejected]).repeat(2)
    owner = torch.arange(len(sides), device=sides.device).repeat_interleave(lengths[sides])
    first = lengths[sides].cumsum(0) - lengths[sides]
    place = torch.arange(len(owner), device=sides.device) - first[owner]
    begin = (lengths.cumsum(0) - lengths)[sides]
    weight = torch.where(place < shared[owner], tokens.new_tensor(1.0), tokens.new_tensor(alpha))
    sums = tokens.new_zeros(len(sides)).index_add(0, owner, tokens.index_select(0, begin[owner] + place) * weight)
    return sums[: len(chosen)], sums[len(chosen) :]
