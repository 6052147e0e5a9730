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
