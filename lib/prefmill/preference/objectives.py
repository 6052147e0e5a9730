"""Preference objectives: one pure function each, from the scores of B pairs to B losses.

Delta = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)), s = the logistic function, b = beta.
A new objective is a function here, its line in `OBJECTIVES`, and its test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field, model_validator

from prefmill.config import StrictConfig
from prefmill.preference.scores import PairScores

if TYPE_CHECKING:
    from torch import Tensor

Name = Literal["sigmoid", "hinge", "robust", "ipo", "ipo_sum", "sigmoid_norm", "simpo", "sft"]
Need = Literal["reference", "shared"]


class ObjectiveConfig(StrictConfig):
    """Which losses to add up, by weight, and their parameters, under TRL's names where it has them."""

    loss_type: list[Name] = Field(["sigmoid"], min_length=1)
    loss_weights: list[float] | None = None
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    simpo_gamma: float = Field(0.5, ge=0)
    ld_alpha: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_weight_a_loss(self) -> ObjectiveConfig:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights needs {len(self.loss_type)} numbers, one for each loss_type")
        return self


Loss = Callable[[PairScores, ObjectiveConfig], "Tensor"]


def sigmoid(scores: PairScores, config: ObjectiveConfig) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; conservative DPO with label smoothing e or soft labels."""
    from torch.nn.functional import logsigmoid

    u = config.beta * scores.margin
    p = 1 - config.label_smoothing if scores.soft_labels is None else scores.soft_labels
    return -p * logsigmoid(u) - (1 - p) * logsigmoid(-u)  # -(1-e) log s(b Delta) - e log s(-b Delta)


def hinge(scores: PairScores, config: ObjectiveConfig) -> Tensor:
    """SLiC's hinge, Zhao et al. 2023 (arXiv 2305.10425), on the margin over the reference."""
    return (1 - config.beta * scores.margin).relu()  # max(0, 1 - b Delta)


def robust(scores: PairScores, config: ObjectiveConfig) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409): unbiased under labels flipped at rate e."""
    from torch.nn.functional import logsigmoid

    u, e = config.beta * scores.margin, config.label_smoothing
    return (-(1 - e) * logsigmoid(u) + e * logsigmoid(-u)) / (1 - 2 * e)  # [(1-e) L(D) - e L(-D)] / (1-2e)


def ipo(scores: PairScores, config: ObjectiveConfig) -> Tensor:
    """IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17, on per-token averages, as TRL reduces it."""
    averaged = scores.chosen_ratio / scores.chosen_lengths - scores.rejected_ratio / scores.rejected_lengths
    return (averaged - 1 / (2 * config.beta)) ** 2  # (h - 1/(2 tau))^2, h averaged over tokens


def ipo_sum(scores: PairScores, config: ObjectiveConfig) -> Tensor:
    """IPO as eq. 17 is printed: on token sums."""
    return (scores.margin - 1 / (2 * config.beta)) ** 2  # (h - 1/(2 tau))^2


def sigmoid_norm(scores: PairScores, config: ObjectiveConfig) -> Tensor:
    """DPO on per-token averages of the ratios (TRL's `sigmoid_norm`)."""
    from torch.nn.functional import logsigmoid

    averaged = scores.chosen_ratio / scores.chosen_lengths - scores.rejected_ratio / scores.rejected_lengths
    return -logsigmoid(config.beta * averaged)  # -log s(b ratio_w/|y_w| - b ratio_l/|y_l|)


def simpo(scores: PairScores, config: ObjectiveConfig) -> Tensor:
    """SimPO, Meng et al. 2024 (arXiv 2405.14734), eq. 6: no reference, per-token averages, a target margin gamma."""
    from torch.nn.functional import logsigmoid

    averaged = scores.chosen / scores.chosen_lengths - scores.rejected / scores.rejected_lengths
    return -logsigmoid(config.beta * averaged - config.simpo_gamma)  # -log s(b/|y_w| lp_w - b/|y_l| lp_l - gamma)


def sft(scores: PairScores, config: ObjectiveConfig) -> Tensor:
    """An anchor to mix in: the chosen side's negative log-likelihood per token."""
    return -scores.chosen / scores.chosen_lengths  # -log pi(y_w|x) / |y_w|


@dataclass(frozen=True)
class _Entry:
    loss: Loss
    needs: frozenset[Need]


_REFERENCE: frozenset[Need] = frozenset({"reference"})
OBJECTIVES: dict[Name, _Entry] = {
    "sigmoid": _Entry(sigmoid, _REFERENCE),
    "hinge": _Entry(hinge, _REFERENCE),
    "robust": _Entry(robust, _REFERENCE),
    "ipo": _Entry(ipo, _REFERENCE),
    "ipo_sum": _Entry(ipo_sum, _REFERENCE),
    "sigmoid_norm": _Entry(sigmoid_norm, _REFERENCE),
    "simpo": _Entry(simpo, frozenset()),
    "sft": _Entry(sft, frozenset()),
}
assert set(OBJECTIVES) == set(get_args(Name))


@dataclass(frozen=True)
class Objective:
    """The weighted sum of losses that a configuration asks for; called with the scores of B pairs, gives [B]."""

    config: ObjectiveConfig

    @property
    def needs(self) -> frozenset[Need]:
        """What `PairScores` must hold beyond scores and lengths."""
        needs = frozenset[Need]().union(*(OBJECTIVES[name].needs for name in self.config.loss_type))
        return needs | {"shared"} if self.config.ld_alpha is not None else needs

    def __call__(self, scores: PairScores) -> Tensor:
        """The loss of each pair, [B]."""
        if self.config.ld_alpha is not None:
            scores = scores.damped(self.config.ld_alpha)
        weights = self.config.loss_weights or [1.0] * len(self.config.loss_type)
        terms = [
            weight * OBJECTIVES[name].loss(scores, self.config)
            for name, weight in zip(self.config.loss_type, weights, strict=True)
        ]
        return sum(terms[1:], start=terms[0])
