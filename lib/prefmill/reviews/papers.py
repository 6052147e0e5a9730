"""What a reader of a paper sees: its text, page images and figures, from the row, a text file or a PDF."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from pydantic import Field

from prefmill.core.config import ExternalPath, StrictConfig, later, runtime
from prefmill.core.errors import InputError
from prefmill.core.files import write_record
from prefmill.reviews.pdf import PdfConfig, PdfContent, extract_pdf, save_image
from prefmill.reviews.rows import PaperRow, RowError, clean_text

TextFrom = Literal["text file", "pdf", "row", "abstract", "nothing"]
T = TypeVar("T")
_NOT_IN_NAME = re.compile(r"[\s/\\%]|^\.")
_MAX_NAME_BYTES = 220  # of 255, with an ending and what an unfinished file is called
_NAME_BEGINNING = 120


def file_name(paper_id: str) -> str:
    """A paper's id as a file's name, another for every id: `/` and what else none may hold as in addresses, `%2F`."""
    name = _NOT_IN_NAME.sub(lambda sign: "".join(f"%{byte:02X}" for byte in sign[0].encode()), paper_id)
    if len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    return f"{name.encode()[:_NAME_BEGINNING].decode(errors='ignore')}~{hashlib.sha256(paper_id.encode()).hexdigest()}"


class PaperConfig(StrictConfig):
    """Where papers come from besides their rows: folders with `<paper_id>.txt` and `<paper_id>.pdf`.

    With `require_files` a paper without its file is a bad row; otherwise its row's text serves. `workers` processes
    read PDFs at a time. `title_only` papers have neither text nor abstract: keep them, or drop them with their reviews.
    """

    texts: ExternalPath | None = Field(None, description="folder with <paper_id>.txt")
    pdfs: ExternalPath | None = Field(None, description="folder with <paper_id>.pdf: text, page images and figures")
    require_files: bool = Field(
        True, description="a paper without its file is a bad row; false: the text of its row is used"
    )
    title_only: Literal["keep", "drop"] = later(
        "keep", description="`keep` papers with neither text nor abstract, or `drop` them with their reviews"
    )
    pdf: PdfConfig = Field(default_factory=PdfConfig, description="how PDFs are read")
    workers: int = runtime(1, ge=1, description="processes that read PDFs")


class Document(msgspec.Struct, frozen=True):
    """A paper's text (empty where the sources have none), where it is from, and its images, relative to the corpus."""

    text: str
    text_from: TextFrom
    pages: list[str]
    figures: list[str]


@dataclass(frozen=True)
class DocumentReader:
    """Makes documents; images go below `output`, and what was read of a PDF stays in `work` for a resumed run."""

    config: PaperConfig
    output: Path
    work: Path

    def __call__(self, paper: PaperRow) -> Document | RowError:
        """The document of `paper`, or why there is none."""
        try:
            return self._read(paper)
        except RowError as error:
            # A paper that is left out must leave no images: no row of the corpus would name them.
            for folder in self._image_folders(paper.paper_id):
                shutil.rmtree(folder, ignore_errors=True)
            return error

    def _read(self, paper: PaperRow) -> Document:
        in_file = self._text_file(paper.paper_id)
        content = self._pdf(paper.paper_id)
        if paper.drawn and content is None:
            content = self._draw(paper)
        sources: list[tuple[TextFrom, str]] = [
            ("text file", in_file),
            ("pdf", content.text if content else ""),
            ("row", paper.text),
            ("abstract", paper.abstract),
        ]
        text_from, text = next((source for source in sources if source[1]), ("nothing", ""))
        pages, figures = (content.num_pages, content.num_figures) if content else (0, 0)
        return Document(
            text=text,
            text_from=text_from,
            pages=[f"pages/{file_name(paper.paper_id)}/{index:03d}.png" for index in range(pages)],
            figures=[f"figures/{file_name(paper.paper_id)}/{index:03d}.png" for index in range(figures)],
        )

    def _text_file(self, paper_id: str) -> str:
        if self.config.texts is None:
            return ""
        path = self.config.texts / f"{file_name(paper_id)}.txt"
        try:
            return clean_text(path.read_bytes().decode("utf-8-sig"), path.name)
        except FileNotFoundError:
            if self.config.require_files:
                fix = "add the file, or set require_files: false to use the row's text"
                raise RowError(f"no text file {path.name}", fix) from None
            return ""
        except UnicodeDecodeError as error:
            raise RowError(f"invalid UTF-8 in {path.name} at byte {error.start}", "save it as UTF-8") from None

    def _pdf(self, paper_id: str) -> PdfContent | None:
        if self.config.pdfs is None:
            return None
        path = self.config.pdfs / f"{file_name(paper_id)}.pdf"
        if not path.is_file() and not self.config.require_files:
            return None
        pages, figures = self._image_folders(paper_id)
        return self._remembered(paper_id, lambda: extract_pdf(path, pages, figures, self.config.pdf))

    def _draw(self, paper: PaperRow) -> PdfContent:
        from prefmill.reviews.drawn import draw_figure, draw_page

        pages, figures = self._image_folders(paper.paper_id)
        save_image(draw_page(paper), pages, 0, self.config.pdf.max_pixels)
        save_image(draw_figure(paper), figures, 0, self.config.pdf.max_pixels)
        return PdfContent("", 1, 1)

    def _image_folders(self, paper_id: str) -> tuple[Path, Path]:
        return self.output / "pages" / file_name(paper_id), self.output / "figures" / file_name(paper_id)

    def _remembered(self, paper_id: str, extract: Callable[[], PdfContent]) -> PdfContent:
        record = self.work / "pdf" / f"{file_name(paper_id)}.json"
        if record.is_file():
            return PdfContent(**json.loads(record.read_text(encoding="utf-8")))
        content = extract()
        # After the images: a run killed before this line reads the PDF again and keeps no half of it.
        write_record(record, dataclasses.asdict(content))
        return content


def check_folders(config: PaperConfig) -> None:
    """Raises InputError when a folder of texts or PDFs is not there."""
    for name, folder in (("texts", config.texts), ("pdfs", config.pdfs)):
        if folder is not None and not folder.is_dir():
            raise InputError(f"no such folder of {name}", where=folder, fix=f"correct `{name}` in the configuration")


def read_documents(
    papers: Iterable[tuple[T, PaperRow]], reader: DocumentReader
) -> Iterator[tuple[T, PaperRow, Document | RowError]]:
    """Each paper with its document, in order, `config.workers` at a time."""
    if reader.config.workers == 1 or reader.config.pdfs is None:
        yield from ((tag, paper, reader(paper)) for tag, paper in papers)
        return
    from prefmill.distributed.isolation import end_with_parent

    # Spawned, as this process may hold threads; ended with it, so that none goes on writing beside a resumed run.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(reader.config.workers, context, end_with_parent) as pool:
        stream = iter(papers)
        # In batches: pool.map takes everything it is given at once, and the texts would fill the memory.
        while batch := list(itertools.islice(stream, 16 * reader.config.workers)):
            documents = pool.map(reader, [paper for _, paper in batch])
            yield from ((tag, paper, document) for (tag, paper), document in zip(batch, documents, strict=True))
