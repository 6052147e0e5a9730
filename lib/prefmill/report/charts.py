"""Small charts as inline SVG: pure functions from numbers to markup, with every text escaped.

Colours and sizes come from the page's style sheet by class: `s-<model>` for a series, so that dark mode and a change
of palette need no new chart. Every series also has a marker of its own: colour alone tells nothing apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from prefmill.core.figures import with_interval

WIDTH = 360.0  # in the units of the SVG; the page shows it between 0.8 and 1.2 times this size in pixels
Scale = Callable[[float], float]
MAX_LABEL = 24  # characters that leave room for the numbers beside them
SERIES = ("human", "base", "sft", "dpo")  # the labels with a look of their own
MARKERS = ("diamond", "square", "triangle", "circle")
OTHER_LOOKS = 3  # s-other0 ...: further labels share these in turn


@dataclass(frozen=True)
class ChartInterval:
    """A value with its interval, drawn in the look of `series`."""

    label: str
    series: str
    value: float
    low: float
    high: float
    text: str

    @classmethod
    def of(cls, label: str, series: str, found: Mapping[str, Any], form: str = ".2f") -> ChartInterval:
        """A value without an interval, as of one paper, is drawn as a point."""
        low, high = (found["value"] if found[end] is None else found[end] for end in ("low", "high"))
        return cls(label, series, found["value"], low, high, with_interval(found, form))


@dataclass(frozen=True)
class Line:
    """A curve through (x, y) points."""

    label: str
    series: str
    points: Sequence[tuple[float, float]]


def series_class(label: str) -> str:
    """The style-sheet class of a model's label; always a plain word, whatever the label holds."""
    if label in SERIES:
        return f"s-{label}"
    # Not hash(): Python salts it in every process, and the page would come out differently.
    return f"s-other{sum(label.encode()) % OTHER_LOOKS}"


def marker(label: str, x: float, y: float, size: float = 5.0) -> Markup:
    """The marker of a model's label at (x, y)."""
    shape = MARKERS[SERIES.index(label)] if label in SERIES else "ring"
    if shape == "circle":
        return element("circle", cx=x, cy=y, r=size, class_="mark")
    if shape == "ring":
        return element("circle", cx=x, cy=y, r=size - 0.5, class_="mark hollow")
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "triangle": [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
    }[shape]
    return element(
        "polygon", points=" ".join(f"{_n(x + dx * size)},{_n(y + dy * size)}" for dx, dy in corners), class_="mark"
    )


def key_marker(label: str) -> Markup:
    """A marker by itself, for legends and headings."""
    look = f"key {series_class(label)}"
    return element("svg", marker(label, 7, 7, 4.6), class_=look, viewBox="0 0 14 14", aria_hidden="true")


def interval_chart(rows: Sequence[ChartInterval], title: str, axis: str, level: float | None = None) -> Markup:
    """Values with intervals, one below the other; `level` is a dashed line, of no difference or of people."""
    levels = [] if level is None else [level]
    bounds = [bound for row in rows for bound in (row.low, row.high)] + levels
    ticks = nice_ticks(min(bounds), max(bounds), 5)
    left, right, top, step = 8.0, WIDTH - 8, 6.0, 46.0
    bottom = top + step * len(rows)
    x = _linear(ticks[0], ticks[-1], left, right)
    parts = [_vertical_grid(ticks, x, top, bottom)]
    parts += [element("line", x1=x(at), x2=x(at), y1=top, y2=bottom, class_="zero") for at in levels]
    for index, row in enumerate(rows):
        parts.append(_interval_row(row, x, top + step * index))
    parts.append(text(axis, (left + right) / 2, bottom + 36, "axis-name", "middle"))
    return svg(title, WIDTH, bottom + 42, parts)


