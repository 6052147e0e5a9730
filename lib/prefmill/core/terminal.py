"""Colours, where a terminal shows them and nobody has asked for none (https://no-color.org)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

Say = Callable[[str], None]  # shows a line
_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}
STATES = {
    "complete": "green", "running": "bold", "failed": "red", "killed": "red", "stopped": "red", "stale": "yellow",
    "damaged": "red", "blocked": "yellow", "suspended": "yellow", "interrupted": "yellow", "incomplete": "yellow",
}  # fmt: skip


def print_nowhere(descriptor: int) -> None:
    """Have what is printed there lost from now on: whoever read it has gone, and each line would be an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def say_on(line: str) -> None:
    """Print a line of a command that acts: a reader that has gone (`| head`) leaves nothing half done."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        print_nowhere(sys.stdout.fileno())


def has_colours() -> bool:
    """Whether what is printed may hold colour codes."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str | None) -> str:
    """`text` in a colour of this module, or as it is."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if colour and has_colours() else text


def paint_states(line: str) -> str:
    """A row of a table, each state's first mention in its colour; widths were measured before."""
    words = [word for word in STATES if f" {word} " in f" {line} "]
    for word in words:
        line = line.replace(word, paint(word, STATES[word]), 1)
    return line
