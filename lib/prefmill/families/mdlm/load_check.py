"""Whether the scorer computes a masked-diffusion model's own likelihoods, tried on one short row with two maskings.

The model's own forward gives full logits in eval mode; the scorer runs in train mode, its head on masked places alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefmill.core.errors import InputError
from prefmill.distributed.scoring import inner_model
from prefmill.families.causal.load_check import TOLERANCE, scored_in_training
from prefmill.families.causal.scorer import forward_as, logps_of
from prefmill.families.mdlm.blocks import block_keys, block_spans
from prefmill.families.mdlm.estimator import Draws
from prefmill.families.mdlm.loading import require_both_ways
from prefmill.families.mdlm.scorer import encode_samples, score_batch

_PROMPT, _ANSWER, _LONGEST_BLOCK = 6, 7, 128  # tokens; of longer blocks the row has but one


def check_diffusion_model(
    model: Any, name: str, mask_token_id: int, shifted: bool, computed: torch.dtype, block_length: int | None = None
) -> None:
    """Raise InputError for a scoring model that sees earlier tokens only, or scores otherwise than its own logits say.

    `computed` is the dtype whose rounding is allowed for, as by the causal family.
    """
    inner = inner_model(model)
    with torch.no_grad(), forward_as(inner, inner.forward_before or partial(type(inner).forward, inner)):
        require_both_ways(model, name)
        ids, masked = _row(inner, mask_token_id, block_length)
        expected = torch.stack([_own(model, ids, places, mask_token_id, shifted, block_length) for places in masked])
    batch = encode_samples([(ids[:_PROMPT], ids[_PROMPT:])], [Draws(masked, np.ones(len(masked)))])
    found = scored_in_training(model, batch, score_batch)[0]
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE[computed]:  # NaN is no agreement
        raise InputError(
            "the scorer does not compute this model's own likelihoods", where=name,
            got=", ".join(f"{value:.4f}" for value in found.tolist()),
            expected=f"{', '.join(f'{value:.4f}' for value in expected.tolist())} within {TOLERANCE[computed]}",
            fix="use another model: this one drops out in functions, or does more with its logits than project",
        )  # fmt: skip


def _row(model: Any, mask_token_id: int, block_length: int | None) -> tuple[list[int], NDArray[np.bool_]]:
    """Token ids, and two maskings of the answer: some of it, and all."""
    answer = _ANSWER + (block_length if block_length is not None and block_length <= _LONGEST_BLOCK else 0)
    plain = [token for token in range(model.get_input_embeddings().num_embeddings) if token != mask_token_id]
    masked = np.ones((2, answer), dtype=bool)
    masked[0, ::2] = False
    return [plain[(7 * place + 3) % len(plain)] for place in range(_PROMPT + answer)], masked


def _own(
    model: Any, ids: list[int], masked: Any, mask_token_id: int, shifted: bool, block_length: int | None
) -> Tensor:
    """log p of the masked tokens by full logits, a pass for every block, a float64 scalar."""
    total, hidden = torch.zeros((), dtype=torch.float64), _PROMPT + torch.from_numpy(masked).nonzero()[:, 0]
    for start, end in block_spans(_PROMPT, len(ids), block_length):
        clean = torch.tensor([ids[:end]], device=model.device)
        places = hidden[(hidden >= start) & (hidden < end)].to(model.device)
        seen = {} if block_length is None else block_keys(model, end, block_length)
        noisy = clean.index_fill(1, places, mask_token_id)
        logits = model(input_ids=noisy, **seen, use_cache=False).logits[0]
        total += logps_of(logits[places - 1 if shifted else places], clean[0, places]).double().sum().cpu()
    return total