def line_chart(lines: Sequence[Line], title: str, x_axis: str, y_axis: str, reference: float | None = None) -> Markup:
    """Curves over a common axis; `reference` draws a dashed level, such as the loss of no preference."""
    levels = [] if reference is None else [reference]
    points = [point for line in lines for point in line.points]
    plane = _Plane([x for x, _ in points], [y for _, y in points] + levels, bottom=216.0)
    dashed = [plane.level(level, "zero") for level in levels]
    return plane.chart(title, x_axis, y_axis, [*dashed, *(_curve(line, plane.x, plane.y) for line in lines)])


def scatter_chart(groups: Sequence[Line], title: str, x_axis: str, y_axis: str) -> Markup:
    """Clouds of points, one look a group."""
    points = [point for group in groups for point in group.points]
    plane = _Plane([x for x, _ in points], [y for _, y in points], bottom=246.0)
    clouds = []
    for group in groups:
        marks = [marker(group.label, plane.x(a), plane.y(b), 3.2) for a, b in group.points]
        clouds.append(element("g", *marks, class_=f"cloud {series_class(group.series)}"))
    return plane.chart(title, x_axis, y_axis, clouds)


def share_strip(shares: Sequence[tuple[str, float]], title: str) -> Markup:
    """Shares from 0 to 1 of several models on one line, joined from the first to the last."""
    x = _linear(0, 1, 10, 230)
    parts = [element("line", x1=x(0), x2=x(1), y1=11, y2=11, class_="grid")]
    parts += [element("line", x1=x(tick), x2=x(tick), y1=7, y2=15, class_="grid") for tick in (0, 0.25, 0.5, 0.75, 1)]
    trained = [share for label, share in shares if label != "human"]
    if len(trained) > 1:
        parts.append(element("line", x1=x(trained[0]), x2=x(trained[-1]), y1=11, y2=11, class_="travel"))
    parts += [element("g", marker(label, x(share), 11, 4.6), class_=series_class(label)) for label, share in shares]
    return svg(title, 240, 22, parts, "strip")


def histogram(counts: Sequence[tuple[float, float, int]], series: str, title: str, x_axis: str) -> Markup:
    """Bars of (low, high, count)."""
    highest, bottom = max(count for *_, count in counts), 186.0
    plane = _Plane([counts[0][0], counts[-1][1]], [0, highest], bottom, num_y_ticks=4)
    x, y = plane.x, plane.y
    bars = [
        element("rect", x=x(low) + 0.7, width=max(0.6, x(high) - x(low) - 1.4), y=y(count), height=bottom - y(count))
        for low, high, count in counts
    ]
    return plane.chart(title, x_axis, "count", [element("g", *bars, class_=f"bars {series_class(series)}")])


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose [low, high]; steps of 1, 2 or 5 times a power of ten."""
    # Equal values would make a step of 0, which has no logarithm.
    if high <= low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    # The slack is for rounding: 0.1 * 3 is a little above 0.3, which is no reason for a larger step.
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Each tick from its own number: added up, the steps would add up their rounding.
    return [index * step for index in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]], limit: int = 300) -> list[tuple[float, float]]:
    """At most about `limit` points, each the mean of its neighbours, so that a long curve stays a small file."""
    size = math.ceil(len(points) / limit)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def tick_label(value: float) -> str:
    """A tick's number without digits it does not need."""
    if abs(value) < 1e-12:
        return "0"
    text = f"{value:.6g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.0e}"
    return text.replace("-", "−")


def _interval_row(row: ChartInterval, x: Scale, top: float) -> Markup:
    y = top + 33
    return element(
        "g",
        text(_shortened(row.label), 14, top + 17, "row-label"),  # clear of the lines at the plot's edges
        text(row.text, WIDTH - 14, top + 17, "row-value", "end"),
        element("line", x1=x(row.low), x2=x(row.high), y1=y, y2=y, class_="whisker"),
        marker(row.series, x(row.value), y),
        class_=series_class(row.series),
    )


