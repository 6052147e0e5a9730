"""Group attention in two calls of a variable-length flash kernel: all prompts, then all responses on gathered keys.

A loop over responses launches a kernel for each of them in every layer; this launches two, however many there are.
One call would do, but the kernel's grid is as long as the longest query: responses would wait on empty blocks of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from prefmill.distributed.devices import has_gpu
from prefmill.training.batches import Movable

Kernel = Literal["varlen", "loop"]
Range = tuple[int, int]
_CAUSAL = (-1, 0)  # varlen_attn's causal window; the kernel aligns it at the bottom right
_LARGEST_HEAD, _HEAD_MULTIPLE = 256, 8  # of flash attention
_OLDEST_GPU = (8, 0)  # Ampere

forced: Kernel | None = None
"""A kernel to use instead of the one chosen, for tests."""


@dataclass(frozen=True)
class Segment:
    """Where one group lies in a packed sequence: half-open ranges of its prompt and of each response."""

    prompt: Range
    responses: tuple[Range, ...]


@dataclass(frozen=True)
class VarlenIndex(Movable):
    """A packed row of T tokens as the kernel takes it: G prompts of P tokens in all, S responses of R, K keys of these.

    `prompts` [P], `responses` [R] and `keys` [K] int64 are places in the row, a response's keys being its prompt's and
    then its own; `prompt_starts` [G + 1], `response_starts` and `key_starts` [S + 1] int32 are cumulative lengths.
    `order` [T] int64 puts prompts followed by responses back into the row.
    """

    prompts: Tensor
    responses: Tensor
    keys: Tensor
    prompt_starts: Tensor
    response_starts: Tensor
    key_starts: Tensor
    order: Tensor
    longest_prompt: int
    longest_response: int
    longest_keys: int


def varlen_index(segments: Sequence[Segment]) -> VarlenIndex:
    """The index of groups that lie in a row one after another; every group has responses."""
    prompts = [segment.prompt for segment in segments]
    responses = [response for segment in segments for response in segment.responses]
    keys = [(segment.prompt, response) for segment in segments for response in segment.responses]
    prompt_rows, response_rows = _rows(prompts), _rows(responses)
    key_lengths = [sum(map(_length, pair)) for pair in keys]
    return VarlenIndex(
        prompts=prompt_rows,
        responses=response_rows,
        keys=_rows([span for pair in keys for span in pair]),
        prompt_starts=_starts(map(_length, prompts)),
        response_starts=_starts(map(_length, responses)),
        key_starts=_starts(key_lengths),
        order=torch.cat([prompt_rows, response_rows]).argsort(),
        longest_prompt=max(map(_length, prompts)),
        longest_response=max(map(_length, responses)),
        longest_keys=max(key_lengths),
    )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scale: float | None, window: int | None = None
) -> Tensor:
    """Attention over a packed row: queries [T, heads, D], keys and values [T, key heads, D], to [T, heads, D].

    A query sees `window` tokens, itself among them.
    """
    reach = _CAUSAL if window is None else (window - 1, 0)
    attended: Tensor = _GroupAttention.apply(query, key, value, index, scale, reach)  # type: ignore[no-untyped-call]
    return attended


def attention_kernel(query: Tensor, value: Tensor) -> Kernel:
    """The kernel for queries and values [..., D] of this device and dtype: chosen once, and told in the log."""
    return forced or _choose(query.device.type, query.dtype, query.shape[-1], value.shape[-1])


def _chosen(device: str, dtype: torch.dtype, head_size: int, value_size: int) -> Kernel:
    reason = _why_loop(device, dtype, head_size, value_size)
    shown = "a loop over responses, as " + reason if reason else "two calls of varlen_attn a layer"
    logging.getLogger(__name__).warning("group attention: %s", shown)
    return "loop" if reason else "varlen"


# torch.compile takes the choice as a constant: the log's line would break its graph.
_once = lru_cache(_chosen)
_choose: Callable[..., Kernel] = torch.compiler.assume_constant_result(_once)  # type: ignore[no-untyped-call]


def _why_loop(device: str, dtype: torch.dtype, head_size: int, value_size: int) -> str | None:
    """Why flash attention cannot run; None where it can."""
    if device != "cuda":
        return f"it runs on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} has no flash kernel"
    if head_size != value_size or head_size > _LARGEST_HEAD or head_size % _HEAD_MULTIPLE:
        return f"heads of {head_size}, values of {value_size}, have no flash kernel"
    if has_gpu() and torch.cuda.get_device_capability() < _OLDEST_GPU:
        return "this GPU has no flash kernel"
    return None


class _GroupAttention(torch.autograd.Function):
    """Both calls, and a backward pass that gathers the keys again: kept, they would be a prompt for every response."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scale: float | None, reach: Range
    ) -> Tensor:
        parts, sums = [], []
        for queries, keys, lengths in _calls(index):
            part, log_sum = varlen_attn(
                query[queries], key[keys], value[keys], *lengths,
                scale=scale, window_size=reach, enable_gqa=query.shape[1] != key.shape[1],
                return_aux=AuxRequest(lse=True),
            )  # fmt: skip
            parts.append(part)
            sums.append(log_sum)
        attended = torch.cat(parts)[index.order]
        ctx.save_for_backward(query, key, value, attended, *sums)
        ctx.index, ctx.scale, ctx.reach = index, scale, reach
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended, *sums = ctx.saved_tensors
        index: VarlenIndex = ctx.index
        to_queries = []
        # A prompt's keys take a gradient from every response: the sum is kept wider than its terms.
        wide = torch.promote_types(key.dtype, torch.float32)
        to_key, to_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for (queries, keys, lengths), log_sum in zip(_calls(index), sums, strict=True):
            # varlen_attn's own backward operator: the public function would save its gathered inputs.
            to_query, *to_rows = torch.ops.torch_attn._varlen_attn_backward(
                gradient[queries], query[queries], key[keys], value[keys], attended[queries], log_sum, *lengths,
                ctx.reach == _CAUSAL, torch.zeros(2, dtype=torch.uint64, device=query.device), ctx.scale,
                list(ctx.reach),
            )  # fmt: skip
            to_queries.append(to_query)
            for total, rows in zip((to_key, to_value), to_rows, strict=True):
                total.index_add_(0, keys, rows.to(wide))
        return torch.cat(to_queries)[index.order], to_key.to(key.dtype), to_value.to(value.dtype), None, None, None


def _calls(index: VarlenIndex) -> list[tuple[Tensor, Tensor, tuple[Tensor, Tensor, int, int]]]:
    """Places of queries and of keys, and cumulative lengths with the longest ones, of each of the two calls."""
    starts, longest = index.prompt_starts, index.longest_prompt
    prompts = (starts, starts, longest, longest)
    responses = (index.response_starts, index.key_starts, index.longest_response, index.longest_keys)
    return [(index.prompts, index.prompts, prompts), (index.responses, index.keys, responses)]


def _rows(spans: Sequence[Range]) -> Tensor:
    return torch.cat([torch.arange(*span) for span in spans])


def _starts(lengths: Any) -> Tensor:
    # Flash attention takes cumulative lengths in int32 only.
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _length(span: Range) -> int:
    return span[1] - span[0]
