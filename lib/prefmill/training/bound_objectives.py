"""Objectives of models whose scores are bounds of a log-likelihood: masked diffusion.

L is the lower bound of log pi(y|x), U the upper one (families/mdlm/upper_bound.py), L' and U' the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmill.training.pair_scores import PairScores, Settings, label


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
    ratio = torch.exp(moved / lengths)
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    gain = torch.minimum(ratio[0], clipped[0]) - torch.maximum(ratio[1], clipped[1])  # min(r A, clip(r) A), A = 1, -1
    return (settings.beta * (moved**2 / 2 / lengths).sum(0) - gain) / 2


def _mixed(upper: Tensor | None, lower: Tensor | None, settings: Settings) -> Tensor:
    assert upper is not None, "spg needs upper bounds"
    assert lower is not None, "spg needs a reference"
    return settings.upper_weight * upper + (1 - settings.upper_weight) * lower
