"""Rows that go on from one cache, each by itself: a review's items, asked together on what was read of it once."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefmill.checklist.prompts import TokenIds
from prefmill.core.errors import PrefmillError
from prefmill.families.causal.load_check import TOLERANCE
from prefmill.families.causal.scorer import masks_padding

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class PackedRows:
    """All in a single row, where a mask hides the others: nothing is padded, and the cache is not repeated."""

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self._model, self._past = model, cache.get_seq_length()
        self._cache: Any = copy.deepcopy(cache)  # a forward extends its cache in place
        self._seen: list[tuple[int, int]] = []  # the row of every token behind the cache, and its place there

    def extend(self, rows: Sequence[TokenIds], num_kept: int = 1) -> Tensor:
        """Logits [N, num_kept, V] at the last places after `rows` were put behind what each of the N had."""
        done = Counter(row for row, _ in self._seen)
        new = [(row, done[row] + place) for row, tokens in enumerate(rows) for place in range(len(tokens))]
        self._seen += new
        owner, place = torch.tensor(new).T
        owners, places = torch.tensor(self._seen).T
        # Numbers and no booleans: attention that is written out adds the mask to its scores.
        mask = torch.zeros(1, 1, len(new), self._past + len(self._seen), dtype=self._model.dtype)
        unseen = (owner[:, None] != owners) | (place[:, None] < places)
        mask[0, 0, :, self._past :].masked_fill_(unseen, torch.finfo(self._model.dtype).min)
        kept = torch.tensor(list(accumulate(map(len, rows))))[:, None] + torch.arange(-num_kept, 0)
        device = self._model.device
        output = self._model(
            input_ids=torch.tensor([[token for row in rows for token in row]], device=device),
            attention_mask=mask.to(device),
            position_ids=(self._past + place)[None].to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=kept.flatten().to(device),
        )
        logits: Tensor = output.logits
        return logits.view(len(rows), num_kept, -1)


class PaddedRows:
    """As `PackedRows`, as a batch in which the cache is repeated for every row: what any model takes.

    Rows are padded on the left, between cache and question, so that the last position is the same for all.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self._model, self._past = model, cache.get_seq_length()
        self._cache: Any = copy.deepcopy(cache)
        self._mask: Tensor | None = None

    def extend(self, rows: Sequence[TokenIds], num_kept: int = 1) -> Tensor:
        """As `PackedRows.extend`."""
        length = max(map(len, rows))
        pads = [length - len(row) for row in rows]
        # Any id serves as padding, since the mask hides it; not every tokenizer has a padding token.
        tokens = [[0] * pad + [*row] for pad, row in zip(pads, rows, strict=True)]
        new = torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads], device=self._model.device)
        if self._mask is None:
            self._mask = new.new_ones(len(rows), self._past)
            self._cache.batch_repeat_interleave(len(rows))
        self._mask = torch.cat([self._mask, new], 1)
        output = self._model(
            input_ids=torch.tensor(tokens, device=self._model.device),
            attention_mask=self._mask,
            # transformers numbers positions without a look at the mask, and would count the padding.
            position_ids=(self._mask.cumsum(1) - 1)[:, -length:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=num_kept,
        )
        logits: Tensor = output.logits
        return logits


ContinuedRows = PackedRows | PaddedRows
MakeRows = Callable[["PreTrainedModel", "Cache"], ContinuedRows]


@torch.inference_mode()
def rows_of(model: PreTrainedModel) -> MakeRows:
    """The rows that are to `model` what each is alone: packed where that is so of two, tried here.

    Not where layers see a window or carry a state, where attention reads no such mask, or where the second row changes
    with the first by a bit.
    """
    if masks_padding(model):  # a window does not show in a few tokens
        return PaddedRows
    size = model.get_input_embeddings().num_embeddings
    prompt, *rows = (tuple(token % size for token in range(7 * place, 7 * place + 7)) for place in range(1, 5))
    try:
        alone, cache = (
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=True)
            for ids in (prompt + rows[0], prompt)
        )
        found, beside_another = (
            PackedRows(model, cache.past_key_values).extend([neighbour, rows[0]])[1, 0] for neighbour in rows[1:]
        )
    except (PrefmillError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # whatever a model's code makes of a mask that it does not know
        return PaddedRows
    expected, logps = (logits.double().log_softmax(-1) for logits in (alone.logits[0, -1], found))
    exact = torch.equal(found, beside_another) and bool((logps - expected).abs().max() <= TOLERANCE[model.dtype])
    return PackedRows if exact else PaddedRows
