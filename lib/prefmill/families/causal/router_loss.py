"""The balancing loss of a mixture of experts, beside the objective of a preference training.

Fedus et al. 2021 (arXiv 2101.03961), eq. 4 to 6: N sum_i f_i P_i, over the tokens that a batch runs: a prompt that is
shared counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefmill.core.errors import ConfigError
from prefmill.distributed.scoring import inner_model
from prefmill.training.family import Family


@dataclass(frozen=True)
class RoutedFamily(Family):
    """A causal family whose pairs' losses have `coefficient` times the balancing loss beside them."""

    coefficient: float = 0.0

    def beside(self, model: Any) -> Tensor | float:
        """The weighted loss of the batch that was scored last; it is taken once."""
        while hasattr(model, "module"):
            model = model.module
        inner = inner_model(model)
        loss: Tensor = inner.router_loss
        inner.router_loss = None  # or its graph would outlive the step
        return self.coefficient * loss


def require_routing(model: Any, name: str) -> None:
    """Raise ConfigError for a model whose routers do not report."""
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits") or _experts_per_token(config) is None:
        raise ConfigError(
            "this model does not report what its experts were given", where=name, got=config.model_type,
            expected="a mixture of experts with output_router_logits", fix="leave router_aux_loss_coef out",
        )  # fmt: skip


def balancing_loss(logits: tuple[Tensor, ...], config: Any, mask: Tensor) -> Tensor:
    """The loss of every layer's router logits [tokens, N], a scalar in fp32; `mask` [R, T] leaves padding out."""
    # Layers are joined before the mean, as in transformers: it is no mean of losses of layers.
    seen = torch.cat([layer.flatten(0, -2)[mask.flatten().bool()] for layer in logits]).float()
    chance = seen.softmax(-1)
    # f sums to the experts per token rather than to 1, as in transformers.
    chosen = torch.zeros_like(chance).scatter_(1, chance.topk(_experts_per_token(config), dim=-1).indices, 1.0)
    return (chosen.mean(0) * chance.mean(0)).sum() * chance.shape[-1]


def _experts_per_token(config: Any) -> Any:
    # Mixtral's and most others', ERNIE's, Aria's, Gemma 4's.
    names = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
    return next((found for name in names if (found := getattr(config, name, None))), None)
