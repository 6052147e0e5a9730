"""What ranks tell each other of their pairs and their speed."""

from __future__ import annotations

import os
from typing import TypeVar

import torch.distributed as dist

ValueT = TypeVar("ValueT")


def from_all_ranks(value: ValueT) -> list[ValueT]:
    """Every rank's value, in the order of the ranks; all of them must ask."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[ValueT | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return [found for found in values if found is not None]


def world_size() -> int:
    """Ranks that train together, as the launcher says; known before any process group is there."""
    return int(os.environ.get("WORLD_SIZE", "1"))
