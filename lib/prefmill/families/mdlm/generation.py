"""Generation by unmasking: all tokens masked at first, some of them settled at every step, block after block."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from prefmill.core.errors import InputError
from prefmill.families.mdlm.blocks import block_keys, block_spans

Remasking = Literal["low_confidence", "margin", "entropy", "random"]


@dataclass(frozen=True)
class Unmasking:
    """How answers are generated (LLaDA, arXiv 2502.09992, algorithm 5; Dream, arXiv 2508.15487).

    `num_tokens` in blocks of `block_tokens`, each over its share of `num_steps` in all. A step fills every masked
    place of the block with a token drawn at `temperature` (0: the likeliest) and masks again those it is least sure
    of: by the token's probability, by its lead over the second (`margin`), by the negative `entropy`, or at `random`.
    With a step for each token, temperature 1 and `random` the answers are draws from the model.

    `guidance` w > 0 takes (1 + w) x logits - w x logits without the prompt (classifier-free guidance). `prefix_cache`
    keeps keys and values of what precedes a block while it is filled (Fast-dLLM, arXiv 2505.22618): an approximation,
    as these would change with the block.

    With `block_length` blocks are those of a block-diffusion model, counted from the text's first token, in place of
    `block_tokens`: no token sees a later block, and the cache is exact.
    """

    num_tokens: int
    block_tokens: int
    num_steps: int
    temperature: float
    remasking: Remasking
    seed: int
    guidance: float = 0.0
    prefix_cache: bool = False
    block_length: int | None = None


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    how: Unmasking,
    mask_token_id: int,
    shifted: bool = False,
    end_ids: Collection[int] = (),
) -> list[list[int]]:
    """The answers to prompts (token ids), `num_tokens` ids at most, under a model's own forward.

    An answer stops at the first of `end_ids`, which is its last token then. Prompts of unequal length are filled from
    the left (only for a model that `takes_padding`, and without `block_length`). Raises ValueError where blocks do not
    divide answer or steps.
    """
    num_blocks, left = divmod(how.num_tokens, how.block_tokens)
    if left or how.num_steps % num_blocks or how.num_steps > how.num_tokens:
        raise ValueError("num_tokens must be a multiple of block_tokens, and num_steps of the number of blocks")
    if how.block_length is not None and len({len(prompt) for prompt in prompts}) > 1:
        raise ValueError("blocks count from a text's start: prompts of one length share a batch")
    device = next(model.parameters()).device
    canvas = _Canvas.blank(prompts, how.num_tokens, mask_token_id, device)
    reader = _Reader(model, how, mask_token_id, shifted)
    generator = torch.Generator(device=device).manual_seed(how.seed)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for begin, end in _spans(canvas.begin, how):
        _fill_block(reader, canvas, begin, end, generator)
        for row, ids in zip(rows, canvas.ids[:, canvas.begin : end].tolist(), strict=True):
            answers[row] = until_end(ids, end_ids)
        going = [n for n, row in enumerate(rows) if answers[row][-1] not in end_ids]
        if not going:
            break
        canvas, rows = canvas.only(going), [rows[n] for n in going]
    return answers


def _spans(begin: int, how: Unmasking) -> list[tuple[int, int]]:
    """The columns of an answer's blocks."""
    if how.block_length is not None:
        return block_spans(begin, begin + how.num_tokens, how.block_length)
    return [(begin + start, begin + end) for start, end in block_spans(0, how.num_tokens, how.block_tokens)]


def until_end(ids: list[int], end_ids: Collection[int]) -> list[int]:
    """`ids` up to the first that ends an answer, that included."""
    place = next((place for place, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: place + 1]


def settled_at(block_tokens: int, num_steps: int) -> list[int]:
    """How many tokens each step of a block settles: as even as it goes, the more first."""
    base, more = divmod(block_tokens, num_steps)
    return [base + (step < more) for step in range(num_steps)]


def takes_padding(model: Any) -> bool:
    """Whether filling up on the left changes nothing: tried on one row, since versions of LLaDA's code ignore masks."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None] % model.get_input_embeddings().num_embeddings
    other = ids.clone()
    other[0, :2] = ids[0, -1]
    mask = (torch.arange(8, device=ids.device) >= 2).long()[None]
    keys = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "use_cache": False}
    with torch.no_grad():
        try:
            one, two = (model(input_ids=rows, **keys).logits[0, 2:] for rows in (ids, other))
        except TypeError:  # a forward that has no such arguments
            return False
    return torch.equal(one, two)


def draw_tokens(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token for every place from logits [..., V]: the likeliest at temperature 0, else drawn (Gumbel-max, fp64)."""
    if temperature == 0:
        return logits.argmax(-1)
    # In fp32 the noise is cut off above, and rare tokens are drawn too seldom (arXiv 2409.02908).
    noise = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator).clamp_min(1e-300)
    return (logits.double() / temperature - torch.log(-torch.log(noise))).argmax(-1)


def sureness(logits: Tensor, tokens: Tensor, how: Unmasking, generator: torch.Generator) -> Tensor:
    """How sure the model is of `tokens` [B, T], from logits [B, T, V]: the surest settle first."""
    if how.remasking == "random":
        return torch.rand(tokens.shape, device=tokens.device, generator=generator)
    if how.remasking == "low_confidence":
        return logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
    # Dream's sampler measures what it draws from, at its temperature; LLaDA's above the model's own probabilities.
    p = (logits / (how.temperature or 1.0)).softmax(-1)
    best: Tensor = p.topk(2, dim=-1).values
    return torch.special.xlogy(p, p).sum(-1) if how.remasking == "entropy" else best[..., 0] - best[..., 1]


