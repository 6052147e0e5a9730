"""Ending a command on this machine: SIGTERM is taken for Ctrl-C, and processes get a while to save."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess

from prefmill.distributed.limits import limit_threads


def start_fork_server() -> None:
    """Start it where it does not run, deaf to Ctrl-C until `in_fork_server` has said what it does then.

    Python answers with a traceback of its own start.
    """
    limit_threads()
    resource_tracker.ensure_running()  # before the signal is blocked: it has it unblocked when it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for_all(processes: Iterable[BaseProcess], seconds: float) -> None:
    """Wait until every process has ended, or the time is over."""
    # One deadline for all of them: a wait for each would add up.
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def interrupted_by_term() -> Iterator[None]:
    """Have SIGTERM interrupt this process as Ctrl-C does; elsewhere than in the main thread nothing changes."""
    # signal.signal raises ValueError in any other thread.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
