"""The batch plan takes every pair once an epoch, whole groups a step, and is the same whenever it is made."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from prefmill.training.batches import plan_batches
from prefmill.training.data import Group, Pair


def groups_of(sizes: list[int]) -> list[Group]:
    return [Group([1], [[2], [3]], [Pair(f"{g}-{p}", 0, 1) for p in range(size)]) for g, size in enumerate(sizes)]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    target=st.integers(1, 20),
    parts=st.integers(1, 8),
    epochs=st.integers(1, 3),
)
def test_every_pair_once_an_epoch_in_whole_groups(sizes: list[int], target: int, parts: int, epochs: int) -> None:
    groups = groups_of(sizes)
    plan = plan_batches(groups, epochs, target, parts, seed=0)
    assert len(plan) % parts == 0
    seen = Counter((item.epoch, part.group, pair) for item in plan for part in item.parts for pair in part.pairs)
    assert set(seen.values()) == {1}
    assert len(seen) == epochs * sum(sizes)
    for start in range(0, len(plan), parts):
        step = plan[start : start + parts]
        held = Counter(part.group for item in step for part in item.parts for _ in part.pairs)
        assert all(len(groups[group].pairs) == count for group, count in held.items())
        assert {item.step_pairs for item in step} == {sum(held.values())}
        assert {item.step for item in step} == {start // parts}
        counts = [item.num_pairs for item in step]
        assert max(counts) - min(counts) <= 1
        assert len(held) == 1 or sum(held.values()) <= 1.5 * target + 9


def test_steps_come_near_the_target() -> None:
    plan = plan_batches(groups_of([3] * 100), 1, 16, 1, seed=0)
    assert {item.step_pairs for item in plan[:-1]} == {15}


def test_epochs_differ_and_seeds_repeat() -> None:
    groups = groups_of([1] * 30)
    plan = plan_batches(groups, 2, 5, 1, seed=1)
    assert plan == plan_batches(groups, 2, 5, 1, seed=1)
    orders = [[part.group for item in plan if item.epoch == epoch for part in item.parts] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
