"""The batch plan: which pairs every microbatch of every rank holds, made before training and the same on resume."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefmill.preference.data import Group


@dataclass(frozen=True)
class GroupPart:
    """Some pairs of a group, by their places in `Group.pairs`."""

    group: int
    pairs: tuple[int, ...]


@dataclass(frozen=True)
class Microbatch:
    """What one rank sees at once, and how many pairs its optimizer step holds over all ranks."""

    parts: tuple[GroupPart, ...]
    step_pairs: int
    step: int
    epoch: int

    @property
    def num_pairs(self) -> int:
        """Pairs in this microbatch; 0 in one that only keeps the ranks in step."""
        return sum(len(part.pairs) for part in self.parts)


def plan_batches(
    groups: Sequence[Group], epochs: int, target_pairs: int, num_microbatches: int, seed: int
) -> list[Microbatch]:
    """Microbatches of all epochs, `num_microbatches` for every optimizer step, in the order ranks take them.

    A step takes whole groups, shuffled by (seed, epoch), until it holds about `target_pairs`; a group that alone
    holds more is a step of its own. Its pairs are spread evenly over the step's microbatches.
    """
    plan: list[Microbatch] = []
    step = 0
    for epoch in range(epochs):
        order = list(range(len(groups)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        for members in _steps(groups, order, target_pairs):
            step_pairs = sum(len(groups[member].pairs) for member in members)
            for parts in _spread(groups, members, num_microbatches):
                plan.append(Microbatch(parts, step_pairs, step, epoch))
            step += 1
    return plan


def _steps(groups: Sequence[Group], order: Sequence[int], target_pairs: int) -> Iterator[list[int]]:
    members: list[int] = []
    held = 0
    for index in order:
        size = len(groups[index].pairs)
        # Over the target by less than half a group is nearer to it than under it by more.
        if members and held + size - target_pairs > target_pairs - held:
            yield members
            members, held = [], 0
        members.append(index)
        held += size
        if held >= target_pairs:
            yield members
            members, held = [], 0
    if members:
        yield members


def _spread(groups: Sequence[Group], members: Sequence[int], parts: int) -> Iterator[tuple[GroupPart, ...]]:
    """The pairs of a step cut into `parts` runs whose lengths differ by one at most; some may be empty."""
    flat = [(member, pair) for member in members for pair in range(len(groups[member].pairs))]
    for index in range(parts):
        cut = flat[len(flat) * index // parts : len(flat) * (index + 1) // parts]
        held = {member: tuple(pair for owner, pair in cut if owner == member) for member, _ in cut}
        yield tuple(GroupPart(member, pairs) for member, pairs in held.items())
