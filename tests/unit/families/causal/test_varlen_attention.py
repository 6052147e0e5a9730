"""Two calls of a variable-length kernel against the loop over responses: outputs and gradients in float64.

The kernel needs a GPU. Here each sequence's attention, written out in float64, stands in for it below torch's own
operators: what is tested is the index arithmetic, and that torch's signatures are those that are called.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

from prefmill.families.causal import varlen_attention
from prefmill.families.causal.attention_pattern import MaskPattern
from prefmill.families.causal.group_attention import (
    LayerAttention,
    group_attention,
    loop_attention,
    use_group_attention,
)
from prefmill.families.causal.group_layout import pack
from prefmill.families.causal.loading import load_model
from prefmill.families.causal.scorer import patch_forward, score_batch
from prefmill.families.causal.varlen_attention import Segment, varlen_index
from tests.tiny import save_tiny_qwen2

CALLS: list[tuple[int, int]] = []  # sequences and keys of each call of the kernel


def sequences(starts: tuple[Tensor, Tensor], *states: Tensor) -> Iterator[list[Tensor]]:
    """Queries first, then keys and values, of one sequence after another."""
    for n in range(len(starts[0]) - 1):
        cuts = [slice(*bounds[n : n + 2].tolist()) for bounds in starts]
        yield [part[cuts[min(place, 1)]] for place, part in enumerate(states)]


def probabilities(q: Tensor, k: Tensor, scale: float, window: list[int]) -> Tensor:
    """softmax(qk' scale), causal from the bottom right and `window[0]` tokens back, [heads, Q, K]."""
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    if window[0] >= 0:
        hidden |= torch.ones_like(hidden).tril(len(k) - len(q) - window[0] - 1)
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, window_size: list[int] | None = None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert window_size is not None
    assert is_causal == (window_size == [-1, 0])
    assert window_size[1] == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(query), len(key))
    CALLS.append((len(cu_q) - 1, len(key)))
    rows = []
    for q, k, v in sequences((cu_q, cu_k), query, key, value):
        weights = probabilities(q, k, scale or q.shape[-1] ** -0.5, window_size)
        rows.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(q.shape[1] // v.shape[1], 1)))
    return torch.cat(rows), torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, is_causal: bool, rng: Tensor, scale: float | None = None, window: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dV = P'dO, dS = P (dO V' - rowsum(dO O)), dQ = dS K scale, dK = dS' Q scale (Dao et al. 2022, appendix B)."""
    assert is_causal == (window == [-1, 0])
    scale = scale or query.shape[-1] ** -0.5
    found = []
    pulls = sequences((cu_q, cu_q), grad, out)
    for (q, k, v), (g, o) in zip(sequences((cu_q, cu_k), query, key, value), pulls, strict=True):
        times = q.shape[1] // k.shape[1]
        weights = probabilities(q, k, scale, window)
        of_weights = torch.einsum("qhd,khd->hqk", g, v.repeat_interleave(times, 1))
        inner = weights * (of_weights - (g * o).sum(-1).T[..., None]) * scale
        to_heads = [torch.einsum("hqk,qhd->khd", *pair) for pair in ((inner, q), (weights, g))]
        to_keys = [part.unflatten(1, (-1, times)).sum(2) for part in to_heads]
        found.append((torch.einsum("hqk,khd->qhd", inner, k.repeat_interleave(times, 1)), *to_keys))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.fixture(scope="module", autouse=True)
def _kernel_on_cpus() -> None:
    varlen._varlen_attn.register_kernel("cpu", forward)  # type: ignore[attr-defined]
    varlen._varlen_attn_backward.register_kernel("cpu", backward)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(varlen_attention, "forced", "varlen")


CHUNKS = MaskPattern(chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 4)
SEGMENTS = (  # a response of one token, one longer than its prompt, groups of one to four responses
    Segment((0, 7), ((7, 8), (8, 11), (11, 24), (24, 30))),
    Segment((30, 31), ((31, 36),)),
    Segment((36, 45), ((45, 47), (47, 49))),
)


@pytest.mark.parametrize("window", [None, 1, 4, 49])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
def test_outputs_and_gradients_are_those_of_the_loop(heads: int, key_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, n, 49, 8, dtype=torch.float64, requires_grad=True) for n in (heads, key_heads, key_heads)]
    pull = torch.randn(1, 49, heads, 8, dtype=torch.float64)
    sees = sliding_window_causal_mask_function(window or 0)
    pattern = None if window is None else MaskPattern(sees, window, window=True)
    results = []
    for index in (None, varlen_index(SEGMENTS)):
        out, _ = group_attention(None, *states, pattern, segments=SEGMENTS, varlen=index, scaling=0.3)
        results.append((out, *torch.autograd.grad((out * pull).sum(), states)))
    for left, right in zip(*results, strict=True):
        assert left.shape == right.shape
        assert (left - right).abs().max() < 1e-12
    assert CALLS == [(3, 17), (7, (7 + 1) + (7 + 3) + (7 + 13) + (7 + 6) + (1 + 5) + (9 + 2) * 2)]


