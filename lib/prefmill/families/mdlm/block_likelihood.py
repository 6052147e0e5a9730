"""The likelihood of a block-diffusion model: blocks of a text one after another, each by masks within it alone.

log p(y|x) = sum_b log p(y_b | x, y_<b), each term bounded as in `estimator` (block diffusion, arXiv 2503.09573, eq. 7;
LLaDA2 and SDAR are such models). A token sees its own block and earlier ones, blocks being counted from the text's
first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from prefmill.families.mdlm.estimator import block_sizes
from prefmill.families.mdlm.family import Drawing
from prefmill.families.mdlm.likelihood import Likelihood


@torch.no_grad()
def block_bounds(
    model: Any,
    samples: Iterable[tuple[list[int], list[int]]],
    drawing: Drawing,
    block_tokens: int,
    mask_token_id: int,
    shifted: bool = False,
    forward_batch_size: int = 8,
) -> Iterator[Likelihood]:
    """The block-wise likelihood of every (prompt, response) under a model's own forward.

    A draw's value is the sum of one draw in every block, so that values are as independent as the draws of a block.
    """
    for prompt, response in samples:
        ids, values = prompt + response, torch.zeros(drawing.num_draws, dtype=torch.float64)
        for start, end in block_spans(len(prompt), len(ids), block_tokens):
            drawn = drawing.of(ids[:start], ids[start:end], 0)
            masked = torch.zeros(drawing.num_draws, end, dtype=torch.bool)
            masked[:, start:] = torch.from_numpy(drawn.masked)
            for rows in torch.split(torch.arange(drawing.num_draws), forward_batch_size):
                # Later blocks are left out: no token of this one would see them.
                sums = _masked_sums(model, ids[:end], masked[rows], block_tokens, mask_token_id, shifted)
                values[rows] += torch.from_numpy(drawn.weights)[rows] * sums
        yield Likelihood(len(response), tuple(values.tolist()), tuple(block_sizes(drawing.num_draws, drawing.sampling)))


def block_spans(start: int, end: int, block_tokens: int) -> list[tuple[int, int]]:
    """The pieces of [start, end) between multiples of `block_tokens`."""
    edges = [start, *range((start // block_tokens + 1) * block_tokens, end, block_tokens), end]
    return list(pairwise(edges))


def block_mask(length: int, block_tokens: int, like: Tensor) -> Tensor:
    """[1, 1, T, T] in the dtype of `like`: 0 where a token may see another, the smallest number where not."""
    block = torch.arange(length, device=like.device) // block_tokens
    hidden = block[None, :] > block[:, None]
    # Added to the scores, as every attention of transformers takes it; a mask of truth values only some do.
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, torch.finfo(like.dtype).min)[None, None]


def _masked_sums(
    model: Any, ids: list[int], masked: Tensor, block_tokens: int, mask_token_id: int, shifted: bool
) -> Tensor:
    """The sum of log p over each row's masked tokens, [R] float64; `masked` [R, T]."""
    weight = next(model.parameters())
    clean, hidden = torch.tensor(ids, device=weight.device), masked.to(weight.device)
    noisy = torch.where(hidden, mask_token_id, clean)
    seen = block_mask(len(ids), block_tokens, weight).expand(len(noisy), -1, -1, -1)
    logits = model(input_ids=noisy, attention_mask=seen, use_cache=False).logits
    row, column = hidden.nonzero(as_tuple=True)
    places = logits[row, column - 1 if shifted else column]
    # In fp32 at least: bf16 has 8 bits of precision, too few for a sum over a vocabulary.
    logps = places.log_softmax(-1, dtype=None if places.dtype == torch.float64 else torch.float32)
    found = logps.gather(-1, clean[column, None])[:, 0].double()
    return torch.zeros(len(noisy), dtype=torch.float64, device=weight.device).index_add(0, row, found).cpu()
