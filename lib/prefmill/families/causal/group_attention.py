"""Attention of a prompt that several responses share: [prompt | r1 | r2 | ...], each response seeing prompt and itself.

The prompt runs through the model once instead of once a response. Exact for causal models, because nothing in the
prompt sees a response; positions of every response restart at the prompt's length. Layout and cost: pair-only sharing
is arXiv 2410.20305, this shares among all responses of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from prefmill.core.errors import ConfigError
from prefmill.families.causal.varlen_attention import Range, Segment, VarlenIndex, attention_kernel, varlen_attention

GROUP_ATTENTION = "prefmill_group"  # its name among transformers' attention implementations


def group_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment] | None = None,
    varlen: VarlenIndex | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed sequence, [1, heads, T, D] queries to [1, T, heads, D]; keys may have fewer heads.

    No mask over T x T exists: the prompt is a causal call of its own, and each response one that is causal from the
    bottom right against [prompt, itself]. `segments` must cover the sequence in order, `varlen` is their index.
    """
    assert segments is not None, "this attention runs on batches that encode_groups made"
    assert query.shape[0] == 1, "a packed batch is one row"
    # Under autocast rotary positions leave queries and keys in fp32, beside values in the precision computed in.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if varlen is not None and attention_kernel(query, value) == "varlen":
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        return varlen_attention(query, key, value, varlen, scaling)[None], None
    return loop_attention(query, key, value, segments, scaling), None


def loop_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scaling: float | None
) -> Tensor:
    """A call for every prompt and every response, for CPUs and for what no flash kernel takes."""
    grouped = key.shape[1] != query.shape[1]
    if grouped and query.is_cuda:
        # In fp32 no kernel but the one that holds T x T takes fewer key heads.
        times = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), False
    parts: list[Tensor] = []
    for segment in segments:
        prompt_key, prompt_value = _rows(key, segment.prompt), _rows(value, segment.prompt)
        parts.append(
            scaled_dot_product_attention(
                _rows(query, segment.prompt), prompt_key, prompt_value,
                is_causal=True, scale=scaling, enable_gqa=grouped,
            )
        )  # fmt: skip
        for response in segment.responses:
            states = (_rows(query, response), _rows(key, response), _rows(value, response))
            parts.append(_respond(*states, prompt_key, prompt_value, scaling, grouped))
    # Rows first: kernels lay their results out so, and a copy is saved.
    attended = torch.cat([part.transpose(1, 2) for part in parts], dim=1)
    assert attended.shape[1] == query.shape[2], "segments must cover the sequence"
    return attended


def _respond(
    query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor,
    scaling: float | None, grouped: bool,
) -> Tensor:  # fmt: skip
    """Attention of one response, causal from the bottom right against [prompt, itself], [1, heads, R, D].

    Autograd would keep a copy of the prompt's keys and values for every response of every layer, on a CPU its mask
    too; so a response shorter than its prompt is computed anew in the backward pass, which costs little.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor) -> Tensor:
        keys, values = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
        # torch's CausalBias says the same, but cannot be traced: no torch.compile, no fake tensors.
        seen = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device)
        mask = seen.tril(prompt_key.shape[2])
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped)

    states = (query, key, value, prompt_key, prompt_value)
    if torch.is_grad_enabled() and query.shape[2] < prompt_key.shape[2]:
        again: Tensor = checkpoint(attend, *states, use_reentrant=False, preserve_rng_state=False)
        return again
    return attend(*states)


def use_group_attention(model: Any, longest: int | None = None) -> None:
    """Switch `model` to this attention; raises ConfigError where it would not compute the same as the model's own.

    `longest` is the number of tokens that no prompt with a response exceeds: a window as long is none.
    """
    config = model.config.get_text_config()
    limited = limited_attention(config, longest)
    if limited is not None:
        raise ConfigError(
            "layout: group needs attention over the whole prompt in every layer", where=config.model_type, got=limited,
            expected="full_attention only", fix="leave layout out, or set layout=pairwise, for this model",
        )  # fmt: skip
    AttentionInterface.register(GROUP_ATTENTION, group_attention)
    if config is model.config:
        model.set_attn_implementation(GROUP_ATTENTION)
    else:  # images are encoded with the attention of their own part
        model.set_attn_implementation({"text_config": GROUP_ATTENTION})
    # A model with attention code of its own only warns and goes on as it was.
    if config._attn_implementation != GROUP_ATTENTION:
        raise ConfigError(
            "layout: group needs a model whose attention can be exchanged", where=config.model_type,
            fix="leave layout out, or set layout=pairwise, for this model",
        )  # fmt: skip


def limited_attention(config: Any, longest: int | None = None) -> str | None:
    """How the attention of a text model falls short of plain causal attention over `longest` tokens; None where not."""
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    reach = longest or getattr(config, "max_position_embeddings", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if window and reach and window >= reach:
        kinds -= {"sliding_attention"}
    if kinds - {"full_attention"}:
        return ", ".join(sorted(kinds)) + (f", a window of {window}" if window else "")
    return "capped attention logits" if getattr(config, "attn_logit_softcapping", None) else None


def _rows(states: Tensor, span: Range) -> Tensor:
    return states[:, :, span[0] : span[1]]
