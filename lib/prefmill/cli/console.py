"""A command at its terminal: what a run prints, and how errors and signals end it."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from prefmill.core.errors import PrefmillError, explained
from prefmill.core.terminal import paint, print_nowhere

_COLOURS = {"+": "green", "x": "red", ">": "bold", "=": "dim", ".": "dim", "-": "yellow", "!": "yellow"}
_ROUTINE = "+>=."  # first signs of lines that a quiet run leaves out


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """The options -q and -v, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="print failures, warnings and results alone")
    group.add_argument("-v", "--verbose", action="store_true", help="name the log of every task that starts")


class Console:
    """Prints the lines of `run_plan`, whose first sign says what they are about."""

    def __init__(self, arguments: argparse.Namespace, logs: Path) -> None:
        self._quiet, self._verbose, self._logs = arguments.quiet, arguments.verbose, logs

    def __call__(self, line: str) -> None:
        sign = line[:1].strip() if line[1:2] == " " else ""
        if self._quiet and (sign in _ROUTINE if sign else line.startswith("  ")):
            return
        first, *rest = line.split("\n")
        # Flushed: Python keeps back what goes to a pipe or a file, and a run would show nothing for minutes.
        print("\n".join([paint(first, _COLOURS.get(sign)), *rest]), flush=True)
        if self._verbose and sign == ">":
            stage, _, task = line.split()[1].partition(":")
            print(f"  log: {self._logs / stage / task}.log", flush=True)


def guarded(command: Callable[[], int]) -> int:
    """Run `command`; returns its exit code: 2 for what the user can fix, 130 when interrupted, 141 unread."""
    _open_closed_streams()
    # A terminal of another encoding shows ? for what it lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with explained():
            code = command()
            sys.stdout.flush()  # here, where a reader that has gone is no traceback
        return code
    except PrefmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `prefmill status | head`: the reader has seen enough
        # Python flushes stdout once more when it ends, which would raise this error again.
        print_nowhere(sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as the shell reports it: a run that was cut off is no success
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