@dataclass(frozen=True)
class _Canvas:
    """Prompts and the answers as far as they are settled: `ids` [B, T], the answers from column `begin` on.

    `valid` [B, T] is False on what fills prompts up on the left, None where nothing does; `prompt` [B, T] is True on
    what is asked.
    """

    ids: Tensor
    begin: int
    valid: Tensor | None
    prompt: Tensor

    @classmethod
    def blank(cls, prompts: Sequence[list[int]], num_tokens: int, mask: int, device: torch.device) -> _Canvas:
        """All of the answer masked."""
        width = max(map(len, prompts))
        rows = [[mask] * (width - len(prompt)) + prompt + [mask] * num_tokens for prompt in prompts]
        ids = torch.tensor(rows, device=device)
        starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        columns = torch.arange(ids.shape[1], device=device)
        valid = columns >= starts[:, None]
        padded = any(len(prompt) < width for prompt in prompts)
        return cls(ids, width, valid if padded else None, valid & (columns < width))

    def only(self, rows: list[int]) -> _Canvas:
        """Some of the rows."""
        valid = None if self.valid is None else self.valid[rows]
        return _Canvas(self.ids[rows], self.begin, valid, self.prompt[rows])


@dataclass
class _Reader:
    """Reads a block's logits off a model, guided and through the cache as the configuration says."""

    model: Any
    how: Unmasking
    mask_token_id: int
    shifted: bool
    cache: Any = field(default=None, init=False)

    def logits(self, canvas: _Canvas, begin: int, end: int) -> Tensor:
        """Of the block in columns [begin, end), [B, block, V] in fp32; a mask is no answer."""
        first, last = begin - self.shifted, end - self.shifted
        # Later blocks, which no token of a block-diffusion model sees, are not computed.
        ids, valid = canvas.ids if self.how.block_length is None else canvas.ids[:, :end], canvas.valid
        if self.how.guidance:
            # The prompt is masked, as LLaDA does, not left out: both passes have the same places.
            ids = torch.cat([ids, ids.masked_fill(canvas.prompt[:, : ids.shape[1]], self.mask_token_id)])
            valid = None if valid is None else valid.repeat(2, 1)
        found = self._forward(ids, valid, first, last).float()
        if self.how.guidance:
            given, free = found.chunk(2)
            found = free + (1 + self.how.guidance) * (given - free)
        found[..., self.mask_token_id] = -torch.inf
        return found

    def _forward(self, ids: Tensor, valid: Tensor | None, first: int, last: int) -> Tensor:
        keys: dict[str, Any] = {"use_cache": self.how.prefix_cache}
        # The prompt's end may lie in the first block, and then changes with it.
        block = self.how.block_length or 1
        kept = min(first, (first + self.shifted) // block * block)
        skip = 0 if self.cache is None else kept
        if valid is not None:
            keys["attention_mask"] = valid.long()
        if self.how.block_length is not None:
            keys |= block_keys(self.model, ids.shape[1], self.how.block_length, skip=skip)
        if valid is not None or skip:
            places = torch.ones_like(ids) if valid is None else valid.long()
            keys["position_ids"] = (places.cumsum(1) - 1).clamp_min(0)[:, skip:]
        if skip:
            keys["past_key_values"] = self.cache
        with _only_places(self.model, first - skip, last - skip):
            out = self.model(input_ids=ids[:, skip:], **keys)
        if self.how.prefix_cache:
            self.cache = getattr(out, "past_key_values", None)
            if self.cache is None:
                raise InputError(
                    "this model keeps no keys and values",
                    where=self.model.config.model_type,
                    fix="set prefix_cache=false",
                )
            self.cache.crop(kept - ids.shape[1])  # the forward appended what it was shown
        # A head that no hook sees gives every place.
        logits: Tensor = out.logits
        return logits if logits.shape[1] == last - first else logits[:, first - skip : last - skip]


def _fill_block(reader: _Reader, canvas: _Canvas, begin: int, end: int, generator: torch.Generator) -> None:
    """Settle the tokens of the block in columns [begin, end) of `canvas`, in place, by its share of the steps."""
    # A cache is good for one block: keys of earlier tokens change with every block that is settled.
    how, reader.cache = reader.how, None
    # A view: what is settled in it is settled in the canvas.
    block = canvas.ids[:, begin:end]
    num_steps = -(-(end - begin) * how.num_steps // how.num_tokens)
    for count in settled_at(end - begin, num_steps):
        logits = reader.logits(canvas, begin, end)
        tokens = draw_tokens(logits, how.temperature, generator)
        sure = sureness(logits, tokens, how, generator).masked_fill(block != reader.mask_token_id, -torch.inf)
        best = sure.topk(count, dim=1).indices
        block.scatter_(1, best, tokens.gather(1, best))


@contextmanager
def _only_places(model: Any, first: int, last: int) -> Iterator[None]:
    """Within, the head projects these places alone: a whole row times LLaDA's vocabulary would fill a GPU."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return
    # A hook, as models with code of their own need not know `logits_to_keep`.
    handle = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, first:last],))
    try:
        yield
    finally:
        handle.remove()
