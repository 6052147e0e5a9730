"""Random weights that follow from a seed and leave the caller's random state alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block torch's CPU generator starts from `seed`; afterwards it goes on where it was."""
    import torch

    # Without the empty list torch would keep the state of every GPU's generator, and start CUDA to do so.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
