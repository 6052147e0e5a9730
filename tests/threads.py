"""Whether several threads of a CPU compute the same bits every time: decision 0195 says where torch's do not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def same_bits(gradient: Callable[[], Tensor], threads: int = 4, times: int = 8) -> bool:
    """Whether `gradient` returns the same tensor each time with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *others = [gradient().detach().clone() for _ in range(times)]
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(first, other) for other in others)
