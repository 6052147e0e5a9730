"""Log-likelihoods of responses under a causal language model, without ever holding a prompt's or all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from prefmill.distributed.scoring import inner_model
from prefmill.distributed.sharding import pad_chunks
from prefmill.families.causal.router_loss import balancing_loss
from prefmill.families.causal.varlen_attention import Segment, VarlenIndex
from prefmill.families.causal.vision_families import FAMILIES
from prefmill.families.causal.vision_parts import decoder_of
from prefmill.training.batches import GroupPart, Movable
from prefmill.training.data import Group

LOGITS_AT_ONCE = 256  # rows of [vocabulary] in fp32 that exist at a time: 0.16 GB for 150,000 words


@dataclass(frozen=True)
class Batch(Movable):
    """R sequences of T tokens that hold S responses; completion tokens are listed one by one, C in all.

    `input_ids`, `attention_mask` [R, T] int64; `row`, `column`, `target`, `owner` [C]: the hidden state at
    (row, column) predicts token `target` of response `owner`; `lengths` [S] in tokens; `chosen`, `rejected` [N]
    name each pair's responses. Packed groups ([1, T]) also say where each token stands in its own sequence
    (`position_ids` [1, T]) and where the groups lie (`segments`, `varlen`). `images` are what the model's forward takes
    of them, by name; Qwen's then have `position_ids` [3, R, T].
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    owner: Tensor
    lengths: Tensor
    chosen: Tensor
    rejected: Tensor
    position_ids: Tensor | None = None
    segments: tuple[Segment, ...] | None = None
    varlen: VarlenIndex | None = None
    images: dict[str, Tensor] | None = None


