"""How fast every rank trains and what it holds at most: to a file a rank, and to the tracker."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

from prefmill.training import append_row

SPEED = "speed"


class Speed:
    """Counts a rank's tokens between two log lines. `tokens_per_second` is of all work, evaluation and saving too."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / SPEED / f"rank{rank}.jsonl"
        self._tokens, self._since = 0, time.monotonic()

    def add(self, tokens: int) -> None:
        """Take in a microbatch of so many tokens, padding and prompts included."""
        self._tokens += tokens

    def window(self, step: int) -> dict[str, float]:
        """`tokens_per_second` since the last call and `peak_memory_gb` since the start, written to the rank's file."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        values = {"tokens_per_second": self._tokens / seconds, "peak_memory_gb": peak_memory_gb()}
        append_row(self._path, {"step": step, **values})
        self._tokens, self._since = 0, time.monotonic()
        return values


def peak_memory_gb() -> float:
    """The most this process has held, in GB of 2^30 bytes: of its GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
