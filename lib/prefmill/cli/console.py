"""What a run prints: as much as was asked for, in colours where a terminal shows them."""

from __future__ import annotations

import argparse
from pathlib import Path

from prefmill.core.terminal import paint

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
