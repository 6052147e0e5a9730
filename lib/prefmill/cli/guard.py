"""What every command does about errors: explained ones are printed, bugs keep their traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable

from prefmill.core.errors import PrefmillError, explain_os_error


def guarded(command: Callable[[], int]) -> int:
    """Run `command`; returns its exit code: 2 for what the user can fix, 130 when interrupted, 141 unread."""
    _open_closed_streams()
    # A terminal of another encoding shows ? for what it lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        code = command()
        sys.stdout.flush()  # here, where a reader that has gone is no traceback
        return code
    except PrefmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `prefmill status | head`: the reader has seen enough
        # Python flushes stdout once more when it ends, which would raise this error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as the shell reports it: a run that was cut off is no success
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run again to resume", file=sys.stderr)
        return 130


def _open_closed_streams() -> None:
    """Give what a shell has closed (`>&-`) to the null device: the next file opened would get what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 (for as long as the process lives)
            os.set_inheritable(stream.fileno(), True)  # the lowest number that is free: the one that was closed
            setattr(sys, name, stream)
