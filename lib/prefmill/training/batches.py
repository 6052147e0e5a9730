"""The batch plan: which pairs every microbatch of every rank holds, made before training and the same on resume."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from prefmill.core.errors import ConfigError
from prefmill.store.missing import in_batches
from prefmill.training.data import Group

if TYPE_CHECKING:
    import torch


class AnyPair(Protocol):
    """A preference between two samples of a group, by their places in it."""

    @property
    def pair_id(self) -> str: ...
    @property
    def chosen(self) -> int: ...
    @property
    def rejected(self) -> int: ...


class AnyGroup(Protocol):
    """Pairs that share what they are conditioned on, whatever the model family."""

    @property
    def pairs(self) -> Sequence[AnyPair]: ...


class Movable:
    """A dataclass whose tensors move together, those in mappings and in such classes within it too."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        given: Any = self
        moved: Self = replace(given, **{item.name: _moved(getattr(self, item.name), device) for item in fields(given)})
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    return value.to(device) if hasattr(value, "to") else value


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
    skipped: bool = False  # no rank holds pairs at this place of the step, so nobody runs the model

    @property
    def num_pairs(self) -> int:
        """Pairs in this microbatch; 0 in one that only keeps the ranks in step."""
        return sum(len(part.pairs) for part in self.parts)


def plan_batches(
    groups: Sequence[AnyGroup], epochs: int, target_pairs: int, num_microbatches: int, seed: int
) -> list[Microbatch]:
    """Microbatches of all epochs, `num_microbatches` for every optimizer step, in the order ranks take them.

    A step takes whole groups, shuffled by (seed, epoch), until it holds about `target_pairs`; a group that alone
    holds more is a step of its own. Its pairs are spread evenly over the step's microbatches.
    """
    plan: list[Microbatch] = []
    for step, (epoch, members) in enumerate(_all_steps(groups, epochs, target_pairs, seed)):
        # Over all ranks: a mean of the ranks' means would give pairs of emptier ranks more weight.
        step_pairs = sum(len(groups[member].pairs) for member in members)
        for parts in _spread(groups, members, num_microbatches):
            plan.append(Microbatch(parts, step_pairs, step, epoch))
    return plan


def plan_group_batches(
    groups: Sequence[Group],
    epochs: int,
    target_pairs: int,
    pairs_at_once: int,
    world_size: int,
    max_tokens: int | None,
    seed: int,
) -> list[Microbatch]:
    """As `plan_batches`, but a microbatch holds whole groups: as many as it takes to hold `pairs_at_once` pairs.

    Every step gets as many microbatches as the fullest one needs; those that no rank fills are skipped. Only a group
    of more than `max_tokens` (its prompt and responses) is split, its prompt repeated; raises ConfigError when not
    even one pair fits.
    """
    steps = [
        (epoch, members, _bins(groups, members, pairs_at_once, max_tokens))
        for epoch, members in _all_steps(groups, epochs, target_pairs, seed)
    ]
    # The Trainer takes the same number of microbatches for every step of a training.
    rows = max(-(-len(bins) // world_size) for _, _, bins in steps)
    plan: list[Microbatch] = []
    for step, (epoch, members, bins) in enumerate(steps):
        step_pairs = sum(len(groups[member].pairs) for member in members)
        # The last microbatch is where ranks exchange gradients: what is empty comes first.
        cells = [()] * (rows * world_size - len(bins)) + bins
        for row in in_batches(cells, world_size):
            plan += [Microbatch(parts, step_pairs, step, epoch, skipped=not any(row)) for parts in row]
    return plan


def one_by_one(groups: Sequence[AnyGroup], at_once: int, seed: int) -> list[Microbatch]:
    """Every pair once, in microbatches of at most `at_once`: the plan of an evaluation."""
    num_pairs = sum(len(group.pairs) for group in groups)
    return plan_batches(groups, 1, num_pairs, -(-num_pairs // at_once), seed)


def num_tokens(group: Group, pairs: Sequence[int]) -> int:
    """Tokens of a group's prompt with the distinct responses of these of its pairs."""
    places = {place for index in pairs for place in (group.pairs[index].chosen, group.pairs[index].rejected)}
    return len(group.prompt) + sum(len(group.responses[place]) for place in places)


def _bins(
    groups: Sequence[Group], members: Sequence[int], pairs_at_once: int, max_tokens: int | None
) -> list[tuple[GroupPart, ...]]:
    """The groups of a step as microbatches, the lightest first: neighbours, which ranks run together, cost alike."""
    bins: list[list[GroupPart]] = []
    for member in members:
        for part in _split(groups[member], member, max_tokens):
            together = [*bins[-1], part] if bins else [part]
            full = bins and sum(len(held.pairs) for held in bins[-1]) >= pairs_at_once
            if not bins or full or (max_tokens is not None and _cost(groups, together) > max_tokens):
                bins.append([part])
            else:
                bins[-1].append(part)
    return sorted(map(tuple, bins), key=lambda parts: _cost(groups, parts))


def _cost(groups: Sequence[Group], parts: Sequence[GroupPart]) -> int:
    return sum(num_tokens(groups[part.group], part.pairs) for part in parts)


def _split(group: Group, index: int, max_tokens: int | None) -> Iterator[GroupPart]:
    held: list[int] = []
    for pair in range(len(group.pairs)):
        if max_tokens is not None and num_tokens(group, [pair]) > max_tokens:
            raise ConfigError(
                f"pair {group.pairs[pair].pair_id} does not fit into a microbatch", got=num_tokens(group, [pair]),
                expected=f"at most max_tokens_per_microbatch = {max_tokens}",
                fix="raise max_tokens_per_microbatch, or lower max_length and set on_overlong=drop",
            )  # fmt: skip
        if held and max_tokens is not None and num_tokens(group, [*held, pair]) > max_tokens:
            yield GroupPart(index, tuple(held))
            held = []
        held.append(pair)
    yield GroupPart(index, tuple(held))


def _all_steps(
    groups: Sequence[AnyGroup], epochs: int, target_pairs: int, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Epoch and groups of every optimizer step."""
    for epoch in range(epochs):
        order = list(range(len(groups)))
        # Each epoch by a seed of its own; a string seeds the same in every process, unlike its hash().
        random.Random(f"{seed}:{epoch}").shuffle(order)
        for members in _steps(groups, order, target_pairs):
            yield epoch, members


def _steps(groups: Sequence[AnyGroup], order: Sequence[int], target_pairs: int) -> Iterator[list[int]]:
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


def _spread(groups: Sequence[AnyGroup], members: Sequence[int], parts: int) -> Iterator[tuple[GroupPart, ...]]:
    """The pairs of a step cut into `parts` runs whose lengths differ by one at most; some may be empty."""
    flat = [(member, pair) for member in members for pair in range(len(groups[member].pairs))]
    for index in range(parts):
        cut = flat[len(flat) * index // parts : len(flat) * (index + 1) // parts]
        held = {member: tuple(pair for owner, pair in cut if owner == member) for member, _ in cut}
        yield tuple(GroupPart(member, pairs) for member, pairs in held.items())
