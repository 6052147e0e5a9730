"""Ending a training early: whoever wants it leaves a request in the task's logs; the ranks agree, save and stop."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from prefmill.core.files import read_record, write_record

STOP = "stop.json"
_SHARE_TO_SAVE = 1 / 3  # of the time given, kept for writing the checkpoint


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Training has saved and stopped because it was asked to; the task is not finished."""


@dataclass(frozen=True)
class StopRequest:
    """When a stop was asked for and when it must be over, in seconds since the epoch."""

    asked: float
    deadline: float


def request_stop(logs: Path, seconds: float) -> None:
    """Ask the training with these logs to save and stop within `seconds`."""
    write_record(logs / STOP, asdict(StopRequest(time.time(), time.time() + seconds)))


def clear_request(logs: Path) -> None:
    """Withdraw what was asked of an earlier attempt."""
    (logs / STOP).unlink(missing_ok=True)


class StopWatch:
    """Decides at which step to stop: where a loss is logged if time allows, so that the curve stays the same."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._last_step = time.time()
        self._step_seconds = 0.0

    def due(self, step: int, logging_steps: int) -> bool:
        """Whether to stop after `step`; call it once after every step."""
        now = time.time()
        self._step_seconds, self._last_step = now - self._last_step, now
        request = self._request()
        if request is None:
            return False
        # A logged loss is the mean since the one before: a stop in between gives a curve no undisturbed run has.
        until_logged = -step % logging_steps
        to_save = _SHARE_TO_SAVE * (request.deadline - request.asked)
        return until_logged == 0 or now + (until_logged + 1) * self._step_seconds > request.deadline - to_save

    def _request(self) -> StopRequest | None:
        given = read_record(self._logs / STOP)
        return StopRequest(**given) if given else None