def _shortened(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def _curve(line: Line, x: Scale, y: Scale) -> Markup:
    points = thin(line.points)
    path = " ".join(f"{_n(x(a))},{_n(y(b))}" for a, b in points)
    marks = [marker(line.series, x(a), y(b), 3.0) for a, b in points] if len(points) <= 12 else []
    last = marker(line.series, x(points[-1][0]), y(points[-1][1]), 4.2)
    curve = element("polyline", points=path, class_="curve")
    return element("g", element("title", escape(line.label)), curve, *marks, last, class_=series_class(line.series))


def _vertical_grid(ticks: Sequence[float], x: Scale, top: float, bottom: float) -> Markup:
    lines = [element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_="grid") for tick in ticks]
    return Markup("").join([*lines, _x_labels(ticks, x, bottom)])


class _Plane:
    """The plane of a chart: round ticks that enclose the numbers of both axes, and `x` and `y` that place a number."""

    left, right, top = 46.0, WIDTH - 10, 24.0

    def __init__(self, xs: Sequence[float], ys: Sequence[float], bottom: float, num_y_ticks: int = 5) -> None:
        self.x_ticks, self.y_ticks = nice_ticks(min(xs), max(xs), 5), nice_ticks(min(ys), max(ys), num_y_ticks)
        self.x = _linear(self.x_ticks[0], self.x_ticks[-1], self.left, self.right)
        self.y, self.bottom = _linear(self.y_ticks[0], self.y_ticks[-1], bottom, self.top), bottom

    def level(self, value: float, css_class: str) -> Markup:
        """A line across the plane."""
        return element("line", x1=self.left, x2=self.right, y1=self.y(value), y2=self.y(value), class_=css_class)

    def chart(self, title: str, x_axis: str, y_axis: str, marks: Sequence[Markup]) -> Markup:
        """The chart with `marks` over its grid, and the names of its axes."""
        grid = [self.level(tick, "grid") for tick in self.y_ticks]
        grid += [text(tick_label(tick), self.left - 6, self.y(tick) + 4, "tick", "end") for tick in self.y_ticks]
        below = text(x_axis, (self.left + self.right) / 2, self.bottom + 34, "axis-name", "middle")
        parts = [*grid, _x_labels(self.x_ticks, self.x, self.bottom), *marks, text(y_axis, 4, 12, "axis-name"), below]
        return svg(title, WIDTH, self.bottom + 40, parts)


def _x_labels(ticks: Sequence[float], x: Scale, bottom: float) -> Markup:
    # The outer labels stay inside the axis: in the middle of their ticks the chart's edge could cut them.
    anchors = ["start", *["middle"] * (len(ticks) - 2), "end"]
    labels = zip(ticks, anchors, strict=True)
    return Markup("").join(text(tick_label(tick), x(tick), bottom + 16, "tick", anchor) for tick, anchor in labels)


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def svg(title: str, width: float, height: float, parts: Sequence[Markup], css_class: str = "chart") -> Markup:
    """A picture of these parts."""
    box, named = f"0 0 {_n(width)} {_n(height)}", element("title", escape(title))
    # role and aria-label: a screen reader then names the picture in place of reading out its ticks.
    return element("svg", named, *parts, class_=css_class, viewBox=box, role="img", aria_label=title)


def text(content: str, x: float, y: float, css_class: str, anchor: str = "start") -> Markup:
    """A line of text that starts, ends or is centred at (x, y), as `anchor` says."""
    return element("text", escape(content), x=x, y=y, class_=css_class, text_anchor=anchor)


def element(name: str, *children: Markup, **attributes: str | float) -> Markup:
    """An element; attribute names lose a trailing `_` and have `-` for `_`, numbers two decimals."""
    written = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value if isinstance(value, str) else _n(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(written), Markup("").join(children))


def _n(value: float) -> str:
    """A coordinate with at most two decimals: small files, and no rounding noise in the content."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
