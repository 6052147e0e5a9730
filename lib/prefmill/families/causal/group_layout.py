"""Batches in which a prompt is encoded once for all of its responses: packed groups, no padding, one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from prefmill.families.causal.scorer import Batch
from prefmill.families.causal.varlen_attention import Segment, varlen_index
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
