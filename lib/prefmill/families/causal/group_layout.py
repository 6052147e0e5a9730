"""Batches in which a prompt and its images are encoded once for all of its responses: packed groups, no padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prefmill.families.causal.scorer import Batch
from prefmill.families.causal.varlen_attention import Segment, varlen_index
from prefmill.families.causal.vision import ImageReader
from prefmill.training.batches import GroupPart
from prefmill.training.data import Group

Prompted = tuple[list[int], list[list[int]]]  # a prompt's token ids, and those of responses to it


def encode_groups(groups: Sequence[Group], parts: Sequence[GroupPart]) -> Batch:
    """The parts of a microbatch packed into one row: each prompt once, then each distinct response of its pairs."""
    prompted, chosen, rejected = compared(groups, parts)
    return replace(pack(prompted), chosen=torch.tensor(chosen), rejected=torch.tensor(rejected))


def compared(groups: Sequence[Group], parts: Sequence[GroupPart]) -> tuple[list[Prompted], list[int], list[int]]:
    """Each part's prompt with the distinct responses of its pairs; chosen and rejected as places among all of these."""
    prompted: list[Prompted] = []
    chosen: list[int] = []
    rejected: list[int] = []
    num_responses = 0
    for part in parts:
        group = groups[part.group]
        pairs = [group.pairs[index] for index in part.pairs]
        wanted = sorted({place for pair in pairs for place in (pair.chosen, pair.rejected)})
        places = {place: num_responses + n for n, place in enumerate(wanted)}
        prompted.append((group.prompt, [group.responses[place] for place in wanted]))
        chosen += [places[pair.chosen] for pair in pairs]
        rejected += [places[pair.rejected] for pair in pairs]
        num_responses += len(places)
    return prompted, chosen, rejected


def pack(groups: Sequence[Prompted]) -> Batch:
    """[prompt | r1 | r2 | ... | prompt | ...] as one row of T tokens; no preferences yet.

    A response's positions go on where its prompt ended, and its first token is predicted by the prompt's last one.
    """
    tokens: list[int] = []
    positions: list[int] = []
    columns: list[int] = []
    segments: list[Segment] = []
    for prompt, responses in groups:
        start = len(tokens)
        tokens += prompt
        positions += range(len(prompt))
        last = len(tokens) - 1
        ranges = []
        for response in responses:
            begin = len(tokens)
            tokens += response
            # The same positions as in a row of its own: rotary embeddings know nothing of the other responses.
            positions += range(len(prompt), len(prompt) + len(response))
            columns += [last, *range(begin, len(tokens) - 1)]
            ranges.append((begin, len(tokens)))
        segments.append(Segment((start, start + len(prompt)), tuple(ranges)))
    answers = [response for _, responses in groups for response in responses]
    lengths = torch.tensor([len(response) for response in answers])
    none = torch.empty(0, dtype=torch.long)
    return Batch(
        input_ids=torch.tensor([tokens]),
        # Nothing is padded, but the router's loss counts tokens by the mask.
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        row=torch.zeros(len(columns), dtype=torch.long),
        column=torch.tensor(columns),
        target=torch.tensor([token for response in answers for token in response]),
        owner=torch.arange(len(answers)).repeat_interleave(lengths),
        lengths=lengths,
        chosen=none,
        rejected=none,
        position_ids=torch.tensor([positions]),
        segments=tuple(segments),
        varlen=varlen_index(segments),
    )


def cut_responses(group: Group, max_tokens: int | None) -> Iterator[Prompted]:
    """All responses of a group in as few packs of at most `max_tokens` as their order gives, its prompt in each."""
    held: list[list[int]] = []
    size = len(group.prompt)
    for response in group.responses:
        # A response that is too long by itself still goes, alone: none is left without a score.
        if held and max_tokens is not None and size + len(response) > max_tokens:
            yield group.prompt, held
            held, size = [], len(group.prompt)
        held.append(response)
        size += len(response)
    yield group.prompt, held


def add_images(batch: Batch, groups: Sequence[Group], reader: ImageReader) -> Batch:
    """`batch` with the images of the groups that its prompts come from, in their order.

    Packed batches hold every prompt once, so that its images are encoded once; in others each row has them.
    """
    if not any(group.images for group in groups):
        return batch
    batch = replace(batch, images=reader.pixels([path for group in groups for path in group.images]))
    places = [found for group in groups if (found := reader.positions(group.prompt, group.images)) is not None]
    if not places:  # a family whose positions only count on
        return batch
    return replace(batch, position_ids=_packed(batch, places) if batch.segments is not None else _rows(batch, places))


def _packed(batch: Batch, prompts: Sequence[Tensor]) -> Tensor:
    """Positions [3, 1, T]: every response goes on after the highest position of its prompt."""
    assert batch.segments is not None
    positions = torch.zeros(3, 1, batch.input_ids.shape[1], dtype=torch.long)
    for segment, prompt in zip(batch.segments, prompts, strict=True):
        positions[:, 0, slice(*segment.prompt)] = prompt
        for begin, end in segment.responses:
            # Text goes on after the highest of the three: an image has more tokens than positions along an axis.
            positions[:, 0, begin:end] = prompt.max() + 1 + torch.arange(end - begin)
    return positions


def _rows(batch: Batch, prompts: Sequence[Tensor]) -> Tensor:
    """Positions [3, R, T] of rows padded on the right."""
    positions = torch.zeros(3, *batch.input_ids.shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        positions[:, row, :length] = prompt
        # Padding is counted on too: it stands behind the answer, where no token looks.
        positions[:, row, length:] = prompt.max() + 1 + torch.arange(batch.input_ids.shape[1] - length)
    return positions
