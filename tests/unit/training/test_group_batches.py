"""The plan of the group layout: whole groups, every pair once, ranks in step, nothing run for nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.core.errors import ConfigError
from prefmill.training.batches import Microbatch, num_tokens, plan_batches, plan_group_batches
from prefmill.training.data import Group, Pair


def groups_of(sizes: list[int], prompt: int = 5) -> list[Group]:
    """Groups of `size` pairs over `size` + 1 responses of two tokens."""
    return [
        Group([1] * prompt, [[2, 3]] * (size + 1), [Pair(f"{g}-{p}", p, p + 1) for p in range(size)])
        for g, size in enumerate(sizes)
    ]


def batched(items: Sequence[Microbatch], size: int) -> list[Sequence[Microbatch]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def pairs_of(plan: list[Microbatch]) -> Counter[tuple[int, int, int]]:
    return Counter((item.epoch, part.group, pair) for item in plan for part in item.parts for pair in part.pairs)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    target=st.integers(1, 20),
    at_once=st.integers(1, 6),
    ranks=st.integers(1, 4),
    limit=st.sampled_from([None, 9, 12, 20]),
)
def test_every_pair_once_an_epoch_and_ranks_in_step(
    sizes: list[int], target: int, at_once: int, ranks: int, limit: int | None
) -> None:
    groups = groups_of(sizes)
    plan = plan_group_batches(groups, 2, target, at_once, ranks, limit, seed=0)
    assert pairs_of(plan) == {(e, g, p): 1 for e in range(2) for g, size in enumerate(sizes) for p in range(size)}
    num_steps = plan[-1].step + 1
    assert len(plan) % (num_steps * ranks) == 0
    for step, items in enumerate(batched(plan, len(plan) // num_steps)):
        assert {item.step for item in items} == {step}
        assert {item.step_pairs for item in items} == {sum(item.num_pairs for item in items)}
        for row in batched(items, ranks):
            assert {item.skipped for item in row} == {not any(item.parts for item in row)}
        assert not items[-1].skipped, "ranks exchange gradients at a step's last microbatch"
    for item in plan:
        tokens = sum(num_tokens(groups[part.group], part.pairs) for part in item.parts)
        assert limit is None or tokens <= limit
        full_but_for_one = sum(len(part.pairs) for part in item.parts[:-1])
        assert full_but_for_one < at_once


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), target=st.integers(1, 20))
def test_steps_hold_the_pairs_that_they_hold_pairwise(sizes: list[int], target: int) -> None:
    groups = groups_of(sizes)

    def steps(plan: list[Microbatch]) -> set[tuple[int, int, int]]:
        return {(item.step, part.group, pair) for item in plan for part in item.parts for pair in part.pairs}

    assert steps(plan_group_batches(groups, 2, target, 1, 1, None, 3)) == steps(plan_batches(groups, 2, target, 4, 3))


def test_groups_stay_whole_without_a_limit() -> None:
    plan = plan_group_batches(groups_of([3, 7, 1, 5, 2]), 1, 8, 1, 1, None, seed=0)
    assert all(len(item.parts) <= 1 for item in plan)
    assert sorted(item.num_pairs for item in plan if item.parts) == [1, 2, 3, 5, 7]


def test_a_pair_that_fits_nowhere_is_an_error() -> None:
    with pytest.raises(ConfigError, match="raise max_tokens_per_microbatch"):
        plan_group_batches(groups_of([2]), 1, 8, 1, 1, 8, seed=0)
