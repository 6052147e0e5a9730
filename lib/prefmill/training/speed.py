"""How fast every rank trains and how much memory it takes at most: to a file a rank, and to the tracker."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

from prefmill.core.files import append_row
from prefmill.distributed.collectives import from_all_ranks
from prefmill.distributed.devices import has_gpu

SPEED = "speed"


class Speed:
    """Counts a rank's tokens, or images, between two log lines; a second of them is of all work, evaluation too."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / SPEED / f"rank{rank}.jsonl"
        self._count, self._unit, self._since = 0, "tokens", time.monotonic()

    def add(self, count: int, unit: str = "tokens") -> None:
        """Take in a microbatch of so many tokens, padding and prompts included, or of so many images."""
        self._count, self._unit = self._count + count, unit

    def window(self, step: int) -> dict[str, float]:
        """`tokens_per_second`, or `images_per_second`, since the last call; `peak_memory_gb` since the start; filed.

        Returns them for the tracker: the sum and the highest over ranks, and each rank's as `rank0/...` where there are
        several. Every rank must call.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = f"{self._unit}_per_second"
        own = {rate: self._count / seconds, "peak_memory_gb": peak_memory_gb()}
        append_row(self._path, {"step": step, **own})
        self._count, self._since = 0, time.monotonic()
        ranks = from_all_ranks(own)
        each = {f"rank{n}/{name}": value for n, values in enumerate(ranks) for name, value in values.items()}
        return {
            rate: sum(values[rate] for values in ranks),
            "peak_memory_gb": max(values["peak_memory_gb"] for values in ranks),
            **(each if len(ranks) > 1 else {}),
        }


def peak_memory_gb() -> float:
    """The most this process has held, in GB of 2^30 bytes: of its GPU, or of the host where there is none."""
    if has_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts it in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
