"""Attention of a prompt that several responses share: [prompt | r1 | r2 | ...], each response seeing prompt and itself.

The prompt runs through the model once instead of once a response. Exact for causal models, because nothing in the
prompt sees a response; positions of every response restart at the prompt's length. Layout and cost: pair-only sharing
is arXiv 2410.20305, this shares among all responses of a group. Windows, chunks, capped scores and attention sinks are
the layer's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from prefmill.core.errors import ConfigError
from prefmill.families.causal import attention_pattern
from prefmill.families.causal.attention_pattern import GROUP_ATTENTION, MaskPattern, is_causal
from prefmill.families.causal.shared_states import share_states
from prefmill.families.causal.varlen_attention import Range, Segment, VarlenIndex, attention_kernel, varlen_attention

_KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "hybrid",
                 "mlp", "moe"}  # fmt: skip
_QUERIES_AT_ONCE = 512  # of a prompt, where a mask or scores must exist


@dataclass(frozen=True)
class LayerAttention:
    """How a layer makes weights of scores: scaled, seen through `pattern`, capped (Gemma 2), beside `sinks` [heads].

    A sink is a score that takes weight and gives no value (gpt-oss). With images `each` segment has its pattern.
    """

    scale: float | None
    pattern: MaskPattern | None = None
    each: tuple[MaskPattern | None, ...] | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def written_out(self) -> bool:
        """Whether no kernel of torch's computes it."""
        return self.softcap is not None or self.sinks is not None

    def is_causal(self, length: int) -> bool:
        """Whether torch's causal attention is this, in sequences of `length` tokens."""
        return not self.written_out and self.each is None and is_causal(self.pattern, length)

    def of(self, segment: int) -> LayerAttention:
        """This layer's in one segment."""
        return self if self.each is None else replace(self, pattern=self.each[segment], each=None)


def group_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskPattern | tuple[MaskPattern | None, ...] | Tensor | None,
    *,
    segments: Sequence[Segment] | None = None,
    varlen: VarlenIndex | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    responses_only: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed sequence, [1, heads, T, D] queries to [1, T, heads, D]; keys may have fewer heads.

    No mask over T x T exists: the prompt is a causal call of its own, and each response one that is causal from the
    bottom right against [prompt, itself]. `segments` must cover the sequence in order, `varlen` is their index. With
    `responses_only` a prompt's hidden states but the last are not read behind the model: its last layer leaves them out
    on a CPU. Raises ConfigError for a mask that the model made on its own.
    """
    if segments is None:  # layers that keep what they are given to themselves
        raise refused("layers that do not pass arguments on to their attention", type(module).__name__)
    assert query.shape[0] == 1, "a packed batch is one row"
    if isinstance(attention_mask, Tensor):
        raise refused("a model that makes its attention masks itself", type(module).__name__)
    # Under autocast rotary positions leave queries and keys in fp32, beside values in the precision computed in.
    query, key = query.to(value.dtype), key.to(value.dtype)
    each = attention_mask if isinstance(attention_mask, tuple) else None
    pattern = None if isinstance(attention_mask, tuple) else attention_mask
    scoring = LayerAttention(scaling, pattern, each, softcap, s_aux)
    if varlen is not None and attention_kernel(query, value) == "varlen":
        causal = scoring.is_causal(max(varlen.longest_prompt, varlen.longest_keys))
        if causal or (not scoring.written_out and pattern is not None and pattern.window):
            query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
            window = None if causal or pattern is None else pattern.reach
            return varlen_attention(query, key, value, varlen, scaling, window)[None], None
    return loop_attention(query, key, value, segments, scoring, responses_only and _is_last(module)), None


def loop_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scoring: LayerAttention,
    responses_only: bool = False,
) -> Tensor:
    """A call for every prompt and every response, for CPUs and for what no flash kernel takes.

    With `responses_only` zeros stand for a prompt's tokens before its last, which predicts the responses' first.
    """
    if key.shape[1] != query.shape[1] and (query.is_cuda or scoring.written_out):
        # In fp32 no kernel but the one that holds T x T takes fewer key heads.
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    parts: list[Tensor] = []
    for place, segment in enumerate(segments):
        keys, values, own = _rows(key, segment.prompt), _rows(value, segment.prompt), scoring.of(place)
        first = max(keys.shape[2] - 1, 0) if responses_only else 0
        parts.append(values.new_zeros(1, query.shape[1], first, values.shape[3]))
        parts += _prompt(_rows(query, segment.prompt), keys, values, own, first)
        for span in segment.responses:
            parts.append(_respond(_rows(query, span), _rows(key, span), _rows(value, span), keys, values, own))
    # Rows first: kernels lay their results out so, and a copy is saved.
    attended = torch.cat([part.transpose(1, 2) for part in parts], dim=1)
    assert attended.shape[1] == query.shape[2], "segments must cover the sequence"
    return attended


def _prompt(query: Tensor, key: Tensor, value: Tensor, scoring: LayerAttention, first: int) -> list[Tensor]:
    """Attention of a prompt to itself, from query `first` on, some queries at a time where it is more than causal."""
    length = query.shape[2]
    if not first and scoring.is_causal(length):
        grouped = key.shape[1] != query.shape[1]
        return [
            scaled_dot_product_attention(query, key, value, is_causal=True, scale=scoring.scale, enable_gqa=grouped)
        ]
    parts = []
    for start in range(first, length, _QUERIES_AT_ONCE):
        queries, pattern = range(start, min(start + _QUERIES_AT_ONCE, length)), scoring.pattern or MaskPattern()
        keys = range(pattern.first_key(start), length if pattern.ahead else queries.stop)
        seen = (keys.start, keys.stop)
        # Written out, autograd would keep the scores of every block of every layer.
        work = _again if scoring.written_out else _attend
        parts.append(
            work(_rows(query, (start, queries.stop)), _rows(key, seen), _rows(value, seen), queries, keys, scoring)
        )
    return parts


def _respond(
    query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, scoring: LayerAttention
) -> Tensor:
    """Attention of one response, causal from the bottom right against [prompt, itself], [1, heads, R, D].

    Autograd would keep a copy of the prompt's keys and values for every response of every layer, on a CPU its mask
    too; so a response shorter than its prompt is computed anew in the backward pass, which costs little.
    """
    before, length = prompt_key.shape[2], query.shape[2]
    queries = range(before, before + length)
    keys = range((scoring.pattern or MaskPattern()).first_key(before), queries.stop)

    def attend(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor) -> Tensor:
        seen = (keys.start, before)
        keys_joined = torch.cat([_rows(prompt_key, seen), key], dim=2)
        values_joined = torch.cat([_rows(prompt_value, seen), value], dim=2)
        return _attend(query, keys_joined, values_joined, queries, keys, scoring)

    states = (query, key, value, prompt_key, prompt_value)
    if torch.is_grad_enabled() and length < before:
        # Nothing in it is random: saving the generator's state for every response would be for nothing.
        again: Tensor = checkpoint(attend, *states, use_reentrant=False, preserve_rng_state=False)
        return again
    return attend(*states)


def _is_last(module: Any) -> bool:
    """Whether no layer of the model comes after this attention's."""
    config = getattr(module, "config", None)
    return config is not None and getattr(module, "layer_idx", None) == config.get_text_config().num_hidden_layers - 1


