"""Images side by side on one picture: a row a prompt, a column a model and seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefmill.core.files import replacing
from prefmill.core.image_rows import GeneratedImage
from prefmill.store.missing import in_batches
from prefmill.store.pictures import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS_A_GRID = 6
_CELL, _GAP, _LINE = 192, 6, 16
_CHARACTERS = 28  # of the font's, in the width of a cell


def write_grids(output: Path, folder: str, rows: Sequence[GeneratedImage], sides: Sequence[str], num_seeds: int) -> int:
    """Write `folder`/000.png ... of images whose files lie below `output` as `<side>/images/...`; returns how many.

    `rows` are the first side's, sorted by prompt and seed.
    """
    pages = in_batches(in_batches(rows, num_seeds), PROMPTS_A_GRID)
    for number, page in enumerate(pages):
        target = output / folder / f"{number:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as stream:
            draw_grid(output, page, sides).save(stream, format="PNG")
    return len(pages)


def draw_grid(output: Path, prompts: Sequence[Sequence[GeneratedImage]], sides: Sequence[str]) -> Image:
    """The images of some prompts, the sides of a seed next to each other; each prompt stands above its row."""
    from PIL import Image, ImageDraw

    columns = [(row["seed"], side) for row in prompts[0] for side in sides]
    height = _CELL + _LINE + _GAP
    page = Image.new("RGB", (len(columns) * (_CELL + _GAP) + _GAP, len(prompts) * height + _LINE + _GAP), "white")
    pen = ImageDraw.Draw(page)
    for column, (seed, side) in enumerate(columns):
        pen.text((_GAP + column * (_CELL + _GAP), 2), f"{side}, seed {seed}", fill="black")
    for place, rows in enumerate(prompts):
        top = _LINE + _GAP + place * height
        pen.text((_GAP, top), _shortened(rows[0]["prompt"], len(columns) * _CHARACTERS), fill="black")
        cells = [(row, side) for row in rows for side in sides]
        for column, (row, side) in enumerate(cells):
            file = row["file"].partition("/")[2]
            page.paste(_fitted(open_image(output / side / file)), (_GAP + column * (_CELL + _GAP), top + _LINE))
    return page


def _fitted(image: Image) -> Image:
    """As large as its cell allows, in the middle of a square; small pictures keep their pixels."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    method = Resampling.NEAREST if max(image.size) <= _CELL else Resampling.LANCZOS
    return ImageOps.pad(image, (_CELL, _CELL), method, "white")


def _shortened(text: str, limit: int) -> str:
    """What the built-in font can show of `text`."""
    # Without FreeType Pillow has a bitmap font alone, which raises UnicodeEncodeError beyond Latin-1.
    plain = text.encode("latin-1", "replace").decode("latin-1")
    return plain if len(plain) <= limit else f"{plain[: limit - 3]}..."
