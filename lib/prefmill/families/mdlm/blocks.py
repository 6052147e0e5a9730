"""Blocks of a block-diffusion model (arXiv 2503.09573; LLaDA2, SDAR), counted from the text's first token.

log p(y|x) = sum_b log p(y_b | x, y_<b), each term bounded as in `estimator` by masks within its block (eq. 7 and 8): a
token sees its own block and earlier ones, which are whole.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def block_spans(start: int, end: int, block_length: int | None) -> list[tuple[int, int]]:
    """The pieces of [start, end) between multiples of `block_length`; without one the whole of it."""
    inner = [] if block_length is None else range((start // block_length + 1) * block_length, end, block_length)
    return list(pairwise([start, *inner, end]))


def block_keys(model: Any, length: int, block_length: int, doubled: bool = False, skip: int = 0) -> dict[str, Tensor]:
    """The mask [1, 1, T - skip, T] and the positions of places from `skip` on, as arguments of a model's forward.

    `doubled`, of 2T places: the text as it is, then the same with masks, whose blocks see earlier ones of the first
    copy and themselves. All blocks are then predicted in one pass (arXiv 2503.09573, section 3.2).
    """
    weight = model.get_input_embeddings().weight
    places = torch.arange(length, device=weight.device)
    block = places // block_length
    own, earlier = block[:, None] == block, block[:, None] > block
    seen = own | earlier
    if doubled:
        seen = torch.cat([torch.cat([seen, torch.zeros_like(seen)], 1), torch.cat([earlier, own], 1)])
        places = places.repeat(2)
    # Added to the scores, as every attention of transformers takes it; a mask of truth values only some do.
    mask = torch.zeros_like(seen, dtype=weight.dtype).masked_fill(~seen, torch.finfo(weight.dtype).min)
    return {"attention_mask": mask[None, None, skip:], "position_ids": places[None, skip:]}
