"""Preference objectives of all model families: one pure function each, from the scores of N pairs to N losses.

D = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)], s = the logistic function, b = beta,
e = label smoothing. A new objective is a function here, its name in `NEEDS` with what it needs, and its test.

Of images a score is -m, m = mean over channels and places of (eps_hat - eps)^2, of flow matching (v_hat - v)^2, and
u = (b / 2) D. At 1024 x 1024 pixels b = 5000 on the mean is 5000 / 2 / 65,536 = 0.038 a squared difference: a b quoted
for sums is not this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmill.core.errors import ConfigError, nearest
from prefmill.training.objective_names import NEEDS, Need


@dataclass(frozen=True)
class PairScores:
    """What an objective sees of N pairs, whatever the model family; every tensor is [N], float32 or float64.

    A score is the family's: a log-likelihood summed over tokens, an ELBO, a negative denoising error. Lengths count
    what it sums over. `soft_label` is the probability, in [0, 1], that the chosen side is the better one. `weight`
    is what a pair counts, 1 where there is none. Residuals, [N, D], are what the chosen side's score is the negative
    mean square of, under the policy and the reference. Of a model with K heads a score is their mean, the margin of
    head k is `margin + head_deviations[:, k]`, and `head_labels` [N, K] are soft labels, NaN where nobody said. Where
    scores are lower bounds of a log-likelihood, `rejected_upper` and `ref_rejected_upper` may hold upper ones. Where
    they count some tokens less (LD-DPO), `chosen_whole` is the chosen side's full sum.
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
    chosen_whole: Tensor | None = None

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


def spg(scores: PairScores, settings: Settings) -> Tensor:
    """SPG's bounds (Wang et al. 2025, arXiv 2510.09541) in DPO's loss.

    As SPG raises L where the advantage is positive and lowers M = w U + (1 - w) L where it is negative.
    """
    assert scores.ref_chosen is not None, "spg needs a reference"
    rejected = _mixed(scores.rejected_upper, scores.rejected, settings)
    reference = _mixed(scores.ref_rejected_upper, scores.ref_rejected, settings)
    u, p = settings.beta * ((scores.chosen - scores.ref_chosen) - (rejected - reference)), label(scores, settings)
    return -p * logsigmoid(u) - (1 - p) * logsigmoid(-u)  # -log s(b [(L_w - L'_w) - (M_l - M'_l)])


def espo(scores: PairScores, settings: Settings) -> Tensor:
    """ESPO (Ou et al. 2025, arXiv 2512.03759) of a pair as a group of two, whose advantages are 1 and -1.

    r = exp((L - L') / |y|): the reference stands for the policy that drew the answers. The estimate of the KL
    divergence is (L - L')^2 / 2 (k2), per token as in the authors' code.
    """
    assert scores.ref_chosen is not None, "espo needs a reference"
    assert scores.ref_rejected is not None, "espo needs a reference"
    moved = torch.stack([scores.chosen - scores.ref_chosen, scores.rejected - scores.ref_rejected])
    lengths = torch.stack([scores.chosen_length, scores.rejected_length])
    log_ratio, most, least = moved / lengths, math.log(1 + settings.clip), math.log(1 - settings.clip)
    # min(r A, clip(r) A), A = 1, -1; clipped before exp, whose gradient is NaN where it overflows.
    gain = log_ratio[0].clamp(max=most).exp() - log_ratio[1].clamp(min=least).exp()
    return (settings.beta * (moved**2 / 2 / lengths).sum(0) - gain) / 2


def _mixed(upper: Tensor | None, lower: Tensor | None, settings: Settings) -> Tensor:
    assert upper is not None, "spg needs upper bounds"
    assert lower is not None, "spg needs a reference"
    return settings.upper_weight * upper + (1 - settings.upper_weight) * lower