def encode_sequences(sequences: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Prompt and response token ids, each pair of them a row of its own, padded on the right; no preferences yet."""
    # Padded on the right: positions count from 0 unasked, and causal attention never sees the padding.
    rows = [prompt + response for prompt, response in sequences]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    places = [
        (index, len(prompt) - 1 + offset, token)
        for index, (prompt, response) in enumerate(sequences)
        for offset, token in enumerate(response)
    ]
    row, column, target = torch.tensor(places).T.contiguous()
    lengths = torch.tensor([len(response) for _, response in sequences])
    none = torch.empty(0, dtype=torch.long)
    return Batch(input_ids, mask, row, column, target, row.clone(), lengths, none, none)


def encode_pairwise(groups: Sequence[Group], parts: Sequence[GroupPart], pad: int) -> Batch:
    """Every side of every pair as a sequence of its own: chosen of pair n in row 2n, rejected in row 2n + 1."""
    sequences = []
    for part in parts:
        group = groups[part.group]
        for index in part.pairs:
            pair = group.pairs[index]
            sequences += [(group.prompt, group.responses[place]) for place in (pair.chosen, pair.rejected)]
    chosen = torch.arange(0, len(sequences), 2)
    return replace(encode_sequences(sequences, pad), chosen=chosen, rejected=chosen + 1)


def patch_forward(model: Any) -> Any:
    """Make `model(...)` return the log-likelihood of every response, [S] float64, instead of logits.

    Done to `forward` itself, so that DDP, ZeRO-3 and adapters wrap it as they wrap any model. Logits are the output
    embeddings' projection, or where `model.own_head` is set (load_check does) what the model's own forward makes of it.
    """
    inner = inner_model(model)
    inner.masks_padding, inner.own_head = masks_padding(inner), False
    inner.forward = MethodType(_forward, inner)
    return model


def score_batch(model: Any, batch: Batch) -> Tensor:
    """The score of every response of a batch, [S] float64, through `model`'s installed forward."""
    given = {field.name: getattr(batch, field.name) for field in fields(batch)}
    inputs = {name: value for name, value in given.items() if name not in ("lengths", "chosen", "rejected")}
    scores: Tensor = model(**inputs, num_responses=len(batch.lengths))
    return scores


def _forward(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    row: Tensor,
    column: Tensor,
    target: Tensor,
    owner: Tensor,
    num_responses: int,
    position_ids: Tensor | None = None,
    segments: tuple[Segment, ...] | None = None,
    varlen: VarlenIndex | None = None,
    images: dict[str, Tensor] | None = None,
    **_: Any,
) -> Tensor:
    """Log-likelihood of every response, [S] float64: the sum over its tokens, end of turn included."""
    given: dict[str, Any] = {"position_ids": position_ids, "segments": segments, "varlen": varlen}
    given = {name: value for name, value in given.items() if value is not None}
    mask = attention_mask if self.masks_padding or position_ids is not None or _needs_mask_for_memory(self) else None
    # Only a training step takes the loss from the model, and with it the graph that it holds.
    if getattr(self, "counts_routing", False) and self.training:
        given["output_router_logits"] = True
    elif segments is not None:
        given["responses_only"] = True  # a router's loss reads what every layer gives a prompt
    family = FAMILIES.get(self.config.model_type)
    if family is not None:
        output = family.run(self, input_ids, mask, images, **given)
    else:
        output = decoder_of(self)(input_ids=input_ids, attention_mask=mask, use_cache=False, **given)
    if "output_router_logits" in given:
        self.router_loss = balancing_loss(output.router_logits, self.config.get_text_config(), attention_mask)
    hidden = output[0]
    head = OwnHead(self) if self.own_head else self.get_output_embeddings()
    # Of completions alone: in fp32 the logits of a prompt of 4,000 tokens would take 2.4 GB.
    # Not `hidden[row, column]`: responses share their prompt's last token, to which a CPU's threads would add gradients
    # in another order every time.
    read = F.embedding(row * hidden.shape[1] + column, hidden.flatten(0, 1))
    logps = token_logps(read, target, head)
    return sum_by_owner(logps, owner, num_responses)


class _Hidden(BaseModelOutputWithPast):
    """Hidden states as the output of any kind of model: what else is asked of it is None."""

    def __getattr__(self, name: str) -> None:
        # Python looks such names up for protocols of its own (copy, pickle), and would call None.
        if name.startswith("__"):
            raise AttributeError(name)


class OwnHead:
    """What a model's own forward makes of hidden states: the projection, and whatever scales or caps it.

    The part that it calls is made to return the states, so that no list of such models is needed.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def weight(self) -> Tensor:
        """The projection's weight, of which ranks may hold parts."""
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [C, V] of hidden states [C, H]."""
        # The ids are counted only: the part that would embed them is the one that is replaced.
        model, ids = self._model, torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        part = decoder_of(model) if model.base_model is model else model.base_model
        with forward_as(part, lambda *_, **__: _Hidden(last_hidden_state=hidden[None])):
            logits: Tensor = type(model).forward(model, input_ids=ids, use_cache=False).logits[0]
        return logits


@contextmanager
def forward_as(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, `module` runs `forward` between its hooks, and afterwards its own again."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        restore_own_forward(module, before)


def restore_own_forward(module: Any, before: Any) -> None:
    """Give `module` back the forward that it had in its own dictionary, or its class's."""
    if before is None:
        del module.forward
    else:
        module.forward = before


def sum_by_owner(logps: Tensor, owner: Tensor, num_owners: int) -> Tensor:
    """The sum of each owner's values, [num_owners] float64, from values [C] and the owner of each, [C].

    A GPU adds in another order every time: in fp32 the sum of 600 tokens then differs by up to 2e-3, which would be
    the difference between a policy at step 0 and its reference.
    """
    sums = torch.zeros(num_owners, dtype=torch.float64, device=logps.device)
    return sums.index_add(0, owner, logps.double())


def masks_padding(model: Any) -> bool:
    """Whether `model` is told where rows are padded on the right; plain causal attention never looks there.

    A mask would rule flash attention out. Windows, states and attention code of a model's own keep theirs.
    """
    config = model.config.get_text_config()
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    # A window as long as the context hides nothing.
    if window and window >= (getattr(config, "max_position_embeddings", None) or window + 1):
        kinds -= {"sliding_attention"}
    return bool(kinds - {"full_attention"}) or not model._can_set_attn_implementation()


def _needs_mask_for_memory(model: Any) -> bool:
    """On a GPU without a mask, fewer key heads than heads run in fp32 only by the kernel that holds T x T."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    fewer = getattr(config, "num_key_value_heads", heads) != heads
    return fewer and model.device.type == "cuda" and not torch.is_autocast_enabled("cuda") and model.dtype.itemsize > 2


def token_logps(hidden: Tensor, target: Tensor, head: nn.Module | OwnHead) -> Tensor:
    """log p(target) from hidden states [C, H] and token ids [C], [C] fp32, in chunks forward and backward."""
    # Where ranks share the head, each has to run it equally often, however long its own answers are.
    states, targets = (pad_chunks(torch.split(values, LOGITS_AT_ONCE), head) for values in (hidden, target))
    return _logps_of(states, targets, head)


def logps_inside(hidden: Tensor, target: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """As `token_logps`, for a head that is running: `project` is what it does to a chunk."""
    return _logps_of(torch.split(hidden, LOGITS_AT_ONCE), torch.split(target, LOGITS_AT_ONCE), project)


def _logps_of(states: Sequence[Tensor], targets: Sequence[Tensor], project: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat(recomputed(_chunk_logps, [(*chunk, project) for chunk in zip(states, targets, strict=True)]))


def recomputed(work: Callable[..., Tensor], chunks: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """`work` of every chunk's arguments, which holds no activations but the last chunk's: others run again backward.

    The backward pass begins with the last chunk, and would run it again at once: holding it costs nothing at the peak.
    `work` draws nothing at random.
    """
    if not torch.is_grad_enabled():
        return [work(*chunk) for chunk in chunks]
    *others, last = chunks
    again = [checkpoint(work, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in others]
    return [*again, work(*last)]


def _chunk_logps(hidden: Tensor, target: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    return logps_of(project(hidden), target)


def logps_of(logits: Tensor, target: Tensor) -> Tensor:
    """log p(target) from logits [C, V] and token ids [C], [C] in fp32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -F.cross_entropy(logits.to(wide), target, reduction="none")
