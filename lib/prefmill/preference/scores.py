"""What an objective sees of a batch of pairs, whatever the model family."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairScores:
    """Scores of both sides of B pairs; every tensor is [B], float32 or float64.

    A score is what the family calls the sample's score under the model: a log-likelihood summed over the
    completion's tokens, an ELBO, a negative denoising error. `lengths` count what it sums over. `soft_labels`
    are probabilities in [0, 1] that the chosen side is the better one. `*_shared` are the parts of the scores that
    fall on the first min(chosen, rejected) tokens, for objectives that weigh the rest differently.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    soft_labels: Tensor | None = None
    chosen_shared: Tensor | None = None
    rejected_shared: Tensor | None = None
    reference_chosen_shared: Tensor | None = None
    reference_rejected_shared: Tensor | None = None

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi(y_w|x) - log pi_ref(y_w|x), [B]."""
        assert self.reference_chosen is not None, "the objective did not declare that it needs the reference"
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi(y_l|x) - log pi_ref(y_l|x), [B]."""
        assert self.reference_rejected is not None, "the objective did not declare that it needs the reference"
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """Delta: the chosen ratio minus the rejected one, [B]; without a reference the difference of the scores."""
        if self.reference_chosen is None:
            return self.chosen - self.rejected
        return self.chosen_ratio - self.rejected_ratio

    def damped(self, alpha: float) -> PairScores:
        """These scores with what lies beyond the shared length weighed by `alpha` in [0, 1]; 1 changes nothing.

        LD-DPO, arXiv 2409.06411: both sides then compare over the same number of fully counted tokens.
        """
        weighed = {
            name: _damp(getattr(self, name), getattr(self, f"{name}_shared"), alpha)
            for name in ("chosen", "rejected", "reference_chosen", "reference_rejected")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **weighed)


def _damp(total: Tensor, shared: Tensor | None, alpha: float) -> Tensor:
    assert shared is not None, "the scorer gave no shared-length scores"
    return shared + alpha * (total - shared)