OFFICIAL_DIVERGENCE = 0.1
_SMALL = 0.1  # below it the closed form of `phi` loses digits, its gradient twice as many: a series takes over
Loss = Callable[[PairScores, Settings], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss of pairs, and what it needs: `errors` are scores that are -m, `lengths` those that are sums.

    Of errors, a model of diffusion has those of a noise, one of flow matching those of a velocity. `bounds` are scores
    below a log-likelihood, and where they are asked for above it.
    """

    loss: Loss
    needs: frozenset[Need] = frozenset()

    @property
    def needs_reference(self) -> bool:
        """Whether it asks for the reference's scores."""
        return "reference" in self.needs


def sigmoid(scores: PairScores, settings: Settings) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), conservative where the label is smoothed or soft."""
    # A soft label p mixes the losses of both directions; log of sigmoid itself would be -inf for wide margins.
    u, p = settings.beta * scores.margin, label(scores, settings)
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
    u, p = settings.beta * scores.mean_margin, label(scores, settings)
    return -p * logsigmoid(u) - (1 - p) * logsigmoid(-u)  # -log s(b D/|y|)


def simpo(scores: PairScores, settings: Settings) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6): per-token averages, a target margin, no reference."""
    means = scores.chosen / scores.chosen_length - scores.rejected / scores.rejected_length
    return -logsigmoid(settings.beta * means - settings.simpo_gamma)  # -log s(b(avg_w - avg_l) - gamma)


def sft(scores: PairScores, settings: Settings) -> Tensor:
    """An anchor to mix in: the chosen side's negative log-likelihood per token, -log pi(y_w) / |y_w|."""
    return -(scores.chosen if scores.chosen_whole is None else scores.chosen_whole) / scores.chosen_length


def dpo(scores: PairScores, settings: Settings) -> Tensor:
    """Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14): `sigmoid` on errors, with b / 2."""
    return sigmoid(scores, replace(settings, beta=settings.beta / 2))  # -p log s(u) - (1-p) log s(-u)


def flow_dpo(scores: PairScores, settings: Settings) -> Tensor:
    """Flow-DPO (Liu et al. 2025, arXiv 2501.13918) with a constant b: `dpo` on the errors of a velocity.

    m = the mean of (v_th(x_t, t) - v)^2, v = eps - x_0. The derivation's b_t = b (1 - t)^2 is dropped, as in the paper.
    """
    return dpo(scores, settings)  # -log s(-(b/2) [(m_w - m_w_ref) - (m_l - m_l_ref)])


def dspo_rm(scores: PairScores, settings: Settings) -> Tensor:
    """`dpo` whose label is a reward model's, p = s((R_w - R_l) / tau); a frozen reward enters in no other way."""
    assert scores.soft_label is not None, "dspo_rm needs a soft label"
    return dpo(scores, settings)


def dspo(scores: PairScores, settings: Settings) -> Tensor:
    """DSPO's score form (Zhu et al. 2025): the mean of |(eps_th - eps) - lambda (1 - s(u)) (eps_th - eps_ref)|^2.

    On the winner alone. Multiplied out, so that its first term is m_w itself and lambda = 0 is `sft` to the bit.
    """
    residual, drift = residual_and_drift(scores)
    factor = settings.dspo_lambda * (1 - torch.sigmoid(settings.beta / 2 * scores.margin))
    if settings.dspo_stop_gradient:
        factor, drift = factor.detach(), drift.detach()
    cross, square = (residual * drift).mean(1), (drift * drift).mean(1)
    return -scores.chosen - 2 * factor * cross + factor**2 * square


def dspo_official_sdxl(scores: PairScores, settings: Settings) -> Tensor:
    """DSPO as its authors' code has it for SDXL: (1 - s(u))^2, times |eps_th - eps_ref|^2 once that exceeds 0.1.

    The switch is taken on the mean over the microbatch, all factors pass gradients. Up to the switch the gradient is
    that of `dpo` times 2 s(u) (1 - s(u)).
    """
    _, drift = residual_and_drift(scores)
    square = (drift * drift).mean(1)
    push = (1 - torch.sigmoid(settings.beta / 2 * scores.margin)) ** 2
    return push * square if square.mean() >= OFFICIAL_DIVERGENCE else push


def mapo(scores: PairScores, settings: Settings) -> Tensor:
    """MaPO (Hong et al. 2024, arXiv 2406.06424) as its authors train it: m_w - b log s(T (phi(c m_w) - phi(c m_l))).

    b = beta, 0.1 there, c = 1/2 the signal-to-noise factor, T the number of timesteps; no reference.
    """
    winner, loser = -scores.chosen, -scores.rejected
    ratio = phi(settings.mapo_snr * winner) - phi(settings.mapo_snr * loser)
    return winner - settings.beta * logsigmoid(settings.num_timesteps * ratio)


