"""Generation by unmasking: all tokens masked at first, some of them settled at every step, block after block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True)
class Unmasking:
    """How answers are generated (LLaDA, arXiv 2502.09992, algorithm 5).

    `num_tokens` in blocks of `block_tokens`, each over its share of `num_steps` in all. A step fills every masked
    place of the block with a token drawn at `temperature` (0: the likeliest) and masks again those it is least sure
    of, or random ones. With a step for each token, temperature 1 and `random` the answers are draws from the model.
    """

    num_tokens: int
    block_tokens: int
    num_steps: int
    temperature: float
    remasking: Remasking
    seed: int


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[list[int]], how: Unmasking, mask_token_id: int, shifted: bool = False
) -> list[list[int]]:
    """The answers to prompts (token ids) of one common length, `num_tokens` ids each, under a model's own forward.

    Raises ValueError where blocks do not divide the answer or the steps.
    """
    num_blocks, left = divmod(how.num_tokens, how.block_tokens)
    if left or how.num_steps % num_blocks or how.num_steps > how.num_tokens:
        raise ValueError("num_tokens must be a multiple of block_tokens, and num_steps of the number of blocks")
    device = next(model.parameters()).device
    start = torch.tensor(prompts, device=device)
    blank = torch.full((len(prompts), how.num_tokens), mask_token_id, device=device)
    ids = torch.cat([start, blank], dim=1)
    generator = torch.Generator(device="cpu").manual_seed(how.seed)
    for block in range(num_blocks):
        begin = start.shape[1] + block * how.block_tokens
        _fill_block(model, ids, (begin, begin + how.block_tokens), how, num_blocks, mask_token_id, shifted, generator)
    answers: list[list[int]] = ids[:, start.shape[1] :].tolist()
    return answers


def settled_at(block_tokens: int, num_steps: int) -> list[int]:
    """How many tokens each step of a block settles: as even as it goes, the more first."""
    base, more = divmod(block_tokens, num_steps)
    return [base + (step < more) for step in range(num_steps)]


def _fill_block(
    model: Any,
    ids: Tensor,
    block: tuple[int, int],
    how: Unmasking,
    num_blocks: int,
    mask_token_id: int,
    shifted: bool,
    generator: torch.Generator,
) -> None:
    """Settle the tokens of a block of `ids` [B, T], in place."""
    begin, end = block
    for count in settled_at(end - begin, how.num_steps // num_blocks):
        logits = model(input_ids=ids, use_cache=False).logits
        here = logits[:, begin - 1 : end - 1] if shifted else logits[:, begin:end]
        here = here.float().cpu().clone()
        here[..., mask_token_id] = -torch.inf  # a mask is no answer
        tokens = draw_tokens(here, how.temperature, generator)
        if how.remasking == "low_confidence":
            sure = here.softmax(-1).gather(-1, tokens[..., None])[..., 0]
        else:
            sure = torch.rand(tokens.shape, generator=generator)
        masked = (ids[:, begin:end] == mask_token_id).cpu()
        best = sure.masked_fill(~masked, -1.0).topk(count, dim=1).indices
        ids[:, begin:end].scatter_(1, best.to(ids.device), tokens.gather(1, best).to(ids.device))


def draw_tokens(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token for every place from logits [..., V]: the likeliest at temperature 0, else drawn (Gumbel-max, fp64)."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = torch.rand(logits.shape, dtype=torch.float64, generator=generator).clamp_min(1e-300)
    return (logits.double() / temperature - torch.log(-torch.log(noise))).argmax(-1)
