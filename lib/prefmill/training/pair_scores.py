"""What every objective sees: the scores of N pairs, and the numbers of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairScores:
    """What an objective sees of N pairs, whatever the model family; every tensor is [N], float32 or float64.

    A score is the family's: a log-likelihood summed over tokens, an ELBO, a negative denoising error. Lengths count
    what it sums over. `soft_label` is the probability, in [0, 1], that the chosen side is the better one. `weight`
    is what a pair counts, 1 where there is none. Residuals, [N, D], are what the chosen side's score is the negative
    mean square of, under the policy and the reference. Of a model with K heads a score is their mean, the margin of
    head k is `margin + head_deviations[:, k]`, and `head_labels` [N, K] are soft labels, NaN where nobody said. Where
    scores are lower bounds of a log-likelihood, `rejected_upper` and `ref_rejected_upper` may hold upper ones.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    soft_label: Tensor | None = None
    weight: Tensor | None = None
    chosen_residual: Tensor | None = None
    ref_chosen_residual: Tensor | None = None
    head_deviations: Tensor | None = None
    head_labels: Tensor | None = None
    rejected_upper: Tensor | None = None
    ref_rejected_upper: Tensor | None = None

    @property
    def margin(self) -> Tensor:
        """D, [N]; without a reference the difference of the scores themselves."""
        if self.ref_chosen is None or self.ref_rejected is None:
            return self.chosen - self.rejected
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)

    @property
    def mean_margin(self) -> Tensor:
        """D with every side averaged over its length, [N]."""
        chosen = self.chosen if self.ref_chosen is None else self.chosen - self.ref_chosen
        rejected = self.rejected if self.ref_rejected is None else self.rejected - self.ref_rejected
        return chosen / self.chosen_length - rejected / self.rejected_length


@dataclass(frozen=True)
class Settings:
    """The numbers of the objectives: beta > 0, label smoothing in [0, 0.5), SimPO's target margin.

    DSPO's lambda, which its authors set to beta, and whether the factors it multiplies are kept from the gradient.
    MaPO's signal-to-noise factor of an error, above 0, and the diffusion's number of timesteps. SPG's share of the
    upper bound, in [0, 1]; ESPO's clip, in (0, 1).
    """

    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    dspo_lambda: float = 1.0
    dspo_stop_gradient: bool = True
    mapo_snr: float = 0.5
    num_timesteps: int = 1000
    upper_weight: float = 0.5
    clip: float = 0.2


def label(scores: PairScores, settings: Settings) -> Tensor | float:
    """The probability that the chosen side is the better one."""
    return 1 - settings.label_smoothing if scores.soft_label is None else scores.soft_label
