"""How far running tasks are: a bar for each on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefmill.core.terminal import Say
from prefmill.pipeline.attempts import read_progress

HEARTBEAT_SECONDS = 60.0


class Bar:
    """The progress of one task; a log file gets a heartbeat line in place of the bar."""

    def __init__(self, key: str, logs: Path, say: Say) -> None:
        self._key, self._logs, self._say = key, logs, say
        # tqdm draws on stderr; in a file every redraw would be a line of its own.
        self._is_terminal = sys.stderr.isatty()
        self._bar: Any = tqdm(desc=key, leave=False, disable=not self._is_terminal)
        self._started = self._told = time.monotonic()

    def show(self) -> None:
        """Look at the task's progress file."""
        now = time.monotonic()
        if not self._is_terminal and now - self._told < HEARTBEAT_SECONDS:
            return
        record = read_progress(self._logs)
        if self._is_terminal and record:
            self._bar.total, self._bar.unit, self._bar.n = record["total"], f" {record['unit']}", record["done"]
            self._bar.refresh()
        elif not self._is_terminal:
            self._told = now
            self._say(f". {self._key} running for {(now - self._started) / 60:.0f} min{_progress(record)}")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def _progress(record: dict[str, Any]) -> str:
    if not record:
        return ""
    return f", {record['done']}{'/' + str(record['total']) if record['total'] else ''} {record['unit']}"
