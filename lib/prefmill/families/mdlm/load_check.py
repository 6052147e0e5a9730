"""Whether the scorer computes a masked-diffusion model's own likelihoods, tried on one short row with two maskings.

The model's own forward gives full logits in eval mode; the scorer runs in train mode, its head on masked places alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefmill.core.errors import InputError
from prefmill.families.causal.load_check import TOLERANCE
from prefmill.families.causal.scorer import forward_as, inner_model
from prefmill.families.mdlm.estimator import Draws
from prefmill.families.mdlm.loading import require_both_ways
from prefmill.families.mdlm.scorer import encode_samples, score_batch

_PROMPT, _ANSWER = 6, 7  # tokens


def check_diffusion_model(model: Any, name: str, mask_token_id: int, shifted: bool, computed: torch.dtype) -> None:
    """Raise InputError for a scoring model that sees earlier tokens only, or scores otherwise than its own logits say.

    `computed` is the dtype whose rounding is allowed for, as by the causal family.
    """
    inner = inner_model(model)
    with torch.no_grad(), forward_as(inner, inner.forward_before or partial(type(inner).forward, inner)):
        require_both_ways(model, name)
        ids, masked = _row(inner, mask_token_id)
        expected = torch.stack([_own(model, ids, places, mask_token_id, shifted) for places in masked])
    found = _scored(model, ids, masked)
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE[computed]:  # NaN is no agreement
        raise InputError(
            "the scorer does not compute this model's own likelihoods", where=name,
            got=", ".join(f"{value:.4f}" for value in found.tolist()),
            expected=f"{', '.join(f'{value:.4f}' for value in expected.tolist())} within {TOLERANCE[computed]}",
            fix="use another model: this one drops out in functions, or does more with its logits than project",
        )  # fmt: skip


def _row(model: Any, mask_token_id: int) -> tuple[list[int], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Token ids, and two maskings of the answer: some of it, and all."""
    plain = [token for token in range(model.get_input_embeddings().num_embeddings) if token != mask_token_id]
    masked = np.ones((2, _ANSWER), dtype=bool)
    masked[0, ::2] = False
    return [plain[(7 * place + 3) % len(plain)] for place in range(_PROMPT + _ANSWER)], masked


def _own(model: Any, ids: list[int], masked: Any, mask_token_id: int, shifted: bool) -> Tensor:
    """log p of the masked tokens by full logits, a float64 scalar."""
    clean = torch.tensor([ids], device=model.device)
    places = _PROMPT + torch.from_numpy(masked).nonzero()[:, 0].to(model.device)
    noisy = clean.index_fill(1, places, mask_token_id)
    logits = model(input_ids=noisy, use_cache=False).logits[0, places - 1 if shifted else places]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    score: Tensor = wide.log_softmax(-1).gather(-1, clean[0, places, None]).double().sum().cpu()
    return score


def _scored(model: Any, ids: list[int], masked: Any) -> Tensor:
    batch = encode_samples([(ids[:_PROMPT], ids[_PROMPT:])], [Draws(masked, np.ones(len(masked)))])
    was_training = model.training
    # Dropout inside a function is no module to switch off, and shows in train mode alone.
    model.train()
    with torch.no_grad():
        scores = score_batch(model, batch.to(model.device))
    model.train(was_training)
    return scores[0].cpu()
