"""Point 2: group attention and one call a sequence against attention written out in float64, with gradients."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prefmill.families.causal.group_attention import group_attention
from prefmill.families.causal.varlen_attention import Segment, attention_kernel, varlen_index

HEADS, KEY_HEADS = 16, 2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the norm
LENGTHS = {"cpu": (12, (1, 5, 20)), "cuda": (3000, (1, 150, 2000))}  # of the prompt and of its responses
CASES = list(product((64, 80, 128), TOLERANCE))


def states(device: torch.device, size: int, dtype: torch.dtype) -> tuple[list[Tensor], Segment]:
    """Queries, keys and values of a packed group, [1, heads, T, D], and where it lies."""
    prompt, lengths = LENGTHS[device.type]
    ends = torch.tensor([prompt, *lengths]).cumsum(0).tolist()
    segment = Segment((0, prompt), tuple(pairwise(ends)))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, ends[-1], size, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [value.to(device, dtype).requires_grad_() for value in drawn], segment


def grouped(query: Tensor, key: Tensor, value: Tensor, segment: Segment) -> Tensor:
    """What the library computes, [1, T, heads, D]."""
    index = varlen_index([segment]).to(query.device)
    return group_attention(None, query, key, value, None, segments=[segment], varlen=index)[0]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, segment: Segment, exact: bool) -> Tensor:
    """The same from a call for every sequence, as the pairwise layout has them; `exact` writes it out."""
    attend, first = written_out if exact else torch_call, range(*segment.prompt)
    parts = [attend(*(item[:, :, : len(first)] for item in (query, key, value)))]
    for response in segment.responses:
        places = torch.tensor([*first, *range(*response)], device=query.device)
        parts.append(attend(*(item[:, :, places] for item in (query, key, value)))[:, :, len(first) :])
    return torch.cat(parts, 2).transpose(1, 2)


def torch_call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's causal attention."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(QK'/sqrt(d))V, causal (Vaswani et al. 2017, eq. 1)."""
    key, value = (item.repeat_interleave(HEADS // KEY_HEADS, 1) for item in (key, value))
    length = query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    logits = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def with_gradients(attended: Tensor, given: list[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of a weighted sum of them, all in float64."""
    pull = torch.randn(attended.shape, generator=torch.Generator().manual_seed(1)).to(attended)
    gradients = torch.autograd.grad(attended, given, pull)
    return [value.detach().double() for value in (attended, *gradients)]


@pytest.mark.parametrize(("size", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_it_is_attention_in_float64(device: torch.device, size: int, dtype: torch.dtype) -> None:
    given, segment = states(device, size, dtype)
    wide = [value.detach().double().requires_grad_() for value in given]
    expected = with_gradients(one_by_one(*wide, segment, exact=True), wide)
    for name, attended in (
        ("group", grouped(*given, segment)), ("pairwise", one_by_one(*given, segment, exact=False)),
    ):  # fmt: skip
        for found, right in zip(with_gradients(attended, given), expected, strict=True):
            assert (found - right).norm() / right.norm() < TOLERANCE[dtype], name


def test_the_flash_kernel_is_what_runs(device: torch.device) -> None:
    given, segment = states(device, 128, torch.bfloat16)
    if device.type == "cpu":
        assert attention_kernel(given[0], given[2]) == "loop"
        return
    for attend in (grouped, lambda *all_given: one_by_one(*all_given, exact=False)):
        assert any("flash" in name.lower() for name in kernels(attend, *given, segment))


def kernels(work: Any, *given: Any) -> list[str]:
    """The names of the kernels that `work` launches, forward and backward."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        work(*given).sum().backward()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]
