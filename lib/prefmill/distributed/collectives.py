"""What ranks tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from prefmill.distributed.devices import rank

ValueT = TypeVar("ValueT")


def from_all_ranks(value: ValueT) -> list[ValueT]:
    """Every rank's value, in the order of the ranks; all of them must ask."""
    if num_ranks() == 1:
        return [value]
    values: list[ValueT | None] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return [found for found in values if found is not None]


def wait_for_all() -> None:
    """Have every rank come here before any goes on: early, it would read what another one has not written yet."""
    if dist.is_initialized():
        dist.barrier()


def num_ranks() -> int:
    """Ranks in the process group there is; 1 for a process alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_zero_says(make: Callable[[], ValueT]) -> ValueT:
    """What rank 0 makes, on every rank, as each might see another state of the disk; all of them must ask."""
    if num_ranks() == 1:
        return make()
    said = [make() if rank() == 0 else None]
    dist.broadcast_object_list(said)
    return said[0]  # type: ignore[return-value]
