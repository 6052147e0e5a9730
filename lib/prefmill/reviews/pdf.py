"""Text, page images and embedded figures of a PDF, by PDFium."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from prefmill.core.config import StrictConfig
from prefmill.reviews.rows import RowError, clean_text

if TYPE_CHECKING:
    from PIL.Image import Image

_HYPHEN_AT_LINE_END = re.compile("[\x02\ufffe]\r?\n?")  # how PDFium marks a word that was broken
_WHOLE_PAGE = 0.8  # an image over more of the page than this is a scan of it, not a figure
_FIX = "replace the file (`qpdf --check` tells what is wrong), or remove the paper"


class PdfConfig(StrictConfig):
    """How much of a PDF is taken: `max_pages` bounds text and images alike, `max_pixels` each image's area.

    Embedded images with a side below `min_figure_side` pixels are decoration.
    """

    max_pages: int = Field(12, ge=1)
    max_pixels: int = Field(250_880, ge=784)  # 320 tokens of Qwen2-VL, each 28 x 28 pixels
    max_figures: int = Field(8, ge=0)
    min_figure_side: int = Field(64, ge=1)


@dataclass(frozen=True)
class PdfContent:
    """A PDF's text and how many images were saved, as 000.png, 001.png, ..."""

    text: str
    num_pages: int
    num_figures: int


def extract_pdf(path: Path, pages: Path, figures: Path, config: PdfConfig) -> PdfContent:
    """The text of `path`; its page images go into folder `pages`, its embedded ones into `figures`.

    What the folders held is replaced. Raises RowError when the file is missing, encrypted or damaged; the folders
    may then hold some of its images.
    """
    import pypdfium2

    for folder in (pages, figures):
        # A run that was killed may have left more images here than this one saves.
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with pypdfium2.PdfDocument(path) as document:
            return _extract(document, pages, figures, config)
    except FileNotFoundError:
        fix = "add the file, or set require_files: false to use the row's text"
        raise RowError(f"no PDF {path.name}", fix) from None
    except pypdfium2.PdfiumError as error:
        raise RowError(f"unreadable PDF {path.name}: {error}", _FIX) from None


def _extract(document: Any, pages: Path, figures: Path, config: PdfConfig) -> PdfContent:
    texts, num_figures = [], 0
    num_pages = min(len(document), config.max_pages)
    for index in range(num_pages):
        page = document[index]
        texts.append(_page_text(page))
        width, height = page.get_size()
        image = page.render(scale=math.sqrt(config.max_pixels / (width * height))).to_pil()
        save_image(image, pages, index, config.max_pixels)
        for figure in _figures(page, config)[: config.max_figures - num_figures]:
            save_image(figure, figures, num_figures, config.max_pixels)
            num_figures += 1
        # PDFium holds a page and its objects in memory until it is closed.
        page.close()
    return PdfContent(clean_text("\n\n".join(texts), "text"), num_pages, num_figures)


def save_image(image: Image, folder: Path, index: int, max_pixels: int) -> None:
    """Save as `<folder>/<index>.png`, made smaller where it has more than `max_pixels`."""
    rgb = image.convert("RGB")
    scale = math.sqrt(max_pixels / (rgb.width * rgb.height))
    if scale < 1:
        rgb = rgb.resize((max(1, int(rgb.width * scale)), max(1, int(rgb.height * scale))))
    folder.mkdir(parents=True, exist_ok=True)
    rgb.save(folder / f"{index:03d}.png")


def _page_text(page: Any) -> str:
    textpage = page.get_textpage()
    text = str(textpage.get_text_bounded())
    textpage.close()
    return _HYPHEN_AT_LINE_END.sub("", text)


def _figures(page: Any, config: PdfConfig) -> list[Image]:
    """The page's embedded images that are neither decoration nor the whole page, from the top down."""
    import pypdfium2
    import pypdfium2.raw as pdfium

    width, height = page.get_size()
    found = []
    for item in page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE]):
        left, bottom, right, top = item.get_bounds()
        covers = (right - left) * (top - bottom) / (width * height)
        if min(item.get_px_size()) < config.min_figure_side or covers > _WHOLE_PAGE:
            continue
        try:
            found.append((-top, left, item.get_bitmap(render=False).to_pil()))
        except pypdfium2.PdfiumError:  # an image format that PDFium renders but does not hand out
            found.append((-top, left, item.get_bitmap(render=True).to_pil()))
    # Sorted by place alone: Pillow images cannot be compared where two are at the same place.
    return [image for _, _, image in sorted(found, key=lambda figure: figure[:2])]
