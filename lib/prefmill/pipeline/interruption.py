"""Ending a command on this machine: SIGTERM and a closed terminal are taken for Ctrl-C; processes get time to save."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType

from prefmill.core.terminal import print_nowhere
from prefmill.distributed.limits import limit_threads


def start_fork_server() -> None:
    """Start it where it does not run, deaf to Ctrl-C and hangups until `in_fork_server` has said what it does then.

    Python answers with a traceback of its own start.
    """
    limit_threads()
    resource_tracker.ensure_running()  # before the signal is blocked: it has it unblocked when it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
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
    """Have SIGTERM, a closed terminal and a reader that has gone interrupt this process as Ctrl-C does.

    `nohup` has it go on without its terminal. Elsewhere than in the main thread signals do what they did.
    """
    # signal.signal raises ValueError in any other thread.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _hang_up)
    try:
        yield
    except BrokenPipeError:  # of `prefmill run | tee log`, or `2>&1 | tee log`
        gone = os.fstat(1)
        for descriptor in (1, 2):
            if os.path.samestat(gone, os.fstat(descriptor)):
                print_nowhere(descriptor)
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if signal.getsignal(signal.SIGHUP) is _hang_up:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _hang_up(number: int, frame: FrameType | None) -> None:
    # The kernel and the shell each send it: the second would be taken for a second Ctrl-C, which ends all at once.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for descriptor in (1, 2):
        # A terminal that is gone is no terminal any more, but still a device; a log file goes on.
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            print_nowhere(descriptor)
    raise KeyboardInterrupt
