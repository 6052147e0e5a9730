"""Objectives of diffusion models, from the denoising errors of N pairs to N losses.

m = mean over channels and places of (eps_hat - eps)^2; a side's score is -m. D = (m_l - m_w) - (m_l_ref - m_w_ref) is
the pair's margin, s the logistic function, b = beta, u = (b / 2) D. At 1024 x 1024 pixels b = 5000 on the mean is
5000 / 2 / 65,536 = 0.038 a squared difference: a b quoted for sums is not this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmill.families.sdxl.names import NEEDS_REFERENCE, DiffusionObjective
from prefmill.training.objectives import Loss, Objective, PairScores, Settings

OFFICIAL_DIVERGENCE = 0.1
_SMALL_ERROR = 1e-4  # below it l / (e^l - 1) is 1 - l / 2 to within 1e-9, and its gradient is a number


@dataclass(frozen=True)
class DspoFactors:
    """DSPO's lambda, which its authors set to beta, and whether the factors it multiplies pass gradients."""

    weight: float = 1.0
    stop_gradient: bool = True


def dpo(scores: PairScores, settings: Settings) -> Tensor:
    """Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14); a soft label p makes it -p log s(u) - ..."""
    u, p = implicit_reward(scores, settings), 1.0 if scores.soft_label is None else scores.soft_label
    return -p * logsigmoid(u) - (1 - p) * logsigmoid(-u)  # -p log s(u) - (1-p) log s(-u)


def dspo_rm(scores: PairScores, settings: Settings) -> Tensor:
    """`dpo` whose label is a reward model's, p = s((R_w - R_l) / tau); a frozen reward enters in no other way."""
    assert scores.soft_label is not None, "dspo_rm needs a soft label"
    return dpo(scores, settings)


def dspo(scores: PairScores, settings: Settings, factors: DspoFactors = DspoFactors()) -> Tensor:
    """DSPO's score form (Zhu et al. 2025): the mean of |(eps_th - eps) - lambda (1 - s(u)) (eps_th - eps_ref)|^2.

    On the winner alone. Multiplied out, so that its first term is m_w itself and lambda = 0 is `sft` to the bit.
    """
    residual, drift = _residual_and_drift(scores)
    factor = factors.weight * (1 - torch.sigmoid(implicit_reward(scores, settings)))
    if factors.stop_gradient:
        factor, drift = factor.detach(), drift.detach()
    cross, square = (residual * drift).mean(1), (drift * drift).mean(1)
    return -scores.chosen - 2 * factor * cross + factor**2 * square


def dspo_official_sdxl(scores: PairScores, settings: Settings) -> Tensor:
    """What DSPO's authors' code does for SDXL: (1 - s(u))^2, times |eps_th - eps_ref|^2 once that exceeds 0.1.

    The switch is taken on the mean over the microbatch, all factors pass gradients. Up to the switch the gradient is
    that of `dpo` times 2 s(u) (1 - s(u)).
    """
    _, drift = _residual_and_drift(scores)
    square = (drift * drift).mean(1)
    push = (1 - torch.sigmoid(implicit_reward(scores, settings))) ** 2
    return push * square if square.mean() >= OFFICIAL_DIVERGENCE else push


def mapo(scores: PairScores, settings: Settings) -> Tensor:
    """MaPO (Hong et al. 2024, arXiv 2406.06424): m_w - (1/b) log s(phi(m_w) - phi(m_l)), without a reference."""
    winner, loser = -scores.chosen, -scores.rejected
    return winner - logsigmoid(phi(winner, settings.beta) - phi(loser, settings.beta)) / settings.beta


def sft(scores: PairScores, settings: Settings) -> Tensor:
    """The winner's denoising error m_w: fine-tuning, and the anchor to mix in."""
    return -scores.chosen


def phi(error: Tensor, beta: float) -> Tensor:
    """b l / (e^l - 1), in fp32 at least; b at l = 0."""
    error = error.float() if error.dtype in (torch.bfloat16, torch.float16) else error
    small = error.abs() < _SMALL_ERROR
    regular = torch.where(small, torch.ones_like(error), error)  # so that the branch not taken has a gradient
    return beta * torch.where(small, 1 - error / 2, regular / torch.expm1(regular))


def implicit_reward(scores: PairScores, settings: Settings) -> Tensor:
    """u, [N]."""
    return settings.beta / 2 * scores.margin


def cosine_to_sft(scores: PairScores, settings: Settings, factors: DspoFactors) -> Tensor:
    """The cosine, [N], between the gradients of `dspo` and `sft` at the prediction: 1 where DSPO is fine-tuning."""
    residual, drift = (value.detach() for value in _residual_and_drift(scores))
    factor = factors.weight * (1 - torch.sigmoid(implicit_reward(scores, settings))).detach()
    return torch.cosine_similarity(residual - factor[:, None] * drift, residual, dim=1)


def choose(name: DiffusionObjective, sft_weight: float, factors: DspoFactors) -> Objective:
    """The objective `name`, weighted by pair, plus `sft_weight` times the winner's error."""
    loss = partial(dspo, factors=factors) if name == "dspo" else LOSSES[name]

    def weighted(scores: PairScores, settings: Settings) -> Tensor:
        losses = loss(scores, settings)
        if sft_weight:
            losses = losses + sft_weight * sft(scores, settings)
        return losses if scores.weight is None else losses * scores.weight

    return Objective(weighted, name in NEEDS_REFERENCE)


LOSSES: Mapping[DiffusionObjective, Loss] = {
    "dpo": dpo,
    "dspo": dspo,
    "dspo_official_sdxl": dspo_official_sdxl,
    "dspo_rm": dspo_rm,
    "mapo": mapo,
    "sft": sft,
}


def _residual_and_drift(scores: PairScores) -> tuple[Tensor, Tensor]:
    """eps_th - eps and eps_th - eps_ref of the winner, [N, D] each."""
    assert scores.chosen_residual is not None, "this objective needs residuals"
    assert scores.ref_chosen_residual is not None, "this objective needs the reference's residuals"
    return scores.chosen_residual, scores.chosen_residual - scores.ref_chosen_residual
