"""A page and a figure for a generated paper, so that the image modalities can be tried without any PDF."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from prefmill.reviews.rows import PaperRow

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE_SIZE, FIGURE_SIZE = (224, 280), (112, 84)  # multiples of 28, the side of a Qwen2-VL token
_MARGIN, _LINE_HEIGHT, _CHARS_A_LINE = 12, 14, 32
_GAIN = re.compile(r"by (\d+) points|gains (\d+) points")


def draw_page(paper: PaperRow) -> Image:
    """The paper on one page: title, abstract and text."""
    from PIL import Image, ImageDraw

    page = Image.new("RGB", PAGE_SIZE, "white")
    draw = ImageDraw.Draw(page)
    lines = [*textwrap.wrap(paper.title, _CHARS_A_LINE), ""]
    lines += [*textwrap.wrap(paper.abstract, _CHARS_A_LINE), "", *textwrap.wrap(paper.text, _CHARS_A_LINE)]
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + number * _LINE_HEIGHT), line, fill="black")
    return page


def draw_figure(paper: PaperRow) -> Image:
    """Two bars, the baseline's and the method's, apart by the gain that the abstract reports."""
    from PIL import Image, ImageDraw

    figure = Image.new("RGB", FIGURE_SIZE, "white")
    draw = ImageDraw.Draw(figure)
    match = _GAIN.search(paper.abstract)
    # The two abstracts of the phrase bank word the gain differently, a group each.
    gain = int(match[1] or match[2]) if match else 0
    width, height = FIGURE_SIZE
    for left, bar, colour in ((20, 30, "gray"), (66, 30 + 5 * gain, "steelblue")):
        draw.rectangle((left, height - _MARGIN - bar, left + 26, height - _MARGIN), fill=colour)
    draw.line((8, height - _MARGIN, width - 8, height - _MARGIN), fill="black")
    return figure
