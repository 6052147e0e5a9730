"""The review report as Markdown, for an issue or a chat: the verdict, the measures, the items, the doubts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def to_markdown(title: str, facts: Sequence[str], modalities: Sequence[Row]) -> str:
    """The page's numbers without its charts and examples; `modalities` are those of the page."""
    parts = [f"# {_plain(title)}", *([_plain(" · ".join(facts))] if facts else [])]
    for part in modalities:
        parts += _modality(part, named=len(modalities) > 1)
    return "\n\n".join(parts) + "\n"


def _modality(part: Row, named: bool) -> Iterable[str]:
    story, models = part["story"], [item["model"] for item in part["compared"]["models"]]
    if named:
        yield f"## {_plain(part['compared']['modality'])}"
    yield f"**{_plain(story.helped)}**"
    yield f"{_plain(story.how_much)} {_plain(story.how_sure)}"
    if story.harms:
        yield f"Worse: {_plain('; '.join(story.harms))}."
    measures = [[row["measure"].label, *map(_cell, row["cells"])] for row in part["measures"]]
    yield _table(["Measure", *models], measures)
    items = [
        [row["name"], *(f"{share:.0%}" for _, share in row["shares"]), row["change_text"]] for row in part["items"]
    ]
    if items:
        yield _table(["Item, share of yes", *(label for label, _ in part["items"][0]["shares"]), "Change"], items)
    yield "What to doubt:\n\n" + "\n".join(f"- {_plain(doubt)}" for doubt in story.doubts)


def _cell(cell: Row | None) -> str:
    if not cell:
        return "–"
    return f"{cell['value']} ({cell['interval']})" if cell.get("interval") else str(cell["value"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: other people's words may hold its signs, or HTML."""
    # Words are joined by single spaces, as a line break would end the row of a table.
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
