"""Who runs which trial: a claim a trial, and a heart that beats while its worker lives."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prefmill.core.files import read_record, write_atomic

CLAIM, HEARTBEAT = "claim.json", "heartbeat"


@dataclass(frozen=True)
class Claim:
    """The worker that runs a trial, and all who did, in order; the last is `worker` itself."""

    worker: str
    attempts: tuple[str, ...]


def read_claim(trial: Path) -> Claim | None:
    """The claim on the trial in this folder; None where its worker died before it wrote one."""
    given = read_record(trial / CLAIM)
    return Claim(given["worker"], tuple(given["attempts"])) if given else None


def claim(trial: Path, worker: str) -> Claim:
    """Put `worker` in charge of the trial; call it with the study's lock held.

    A claim is a sign of life itself: the next to look must not take for dead who has not come to its first beat.
    """
    before = read_claim(trial)
    mine = Claim(worker, (*(before.attempts if before else ()), worker))
    _beat(trial)
    write_atomic(trial / CLAIM, json.dumps(asdict(mine)))
    return mine


@contextlib.contextmanager
def beating(trial: Path, seconds: float) -> Iterator[None]:
    """Give a sign of life now and every few `seconds` until the block ends or this process does."""
    stopped = threading.Event()

    def beat() -> None:
        while True:
            _beat(trial)
            if stopped.wait(seconds):
                return

    # A daemon ends with its process, whatever ends that: a heart must not outlive its worker.
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _beat(trial: Path) -> None:
    # Any text that is new each time would do: nobody compares it with a clock of their own.
    write_atomic(trial / HEARTBEAT, str(time.time_ns()))


@dataclass
class Watch:
    """Notes when a trial's heart was last heard, by this process's own clock: clocks of machines may differ."""

    stale_seconds: float
    _heard: dict[Path, tuple[str, float]] = field(default_factory=dict)

    def is_stale(self, trial: Path) -> bool:
        """Whether nothing has been heard for `stale_seconds`; at the first look never."""
        try:
            beat = (trial / HEARTBEAT).read_text()
        except FileNotFoundError:
            beat = ""
        # A clock that is set forward would make all workers look dead.
        now = time.monotonic()
        known = self._heard.get(trial)
        if known is None or known[0] != beat:
            self._heard[trial] = (beat, now)
            return False
        return now - known[1] > self.stale_seconds
