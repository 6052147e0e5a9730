"""What a browser draws of a picture file is the array that models read; other colours are refused by name."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, started
from PIL import Image

from prefmill.store.pictures import ImageError, open_image, shown_bytes

SRGB = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)  # white, red, green, blue; PNG, 11.3.2.1
P3 = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
ADOBE = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
DRAWN = """(async () => {
  const image = new Image(); image.src = "data:%s;base64,%s"; await image.decode();
  const canvas = document.createElement("canvas"); canvas.width = 16; canvas.height = 16;
  const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
  return Array.from(context.getImageData(0, 0, 16, 16).data);
})()"""


@pytest.fixture(scope="module")
def tab(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with started(chromium, tmp_path_factory.mktemp("browser")) as browser, browser.tab() as page:
        yield page


def drawn(page: Page, data: bytes, kind: str) -> Any:
    """The pixels that the browser draws, [16, 16, 3]."""
    values = page.read(DRAWN % (kind, base64.b64encode(data).decode()))
    return np.array(values).reshape(16, 16, 4)[..., :3]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def coloured(folder: Path, mode: str, gamma: float, points: tuple[int, ...] | None, *others: bytes) -> Path:
    """A PNG that says its colours by numbers."""
    blocks = np.kron(np.random.default_rng(0).integers(0, 256, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(blocks).convert(mode).save(written, format="PNG")
    told = [chunk(b"gAMA", struct.pack(">I", round(gamma * 1e5)))]
    told += [chunk(b"cHRM", struct.pack(">8I", *points))] if points else []
    plain = written.getvalue()
    (folder / "a.png").write_bytes(plain[:33] + b"".join([*told, *others]) + plain[33:])
    return folder / "a.png"


@pytest.mark.parametrize(
    ("mode", "gamma", "points", "off"),
    [
        ("RGB", 1 / 2.2, None, 0),
        ("RGB", 1 / 2.2, SRGB, 8),  # the browser takes 2.2 for the curve: dark tones, as every older tool writes them
        ("L", 0, None, 0),
    ],
)
def test_numbers_that_say_srgb_are_read(
    tab: Page, tmp_path: Path, mode: str, gamma: float, points: tuple[int, ...] | None, off: int
) -> None:
    file = coloured(tmp_path, mode, gamma, points)
    array = np.asarray(open_image(file)).astype(int)
    assert np.abs(array - drawn(tab, file.read_bytes(), "image/png")).max() <= off
    assert np.array_equal(drawn(tab, *shown_bytes(file)), array)


@pytest.mark.parametrize(
    ("mode", "gamma", "points", "told"),
    [
        ("RGB", 1.0, None, "gamma 1"),
        ("RGB", 1.0, SRGB, "gamma 1"),
        ("L", 1.0, None, "gamma 1"),
        ("P", 1.0, None, "gamma 1"),
        ("RGBA", 0.55556, None, "gamma 0.556"),
        ("RGB", 1 / 2.2, P3, "primaries other than sRGB's"),
        ("RGB", 1 / 2.2, ADOBE, "primaries other than sRGB's"),
    ],
)
def test_other_colours_by_numbers_are_refused(
    tab: Page, tmp_path: Path, mode: str, gamma: float, points: tuple[int, ...] | None, told: str
) -> None:
    """People who rated such a file in a browser saw other colours than the models read: by up to 100 of 255."""
    file = coloured(tmp_path, mode, gamma, points)
    with pytest.raises(ImageError, match=rf"colours that are not read[\s\S]*{told}"):
        open_image(file)
    stored = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert np.abs(stored - drawn(tab, file.read_bytes(), "image/png")).max() > 10


def test_sRGB_beside_another_gamma_counts(tab: Page, tmp_path: Path) -> None:  # noqa: N802 - the chunk's name
    file = coloured(tmp_path, "RGB", 1.0, P3, chunk(b"sRGB", b"\0"))
    assert np.array_equal(drawn(tab, file.read_bytes(), "image/png"), np.asarray(open_image(file)))
