"""What a model family gives the one preference trainer: batches of its samples, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefmill.training.batches import AnyGroup, GroupPart
from prefmill.training.objective_names import OF_TEXT, Need
from prefmill.training.objectives import PairScores

Reference = Callable[[int, int], Tensor]
"""The reference's scores of a group's samples, [S, ...], by the group's place and the epoch."""


@dataclass(frozen=True)
class Family:
    """How a model family scores.

    `encode` makes the batch that some pairs of some groups need in an epoch, its pairs in the order of the parts: S
    samples, `chosen` and `rejected` [N] their places in it, `lengths` [S];
    `score` gives every sample of a batch its score under a model, [S]. A family whose scores say more (a value a
    draw, [S, n]; residuals; a soft label) overrides `pair_scores`, and `supplies`: what objectives may need of it.
    """

    supplies: ClassVar[frozenset[Need]] = OF_TEXT

    encode: Callable[[Sequence[Any], Sequence[GroupPart], int], Any]
    score: Callable[[Any, Any], Tensor]

    def pair_scores(
        self, model: Any, batch: Any, ref_chosen: Tensor | None = None, ref_rejected: Tensor | None = None
    ) -> PairScores:
        """The scores of a batch's pairs under `model`; the reference's are [N, ...], or None without one."""
        scores = self.score(model, batch)
        lengths = batch.lengths.to(scores.dtype)
        return PairScores(
            # A response of several pairs was run once; its gradient is the sum over them.
            scores[batch.chosen],
            scores[batch.rejected],
            lengths[batch.chosen],
            lengths[batch.rejected],
            ref_chosen,
            ref_rejected,
        )

    def beside(self, model: Any) -> Tensor | float:
        """What a pair's loss has beside the objective, of the batch that `model` scored last: a scalar."""
        # A mixture of experts gives its balancing loss here, outside the objective: docs/decisions/0138.
        return 0.0

    def reference_sides(self, scores: Tensor, index: int, pair: Any) -> tuple[Tensor, Tensor]:
        """Chosen and rejected of a group's pair number `index` in the reference's scores of the group."""
        return scores[pair.chosen], scores[pair.rejected]


def by_group(scores: Sequence[Tensor]) -> Reference:
    """A reference whose scores, [S] a group, are the same in every epoch."""
    return lambda group, epoch: scores[group]


def reference_of_pairs(
    family: Family, reference: Reference, groups: Sequence[AnyGroup], parts: Sequence[GroupPart], epoch: int
) -> tuple[Tensor, Tensor]:
    """The reference's scores of chosen and rejected, each [N, ...], in the order of the parts' pairs."""
    sides = [
        family.reference_sides(scores, index, groups[part.group].pairs[index])
        for part in parts
        for scores in [reference(part.group, epoch)]  # looked up once, and not for each pair
        for index in part.pairs
    ]
    chosen, rejected = zip(*sides, strict=True)
    return torch.stack(chosen), torch.stack(rejected)
