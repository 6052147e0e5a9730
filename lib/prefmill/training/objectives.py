"""Preference objectives: one pure function each, from the scores of N pairs to N losses.

D = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)], s = the logistic function, b = beta,
e = label smoothing. A new objective is a function here, its line in `OBJECTIVES`, and its test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmill.core.config import nearest
from prefmill.core.errors import ConfigError


@dataclass(frozen=True)
class PairScores:
    """What an objective sees of N pairs, whatever the model family; every tensor is [N], float32 or float64.

    A score is the family's: a log-likelihood summed over tokens, an ELBO, a negative denoising error. Lengths count
    what it sums over. `soft_label` is the probability, in [0, 1], that the chosen side is the better one. `weight`
    is what a pair counts, 1 where there is none. Residuals, [N, D], are what the chosen side's score is the negative
    mean square of, under the policy and the reference.
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
    """The numbers of the objectives: beta > 0, label smoothing in [0, 0.5), SimPO's target margin."""

    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5


Loss = Callable[[PairScores, Settings], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss of pairs, and whether it needs the reference's scores."""

    loss: Loss
    needs_reference: bool


def sigmoid(scores: PairScores, settings: Settings) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), conservative where the label is smoothed or soft."""
    u, p = settings.beta * scores.margin, _label(scores, settings)
    return -p * logsigmoid(u) - (1 - p) * logsigmoid(-u)  # -(1-e) log s(bD) - e log s(-bD)


def hinge(scores: PairScores, settings: Settings) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023, arXiv 2305.10425) on the margin over the reference."""
    return torch.relu(1 - settings.beta * scores.margin)  # max(0, 1 - bD)


def robust(scores: PairScores, settings: Settings) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased where labels are flipped at rate e."""
    u, e = settings.beta * scores.margin, settings.label_smoothing
    return (-(1 - e) * logsigmoid(u) + e * logsigmoid(-u)) / (1 - 2 * e)  # [-(1-e) log s(bD) + e log s(-bD)]/(1-2e)


def ipo(scores: PairScores, settings: Settings) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17) as printed: on token sums."""
    return (scores.margin - 1 / (2 * settings.beta)) ** 2  # (D - 1/(2b))^2


def ipo_mean(scores: PairScores, settings: Settings) -> Tensor:
    """IPO on per-token averages, as TRL reduces it."""
    return (scores.mean_margin - 1 / (2 * settings.beta)) ** 2  # (D/|y| - 1/(2b))^2


def sigmoid_norm(scores: PairScores, settings: Settings) -> Tensor:
    """DPO on per-token averages (TRL's `sigmoid_norm`)."""
    u, p = settings.beta * scores.mean_margin, _label(scores, settings)
    return -p * logsigmoid(u) - (1 - p) * logsigmoid(-u)  # -log s(b D/|y|)


def simpo(scores: PairScores, settings: Settings) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6): per-token averages, a target margin, no reference."""
    means = scores.chosen / scores.chosen_length - scores.rejected / scores.rejected_length
    return -logsigmoid(settings.beta * means - settings.simpo_gamma)  # -log s(b(avg_w - avg_l) - gamma)


def sft(scores: PairScores, settings: Settings) -> Tensor:
    """An anchor to mix in: the chosen side's negative log-likelihood per token."""
    return -scores.chosen / scores.chosen_length  # -log pi(y_w) / |y_w|


OBJECTIVES: Mapping[str, Objective] = {
    "sigmoid": Objective(sigmoid, needs_reference=True),
    "hinge": Objective(hinge, needs_reference=True),
    "robust": Objective(robust, needs_reference=True),
    "ipo": Objective(ipo, needs_reference=True),
    "ipo_mean": Objective(ipo_mean, needs_reference=True),
    "sigmoid_norm": Objective(sigmoid_norm, needs_reference=True),
    "simpo": Objective(simpo, needs_reference=False),
    "sft": Objective(sft, needs_reference=False),
}


def mix(names: Sequence[str], weights: Sequence[float], settings: Settings) -> Objective:
    """The weighted sum of objectives; raises ConfigError for an unknown name or a missing weight."""
    for name in names:
        if name not in OBJECTIVES:
            raise ConfigError(
                f"no objective '{name}'{nearest(name, list(OBJECTIVES))}", expected=", ".join(OBJECTIVES),
                fix="correct loss_type",
            )  # fmt: skip
    if not names or len(names) != len(weights):
        raise ConfigError(
            "every objective needs a weight", got=f"loss_type={list(names)}, loss_weights={list(weights)}",
            expected="two lists of the same length", fix="give loss_weights one number for each loss_type",
        )  # fmt: skip
    if "robust" in names and settings.label_smoothing == 0:
        raise ConfigError(
            "the robust objective needs the rate of flipped labels", got="label_smoothing=0",
            expected="a number above 0 and below 0.5", fix="set label_smoothing, or use sigmoid, which it then equals",
        )  # fmt: skip
    parts = [(OBJECTIVES[name], weight) for name, weight in zip(names, weights, strict=True)]

    def loss(scores: PairScores, settings: Settings) -> Tensor:
        return torch.stack([weight * part.loss(scores, settings) for part, weight in parts]).sum(0)

    return Objective(loss, any(part.needs_reference for part, _ in parts))


def _label(scores: PairScores, settings: Settings) -> Tensor | float:
    """The probability that the chosen side is the better one."""
    return 1 - settings.label_smoothing if scores.soft_label is None else scores.soft_label
