"""Numbers as people read them, on the console and in every report: a true minus, an interval in parentheses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def figure(value: float | None, form: str = ".2f") -> str:
    """A number in a format such as `+.2f` or `.0%`; a dash for None. A zero after rounding has no sign."""
    if value is None:
        return "–"
    text = format(value, form)
    # -0.00 would claim a direction that rounding has taken away.
    return text.replace("-", "−") if text.strip("+-0.%") else text.lstrip("+-")


def bounds(found: Mapping[str, Any], form: str | Callable[[float], str] = ".2f") -> str:
    """`low to high`, of numbers under these names; `form` is a format or writes a number."""
    return " to ".join(form(found[end]) if callable(form) else figure(found[end], form) for end in ("low", "high"))


def with_interval(found: Mapping[str, Any] | None, form: str = ".2f") -> str:
    """`value (low to high)`; the value alone where there is no interval, as of one paper; a dash for None."""
    if found is None:
        return "–"
    value = figure(found["value"], form)
    return value if found["low"] is None else f"{value} ({bounds(found, form)})"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, its columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """Seconds as `0.4 s`, `95 s`, `12 min` or `2.1 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
