"""PDFs written by hand, for tests of reading them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAGE_POINTS = (612, 792)


def write_pdf(path: Path, pages: Sequence[str], image: tuple[int, int] | None = None) -> Path:
    """A PDF with a line of text a page; `image` is the size in pixels of a red picture on the first page."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids, resources = [], "/Font << /F1 3 0 R >>"
    if image is not None:
        width, height = image
        header = f"/Type /XObject /Subtype /Image /Width {width} /Height {height} /ColorSpace /DeviceRGB"
        pixels = "FF0000" * (width * height) + ">"
        objects.append(_stream(f"{header} /BitsPerComponent 8 /Filter /ASCIIHexDecode", pixels))
        resources += " /XObject << /Im1 4 0 R >>"
    for index, text in enumerate(pages):
        drawing = "q 200 0 0 200 100 300 cm /Im1 Do Q " if image is not None and index == 0 else ""
        objects.append(_stream("", f"{drawing}BT /F1 24 Tf 72 700 Td ({text}) Tj ET"))
        content = len(objects)
        box = f"/MediaBox [0 0 {PAGE_POINTS[0]} {PAGE_POINTS[1]}]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {box} /Contents {content} 0 R /Resources << {resources} >> >>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_assemble(objects))
    return path


def _stream(entries: str, data: str) -> str:
    return f"<< {entries} /Length {len(data)} >>\nstream\n{data}\nendstream"


def _assemble(objects: Sequence[str]) -> bytes:
    body, offsets = "%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{text}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode("latin-1")
