"""Conditional likelihoods under a masked-diffusion model: the bound by draws, and the chain one token after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefmill.families.mdlm.estimator import block_sizes
from prefmill.families.mdlm.family import Drawing
from prefmill.families.mdlm.scorer import encode_samples, masked_logps, score_batch


@dataclass(frozen=True)
class Likelihood:
    """Of a response of `num_tokens`: its bound in nats, the mean of `values`, one per draw, in independent blocks."""

    num_tokens: int
    values: tuple[float, ...]
    blocks: tuple[int, ...]

    @property
    def bound(self) -> float:
        """B(y|x), in nats."""
        return sum(self.values) / len(self.values)

    @property
    def standard_error(self) -> float | None:
        """Of the bound, from the spread of the blocks' means; None for a single block, which says nothing of it."""
        if len(self.blocks) < 2:
            return None
        sizes = np.array(self.blocks)
        means = np.add.reduceat(np.array(self.values), np.cumsum([0, *sizes[:-1]])) / sizes
        # The last block may be smaller. K/(K-1), as the mean is estimated from the same blocks.
        shares = sizes / sizes.sum()
        return float(np.sqrt((shares**2 * (means - self.bound) ** 2).sum() * len(sizes) / (len(sizes) - 1)))


@torch.no_grad()
def bounds(scorer: Any, samples: Iterable[tuple[list[int], list[int]]], drawing: Drawing) -> Iterator[Likelihood]:
    """The likelihood of every (prompt, response), under a model that is installed to score; the same draws for all."""
    device = next(scorer.parameters()).device
    for prompt, response in samples:
        # Always epoch 0: all models that are compared meet the same draws.
        batch = encode_samples([(prompt, response)], [drawing.of(prompt, response, 0)]).to(device)
        values = tuple(score_batch(scorer, batch)[0].tolist())
        yield Likelihood(len(response), values, tuple(block_sizes(drawing.num_draws, drawing.sampling)))


@torch.no_grad()
def chain(
    model: Any,
    prompt: Sequence[int],
    response: Sequence[int],
    mask_token_id: int,
    shifted: bool,
    forward_batch_size: int,
    block_length: int | None = None,
) -> float:
    """sum_i log p(y_i | x, y_<i, the rest (of its block) masked), in nats: exact for this order, one forward a token.

    The bound is this chain's mean over all orders. `model` has its own forward.
    """
    ids = torch.tensor([*prompt, *response], device=next(model.parameters()).device)
    places = torch.arange(len(prompt), len(ids), device=ids.device)
    total = 0.0
    for chunk in torch.split(places, forward_batch_size):
        clean = ids.expand(len(chunk), -1)
        noisy = clean.masked_fill(torch.arange(len(ids), device=ids.device) >= chunk[:, None], mask_token_id)
        asked = (torch.arange(len(chunk), device=ids.device), chunk)
        total += masked_logps(model, model.forward, noisy, asked, clean, shifted, block_length).double().sum().item()
    return total