def test_a_model_scores_and_learns_as_with_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a whole model, two calls a layer; recomputed in the backward pass too."""
    folder = save_tiny_qwen2(tmp_path)
    batch = pack([([5, 6, 7, 8], [[9, 10], [11]]), ([12, 13], [[14, 15, 16]])])
    found = []
    for kernel in ("loop", "varlen"):
        monkeypatch.setattr(varlen_attention, "forced", kernel)
        model = load_model(str(folder), precision="fp32").double()
        use_group_attention(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        scores = score_batch(patch_forward(model).train(), batch)
        scores.square().sum().backward()
        found.append((scores.detach(), [weight.grad for weight in model.parameters()]))
    (loop, left), (calls, right) = found
    assert (loop - calls).abs().max() < 1e-6  # transformers' norms are fp32
    assert all(
        (one - other).abs().max() < 1e-4 * one.abs().max() + 1e-7 for one, other in zip(left, right, strict=True)
    )
    assert CALLS == [(2, 6), (3, 6 + 5 + 5)] * 2 * 2


def test_what_is_kept_does_not_grow_with_responses_times_the_prompt() -> None:
    """Gathered keys are gathered again in the backward pass."""

    def kept(num_responses: int) -> int:
        spans = tuple((500 + 4 * n, 504 + 4 * n) for n in range(num_responses))
        segments = (Segment((0, 500), spans),)
        states = [torch.randn(1, n, 500 + 4 * num_responses, 8, requires_grad=True) for n in (4, 2, 2)]
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            group_attention(None, *states, None, segments=segments, varlen=varlen_index(segments))
        return sum(storages.values())

    assert kept(6) < 1.1 * kept(1)


@pytest.mark.slow
def test_both_ways_compile_without_a_break() -> None:
    """`aot_eager` traces forward and backward, and needs no compiler."""
    states = [torch.randn(1, n, 49, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    index = varlen_index(SEGMENTS)

    def two_calls(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return group_attention(None, query, key, value, None, segments=SEGMENTS, varlen=index)[0]

    def loop(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return loop_attention(query, key, value, SEGMENTS, LayerAttention(None))

    for work in (two_calls, loop):
        compiled = torch.compile(work, backend="aot_eager", fullgraph=True)(*states)
        plain = work(*states)
        assert (compiled - plain).abs().max() < 1e-12
        gradients = [torch.autograd.grad(out.square().sum(), states) for out in (compiled, plain)]
        assert all((one - other).abs().max() < 1e-12 for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("more", [{"softcap": 2.0}, {"s_aux": torch.ones(4)}, {"attention_mask": CHUNKS}])
def test_what_the_kernel_does_not_know_takes_the_loop(more: dict[str, Any]) -> None:
    states = [torch.randn(1, 4, 49, 8) for _ in range(3)]
    given: dict[str, Any] = {"attention_mask": None, "segments": SEGMENTS, "varlen": varlen_index(SEGMENTS), **more}
    group_attention(None, *states, **given)
    assert not CALLS


@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "kernel", "said"),
    [
        ("cuda", torch.bfloat16, (128, 128), "varlen", "two calls"),
        ("cuda", torch.float16, (80, 80), "varlen", "two calls"),
        ("cuda", torch.float32, (128, 128), "loop", "torch.float32 has no flash kernel"),
        ("cuda", torch.bfloat16, (12, 12), "loop", "heads of 12"),
        ("cuda", torch.bfloat16, (512, 512), "loop", "heads of 512"),
        ("cuda", torch.bfloat16, (192, 128), "loop", "values of 128"),
        ("cpu", torch.bfloat16, (128, 128), "loop", "runs on cpu"),
    ],
)
def test_the_kernel_is_chosen_once_and_told(
    device: str, dtype: torch.dtype, sizes: tuple[int, int], kernel: str, said: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(varlen_attention, "forced", None)
    varlen_attention._once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [varlen_attention._choose(device, dtype, *sizes) for _ in range(2)] == [kernel] * 2
    assert [said in record.getMessage() for record in caplog.records] == [True]


def test_torchs_operators_take_what_they_are_given() -> None:
    """On fake tensors torch's own description of both operators runs: signatures, shapes and dtypes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    heads = (4, 2, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        states = [torch.empty(1, n, 49, 8, dtype=torch.bfloat16, requires_grad=True) for n in heads]
        out, _ = group_attention(None, *states, None, segments=SEGMENTS, varlen=varlen_index(SEGMENTS))
        gradients = torch.autograd.grad(out.sum(), states)
    assert not CALLS
    assert (out.shape, out.dtype) == ((1, 49, 4, 8), torch.bfloat16)
    assert [(part.shape, part.dtype) for part in gradients] == [(state.shape, torch.bfloat16) for state in states]
