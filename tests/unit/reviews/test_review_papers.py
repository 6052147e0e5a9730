"""A paper's text and images: from its row, a text file, a PDF, or drawn for a generated paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pdf_files import write_pdf
from PIL import Image

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.reviews import papers
from prefmill.reviews.papers import Document, DocumentReader, PaperConfig, check_folders, file_name, read_documents
from prefmill.reviews.pdf import PdfConfig, extract_pdf
from prefmill.reviews.rows import PaperRow, RowError

PAPER = PaperRow("p1", "Title", "The abstract.", "The row's text.")
FROM_ROW = Document("The row's text.", "row", [], [])


def reader(folder: Path, **values: Any) -> DocumentReader:
    return DocumentReader(validate(PaperConfig, values), folder / "out", folder / "work")


def extract(path: Path, folder: Path, **values: int) -> tuple[Any, list[Path], list[Path]]:
    pages, figures = folder / "pages", folder / "figures"
    content = extract_pdf(path, pages, figures, PdfConfig(**values))
    return content, sorted(pages.glob("*")), sorted(figures.glob("*"))


def test_text_comes_from_file_then_row_then_abstract(tmp_path: Path) -> None:
    (tmp_path / "p1.txt").write_bytes(b"From the\r\nfile.\x00")
    from_file = reader(tmp_path, texts=str(tmp_path))(PAPER)
    assert from_file == Document("From the\nfile.", "text file", [], [])
    assert reader(tmp_path)(PAPER) == FROM_ROW
    assert reader(tmp_path)(PaperRow("p", "T", "The abstract.")) == Document("The abstract.", "abstract", [], [])
    assert reader(tmp_path)(PaperRow("p", "T")) == Document("", "nothing", [], [])


IDS = [
    "10.1000/abc",
    "10.1000%2Fabc",
    "10.1000_abc",
    "a b",
    "a\\b",
    "../x",
    ".x",
    "é" * 150,
    "é" * 150 + "/",
    "/" * 200,
]


@pytest.mark.parametrize("paper_id", IDS)
def test_an_id_of_any_signs_names_files_within_the_folder(tmp_path: Path, paper_id: str) -> None:
    """As the names of files that any system takes: one part, at most 255 bytes with its ending."""
    name = file_name(paper_id)
    assert Path(name).name == name
    assert len(f"{name}.json.tmp".encode()) <= 255
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / f"{name}.txt").write_text("Its text.")
    assert reader(tmp_path, texts=str(tmp_path / "texts"))(PaperRow(paper_id, "T")).text == "Its text."
    write_pdf(tmp_path / "texts" / f"{name}.pdf", ["Hello"])
    document = reader(tmp_path, pdfs=str(tmp_path / "texts"))(PaperRow(paper_id, "T"))
    assert [path.parent.parent for path in (tmp_path / "out").rglob("*.png")] == [tmp_path / "out" / "pages"]
    assert [(tmp_path / "out" / page).is_file() for page in document.pages] == [True]


@given(st.sets(st.text(st.sampled_from("a.%2F/\\ ~é"), min_size=1, max_size=200) | st.sampled_from(IDS)))
def test_no_two_ids_name_one_file(ids: set[str]) -> None:
    assert len({file_name(paper_id) for paper_id in ids}) == len(ids)


def test_plain_ids_are_names_as_they_are() -> None:
    assert [file_name(name) for name in ("p1", "B1-x_y.z:2", "ä")] == ["p1", "B1-x_y.z:2", "ä"]
    assert unquote(file_name("10.1000/a b%")) == "10.1000/a b%"


def test_a_missing_or_unreadable_text_file_is_a_problem_unless_allowed(tmp_path: Path) -> None:
    missing = reader(tmp_path, texts=str(tmp_path))(PAPER)
    assert isinstance(missing, RowError)
    assert missing.reason == "no text file p1.txt"
    assert "require_files" in missing.fix
    assert reader(tmp_path, texts=str(tmp_path), require_files=False)(PAPER) == Document(
        "The row's text.", "row", [], []
    )
    (tmp_path / "p1.txt").write_bytes(b"\xe9")
    broken = reader(tmp_path, texts=str(tmp_path))(PAPER)
    assert isinstance(broken, RowError)
    assert broken.reason == "invalid UTF-8 in p1.txt at byte 0"


def test_pdf_text_pages_and_figures(tmp_path: Path) -> None:
    path = write_pdf(tmp_path / "p.pdf", ["Hello reviewers", "Second page"], image=(90, 70))
    content, pages, figures = extract(path, tmp_path, max_pixels=100_000)
    assert content.text == "Hello reviewers\n\nSecond page"
    assert (content.num_pages, content.num_figures) == (2, 1)
    assert [page.name for page in pages] == ["000.png", "001.png"]
    width, height = Image.open(pages[0]).size
    assert 95_000 < width * height <= 100_000
    assert abs(width / height - 612 / 792) < 0.01
    figure = Image.open(figures[0])
    assert figure.size == (90, 70)
    assert figure.getpixel((45, 35)) == (255, 0, 0)


def test_pdf_limits(tmp_path: Path) -> None:
    path = write_pdf(tmp_path / "p.pdf", ["One", "Two", "Three"], image=(90, 70))
    content, pages, figures = extract(path, tmp_path, max_pages=2, max_figures=0)
    assert content.text == "One\n\nTwo"
    assert (len(pages), len(figures)) == (2, 0)
    _, _, figures = extract(path, tmp_path, max_pixels=784)
    width, height = Image.open(figures[0]).size
    assert 600 < width * height <= 784
    _, _, figures = extract(path, tmp_path, min_figure_side=71)
    assert figures == []


def test_a_scanned_pdf_has_pages_but_neither_text_nor_figures(tmp_path: Path) -> None:
    scans = [Image.new("RGB", (612, 792), colour) for colour in ("white", "gray")]
    scans[0].save(tmp_path / "p1.pdf", save_all=True, append_images=scans[1:])
    document = reader(tmp_path, pdfs=str(tmp_path))(PAPER)
    assert document == Document("The row's text.", "row", ["pages/p1/000.png", "pages/p1/001.png"], [])


@pytest.mark.parametrize("damage", ["empty", "not a PDF", "cut short", "second page missing"])
def test_a_damaged_pdf_is_a_problem_and_leaves_nothing(tmp_path: Path, damage: str) -> None:
    whole = write_pdf(tmp_path / "p1.pdf", ["One", "Two"], image=(90, 70)).read_bytes()
    damaged = {
        "empty": b"",
        "not a PDF": b"Dear reader",
        "cut short": whole[:40],
        "second page missing": whole.replace(b"/Kids [6 0 R 8 0 R]", b"/Kids [6 0 R 9 0 R]"),
    }
    assert damaged[damage] != whole
    (tmp_path / "p1.pdf").write_bytes(damaged[damage])
    broken = reader(tmp_path, pdfs=str(tmp_path))(PAPER)
    assert isinstance(broken, RowError)
    assert broken.reason.startswith("unreadable PDF p1.pdf")
    assert broken.fix
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_missing_pdf_is_a_problem_unless_allowed(tmp_path: Path) -> None:
    missing = reader(tmp_path, pdfs=str(tmp_path))(PAPER)
    assert isinstance(missing, RowError)
    assert missing.reason == "no PDF p1.pdf"
    assert reader(tmp_path, pdfs=str(tmp_path), require_files=False)(PAPER) == FROM_ROW


def test_a_resumed_run_reads_no_pdf_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pdf(tmp_path / "p1.pdf", ["Once"])
    first = reader(tmp_path, pdfs=str(tmp_path))(PAPER)
    monkeypatch.setattr(papers, "extract_pdf", lambda *_: pytest.fail("read again"))
    assert reader(tmp_path, pdfs=str(tmp_path))(PAPER) == first
    assert isinstance(first, Document)
    assert first.text_from == "pdf"


@pytest.mark.slow
def test_several_workers_make_what_one_makes(tmp_path: Path) -> None:
    rows = [PaperRow(f"p{index}", f"Title {index}") for index in range(40)]
    for row in rows[:-1]:
        write_pdf(tmp_path / "pdfs" / f"{row.paper_id}.pdf", [row.title])
    found = []
    for workers in (1, 2):
        make = reader(tmp_path / str(workers), pdfs=str(tmp_path / "pdfs"), workers=workers)
        found.append(
            [(tag, row, _comparable(document)) for tag, row, document in read_documents(enumerate(rows), make)]
        )
    assert found[0] == found[1]
    assert found[0][0][2] == Document("Title 0", "pdf", ["pages/p0/000.png"], [])
    assert found[0][-1][2] == "no PDF p39.pdf"


def _comparable(document: Document | RowError) -> Document | str:
    return document.reason if isinstance(document, RowError) else document


def test_generated_papers_can_be_drawn(tmp_path: Path) -> None:
    paper = PaperRow("g1", "Sparse attention", "It gains 7 points over Tarn.", "The code is public.", drawn=True)
    document = reader(tmp_path)(paper)
    assert document == Document("The code is public.", "row", ["pages/g1/000.png"], ["figures/g1/000.png"])
    page = Image.open(tmp_path / "out" / "pages" / "g1" / "000.png")
    assert all(low < 50 and high == 255 for low, high in page.getextrema())
    other = PaperRow("g2", "Sparse attention", "It gains 1 points over Tarn.", drawn=True)
    reader(tmp_path)(other)
    figures = [(tmp_path / "out" / "figures" / name / "000.png").read_bytes() for name in ("g1", "g2")]
    assert figures[0] != figures[1]


@pytest.mark.parametrize("name", ["texts", "pdfs"])
def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"no such folder of {name}"):
        check_folders(validate(PaperConfig, {name: str(tmp_path / "absent")}))