def _again(*given: Any) -> Tensor:
    """`_attend`, whose scores are computed anew in the backward pass."""
    if not torch.is_grad_enabled():
        return _attend(*given)
    attended: Tensor = checkpoint(_attend, *given, use_reentrant=False, preserve_rng_state=False)
    return attended


def _attend(query: Tensor, key: Tensor, value: Tensor, queries: range, keys: range, scoring: LayerAttention) -> Tensor:
    """Attention of queries at the places `queries` of a sequence to keys at `keys`, [1, heads, Q, D]."""
    # torch's CausalBias says the same, but cannot be traced: no torch.compile, no fake tensors.
    pattern = MaskPattern() if is_causal(scoring.pattern, queries.stop) else scoring.pattern or MaskPattern()
    mask = pattern.mask(queries, keys, query.device)
    if not scoring.written_out:
        grouped = key.shape[1] != query.shape[1]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scoring.scale, enable_gqa=grouped
        )  # fmt: skip
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    # In fp32 at least, as transformers' own softmax for Gemma 2; in float64 where a test computes in it.
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide)[..., : len(keys)].to(value.dtype)
    return weights @ value


def use_group_attention(model: Any) -> None:
    """Switch `model` to this attention; raises ConfigError where its layers are known not to be of this kind.

    Layers that carry a state along the sequence share their prompt's too.
    """
    config = model.config.get_text_config()
    # Sparse layers choose keys by content, which would not show in the few tokens of the load check.
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if unknown:
        raise refused(f"layers of {', '.join(unknown)}", config.model_type)
    AttentionInterface.register(GROUP_ATTENTION, group_attention)
    # A model that ranks share is checked after this, and then needs its own attention once more.
    model.attention_before = config._attn_implementation
    attention_pattern.register()
    if config is model.config:
        model.set_attn_implementation(GROUP_ATTENTION)
    else:  # images are encoded with the attention of their own part
        model.set_attn_implementation({"text_config": GROUP_ATTENTION})
    # A model with attention code of its own only warns and goes on as it was.
    if config._attn_implementation != GROUP_ATTENTION:
        raise refused("attention that cannot be exchanged", config.model_type)
    share_states(model)


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Within, `model` attends as before `use_group_attention`, if it was called."""
    config = model.config.get_text_config()
    now = config._attn_implementation
    config._attn_implementation = getattr(model, "attention_before", now)
    try:
        yield
    finally:
        config._attn_implementation = now


def refused(got: str, where: str) -> ConfigError:
    """The error for a model in which prompts cannot be shared."""
    return ConfigError(
        "layout: group cannot share prompts in this model", where=where, got=got,
        expected="full, sliding or chunked attention, convolutions, Mamba or linear attention",
        fix="leave layout out, or set layout=pairwise, for this model",
    )  # fmt: skip


def _rows(states: Tensor, span: Range) -> Tensor:
    return states[:, :, span[0] : span[1]]