def bradley_terry_heads(scores: PairScores, settings: Settings) -> Tensor:
    """-p log s(r+ - r-) - (1 - p) log s(r- - r+) of each head, averaged over those with a label.

    Bradley-Terry (1952) as in Ouyang et al. 2022 (arXiv 2203.02155, eq. 1), with a soft label p; [N]. Turning a pair
    round, with 1 - p, gives the same loss.
    """
    assert scores.head_deviations is not None
    assert scores.head_labels is not None
    margins = scores.margin[:, None] + scores.head_deviations
    # NaN times 0 is still NaN, in the gradient too: it is replaced before the product.
    known, p = ~scores.head_labels.isnan(), scores.head_labels.nan_to_num(0.0)
    losses = (-p * logsigmoid(margins) - (1 - p) * logsigmoid(-margins)) * known
    return losses.sum(1) / known.sum(1).clamp(min=1)


_LOSSES = (
    sigmoid, hinge, robust, ipo, ipo_mean, sigmoid_norm, simpo, sft, spg, espo, dpo, flow_dpo, dspo, dspo_official_sdxl,
    dspo_rm, mapo, bradley_terry_heads,
)  # fmt: skip
OBJECTIVES = {loss.__name__: Objective(loss, NEEDS[loss.__name__]) for loss in _LOSSES}


def mix(
    names: Sequence[str],
    weights: Sequence[float],
    settings: Settings,
    supplies: frozenset[Need] = frozenset(get_args(Need)),
) -> Objective:
    """The weighted sum of objectives, each pair counted by its weight, for a family that `supplies` these needs.

    Raises ConfigError for an unknown name, a missing weight, and a need that the family does not supply.
    """
    usable = [name for name, objective in OBJECTIVES.items() if objective.needs <= supplies]
    for name in names:
        if name not in OBJECTIVES:
            raise ConfigError(
                f"no objective '{name}'{nearest(name, usable)}", expected=", ".join(usable), fix="correct the name"
            )
        if name not in usable:
            raise ConfigError(
                f"objective '{name}' does not fit this model family",
                got=f"it needs {', '.join(sorted(OBJECTIVES[name].needs - supplies))}", expected=", ".join(usable),
                fix="choose one of those",
            )  # fmt: skip
    if not names or len(names) != len(weights) or min(weights) < 0 or not any(weights):
        raise ConfigError(
            "every objective needs a weight", got=f"loss_type={list(names)}, loss_weights={list(weights)}",
            expected="two lists of the same length, of weights none below 0 and one above it",
            fix="give loss_weights one number for each loss_type",
        )  # fmt: skip
    if "robust" in names and settings.label_smoothing == 0:
        raise ConfigError(
            "the robust objective needs the rate of flipped labels", got="label_smoothing=0",
            expected="a number above 0 and below 0.5", fix="set label_smoothing, or use sigmoid, which it then equals",
        )  # fmt: skip
    parts = [(OBJECTIVES[name], weight) for name, weight in zip(names, weights, strict=True)]

    def loss(scores: PairScores, settings: Settings) -> Tensor:
        losses = torch.stack([weight * part.loss(scores, settings) for part, weight in parts]).sum(0)
        return losses if scores.weight is None else losses * scores.weight

    return Objective(loss, frozenset().union(*(part.needs for part, _ in parts)))


def phi(error: Tensor) -> Tensor:
    """x / (e^x - 1), in fp32 at least; 1 at x = 0, falling; value and slope exact to a few last digits."""
    error = error.float() if error.dtype in (torch.bfloat16, torch.float16) else error
    square = error**2
    # Bernoulli numbers: x / (e^x - 1) = sum of B_k x^k / k!.
    series = 1 - error / 2 + square / 12 - square**2 / 720 + square**3 / 30_240 - square**4 / 1_209_600
    small = error.abs() < _SMALL
    regular = torch.where(small, torch.ones_like(error), error)  # so that the branch not taken has a gradient
    # By e^-x, which ends in 0: e^x is infinite from an error of 178 on, and its slope no number.
    return torch.where(small, series, -regular * torch.exp(-regular) / torch.expm1(-regular))


def residual_and_drift(scores: PairScores) -> tuple[Tensor, Tensor]:
    """eps_th - eps and eps_th - eps_ref of the winner, [N, D] each."""
    assert scores.chosen_residual is not None, "this objective needs residuals"
    assert scores.ref_chosen_residual is not None, "this objective needs the reference's residuals"
    return scores.chosen_residual, scores.chosen_residual - scores.ref_chosen_residual
