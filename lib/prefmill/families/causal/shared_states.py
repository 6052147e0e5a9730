"""Layers that carry a state along a sequence (convolutions, Mamba, gated delta rule), on a prompt that is shared.

The prompt runs once; every response starts from the state that it leaves, and their gradients meet in it. A layer does
this itself, by the code with which it goes on from a cache: it is only given one that keeps what autograd needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

from prefmill.families.causal.varlen_attention import Segment

_UPDATES = {"update_conv_state", "update_recurrent_state"}
_SEGMENTS = "prefmill_segments"  # of the row that the layer runs, while it does
_CACHES = ("cache_params", "past_key_values")


class PromptStates:
    """The states that one layer has after a prompt, in the form of a transformers cache.

    transformers' own copies into buffers of a fixed address, which ends the gradient. Empty it takes the states of a
    prompt [1, ...]; `for_rows` gives a cache that rows of responses go on from.
    """

    record_past = False  # read by layers: no speculative decoding here

    def __init__(self, conv: dict[int, Tensor] | None = None, recurrent: dict[int, Tensor] | None = None) -> None:
        self.conv_states, self.recurrent_states = dict(conv or {}), dict(recurrent or {})
        self._started = conv is not None
        self.layers = _Every(self)

    def for_rows(self, count: int) -> PromptStates:
        """The same states for `count` rows."""
        conv, recurrent = (
            # Views of one state: no copy for each response, and all gradients add up in it.
            {place: states.expand(count, *states.shape[1:]) for place, states in kept.items()}
            for kept in (self.conv_states, self.recurrent_states)
        )
        return PromptStates(conv, recurrent)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether rows go on from a prompt."""
        return self._started

    def get_conv_state(self, layer_idx: int = 0, state_idx: int = 0) -> Tensor | None:
        """The last columns of a prompt that rows go on from; None in the prompt itself."""
        return self.conv_states.get(state_idx) if self._started else None

    def get_recurrent_state(self, layer_idx: int = 0, state_idx: int = 0) -> Tensor | None:
        """The recurrent state that rows go on from; None in the prompt itself."""
        return self.recurrent_states.get(state_idx) if self._started else None

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """No: there is no speculative decoding here."""
        return self.record_past

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int = 0, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Keep the last columns of [rows, channels, tokens]; return all, with those before them."""
        size = conv_kernel_size or conv_states.shape[-1]
        before = self.conv_states.get(state_idx)
        if before is not None:
            conv_states = torch.cat([before, conv_states], dim=-1)
        # A prompt shorter than the kernel begins in zeros, as a convolution pads it.
        whole = F.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        self.conv_states[state_idx] = whole[..., -size:]
        return whole

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int = 0, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Keep a recurrent state as it is."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class _Every:
    """A cache's list of layers, of which the one that asks is the only one."""

    def __init__(self, states: PromptStates) -> None:
        self._states = states

    def __getitem__(self, _: int) -> PromptStates:
        return self._states


def share_states(model: nn.Module) -> None:
    """Have the layers of `model` that carry states run packed rows as prompts and responses; others are as they were.

    The segments reach such a layer from the arguments of the module around it, also when that is computed anew.
    """
    carrying = [part for part in model.modules() if _carries_state(type(part)) and not hasattr(part, _SEGMENTS)]
    for part in carrying:
        setattr(part, _SEGMENTS, None)
        part.forward = MethodType(_shared_forward, part)
    for module in model.modules():
        inside = [part for part in module.modules() if part in carrying]
        if inside and isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(partial(_tell, inside), with_kwargs=True)


def _tell(parts: Sequence[nn.Module], _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    for part in parts:
        setattr(part, _SEGMENTS, kwargs.get("segments"))


def _carries_state(kind: type) -> bool:
    # By what its code calls, not by its class: a new architecture that speaks to the cache is taken too.
    methods = (inspect.unwrap(method) for _, method in inspect.getmembers(kind, inspect.isfunction))
    return any(_UPDATES.intersection(method.__code__.co_names) for method in methods)


def _shared_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    segments = kwargs.pop("segments", getattr(self, _SEGMENTS))
    kwargs.pop("varlen", None)
    own = MethodType(type(self).forward, self)  # asked of the class each time: a copy of the model has parts of its own
    if segments is None:
        return own(*args, **kwargs)
    given = inspect.signature(own).bind(*args, **kwargs)
    given.apply_defaults()
    cache = next(name for name in _CACHES if name in given.signature.parameters)
    given.arguments["attention_mask"] = None  # packed rows have no padding
    hidden = given.arguments["hidden_states"]

    def mix(states: Tensor, cached: PromptStates) -> Tensor:
        given.arguments |= {"hidden_states": states, cache: cached}
        mixed: Tensor = own(*given.args, **given.kwargs)
        return mixed

    return torch.cat([part for segment in segments for part in _mix(hidden, segment, mix)], dim=1)


def _mix(hidden: Tensor, segment: Segment, mix: Any) -> Sequence[Tensor]:
    """A layer's outputs of a prompt and of its responses, [1, tokens, H] each, from a packed row [1, T, H]."""
    states = PromptStates()
    prompt = mix(hidden[:, slice(*segment.prompt)], states)
    rows = pad_sequence([hidden[0, slice(*span)] for span in segment.responses], batch_first=True)
    # A single token would take the path of decoding, which writes into its state.
    rows = F.pad(rows, (0, 0, 0, max(0, 2 - rows.shape[1])))
    mixed = mix(rows, states.for_rows(len(rows)))
    return [prompt, *(mixed[n : n + 1, : end - begin] for n, (begin, end) in enumerate(segment.responses))]
