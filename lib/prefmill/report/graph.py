"""The stages behind a checkpoint as a small layered graph, inline SVG like the charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from prefmill.report.charts import WIDTH, element, svg, text

BOX_HEIGHT, LEVEL_HEIGHT, BOX_WIDTH, SIDE = 44.0, 84.0, 150.0, 22.0
Place = tuple[float, float, float]  # centre, top, width


def lineage_graph(levels: Sequence[Sequence[Mapping[str, Any]]], edges: Sequence[tuple[str, str]]) -> Markup | None:
    """Boxes by level, raw input at the top, with an arrow from each stage to those that read its output."""
    if not levels:
        return None
    places = {box["stage"]: place for index, level in enumerate(levels) for box, place in _row(level, index)}
    arrows = [_arrow(places[maker], places[reader], maker, reader) for maker, reader in edges if maker != reader]
    boxes = [_box(box, places[box["stage"]]) for level in levels for box in level]
    height = LEVEL_HEIGHT * len(levels) - (LEVEL_HEIGHT - BOX_HEIGHT) + 4
    return svg("Which stage read the output of which", WIDTH, height, [*arrows, *boxes], "chart graph")


def _row(level: Sequence[Mapping[str, Any]], index: int) -> list[tuple[Mapping[str, Any], Place]]:
    """The boxes of a level side by side, alternating about the middle so that long arrows have room to pass."""
    room = (WIDTH - 2 * SIDE) / len(level)
    width = min(BOX_WIDTH, room - 12)
    top = 2 + LEVEL_HEIGHT * index
    return [(box, (SIDE + room * (place + 0.5), top, width)) for place, box in enumerate(level)]


def _box(box: Mapping[str, Any], place: Place) -> Markup:
    centre, top, width = place
    count = f"{box['tasks']} tasks" if box["tasks"] > 1 else box["digest"]
    return element(
        "g",
        element("rect", x=centre - width / 2, y=top, width=width, height=BOX_HEIGHT, rx=7, class_="box"),
        text(box["stage"], centre, top + 19, "box-name", "middle"),
        text(count, centre, top + 34, "box-note", "middle"),
    )


def _arrow(start: Place, end: Place, maker: str, reader: str) -> Markup:
    """A curve from the bottom of one box to the top of the other; over several levels it swings out to the side."""
    span = round((end[1] - start[1]) / LEVEL_HEIGHT)
    lean = (end[0] - start[0]) / WIDTH
    x1, y1 = start[0] + start[2] * 0.3 * max(-1.0, min(1.0, lean * 3)), start[1] + BOX_HEIGHT
    x2, y2 = end[0] - end[2] * 0.3 * max(-1.0, min(1.0, lean * 3)), end[1] - 5
    bend = LEVEL_HEIGHT * 0.3
    if span > 1:
        # The side follows from the names, so that the same graph is the same bytes.
        side = 1 if (len(maker) + len(reader)) % 2 else -1
        x1, x2 = start[0] + side * start[2] * 0.4, end[0] + side * end[2] * 0.4
        out = WIDTH / 2 + side * (WIDTH / 2 - 8 - 4 * (span % 4))
        path = f"M{x1:.1f} {y1:.1f} C{x1:.1f} {y1 + bend:.1f} {out:.1f} {y1:.1f} {out:.1f} {y1 + bend * 2:.1f} L{out:.1f} {y2 - bend * 2:.1f} C{out:.1f} {y2:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"  # noqa: E501
    else:
        path = f"M{x1:.1f} {y1:.1f} C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
    head = f"{x2 - 4:.1f},{y2 - 2:.1f} {x2 + 4:.1f},{y2 - 2:.1f} {x2:.1f},{y2 + 5:.1f}"
    return element(
        "g",
        element("title", escape(f"{reader} reads what {maker} made")),
        element("path", d=path, class_="arrow"),
        element("polygon", points=head, class_="arrow-head"),
    )
