"""What people see in a real browser is what is trained: pictures of many forms, as Chromium draws them on the page."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, started
from PIL import Image

from prefmill.images.answers import AnswerBook, Session
from prefmill.images.collection import Quarantine, SourceImage, check_images
from prefmill.images.rating import plan_matchups
from prefmill.images.rating_server import RatingServer
from prefmill.store.pictures import open_image
from tests.unit.images.test_picture_formats import XMP_TURN, p3_profile

pytestmark = [pytest.mark.slow, pytest.mark.timing]
_DRAWN = """(async () => {
  const image = new Image();
  image.src = %s;
  await image.decode();
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const brush = canvas.getContext("2d");
  brush.fillStyle = "black";  // whatever were left transparent would show it
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(image, 0, 0);
  const data = brush.getImageData(0, 0, canvas.width, canvas.height).data;
  return [canvas.height, canvas.width, btoa(String.fromCharCode(...data))];
})()"""


def pictures(folder: Path) -> list[Path]:
    """As phones, browsers, cameras and scanners write them."""
    rows, columns = np.mgrid[0:24, 0:40]
    plain = Image.fromarray(np.stack([columns * 6, rows * 10, (rows + columns) * 4], axis=-1).astype(np.uint8))
    clear, turned = plain.convert("RGBA"), Image.Exif()
    clear.putalpha(plain.getchannel("R"))
    turned[0x112] = 6
    deep = Image.fromarray((np.asarray(plain.convert("L")).astype(np.uint16) * 257 + 100).astype(np.uint16))
    frames = {"save_all": True, "append_images": [plain.transpose(Image.Transpose.ROTATE_180)], "duration": 60}
    forms: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.png": (plain, {}), "plain.jpg": (plain, {}), "plain.webp": (plain, {"quality": 80}),
        "plain.bmp": (plain, {}), "plain.avif": (plain, {}), "plain.tif": (plain, {}), "plain.jp2": (plain, {}),
        "grey.jpg": (plain.convert("L"), {}), "cmyk.jpg": (plain.convert("CMYK"), {}),
        "rgb.jpg": (plain, {"keep_rgb": True}), "edited.jpg": (plain, {"xmp": XMP_TURN}),
        "alpha.png": (clear, {}), "alpha.webp": (clear, {"lossless": True}), "alpha.avif": (clear, {}),
        "palette.png": (plain.quantize(16), {"transparency": 3}), "one_bit.png": (plain.convert("1"), {}),
        "deep.png": (deep, {}), "wide.png": (plain, {"icc_profile": p3_profile()}),
        "wide.jpg": (plain, {"icc_profile": p3_profile()}), "moving.png": (plain, frames),
        "moving.gif": (plain.quantize(16), frames), "moving.webp": (plain, {**frames, "lossless": True}),
        **{f"turned.{kind}": (plain, {"exif": turned}) for kind in ("png", "jpg", "webp", "avif")},
    }  # fmt: skip
    for name, (image, options) in forms.items():
        image.save(folder / name, **options)
    return [folder / name for name in forms]


def drawn(page: Page, address: str) -> Any:
    """The pixels that the browser has for an address, [H, W, 3]."""
    height, width, data = page.read(_DRAWN % json.dumps(address))
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[..., :3]


def test_a_browser_draws_what_models_read(chromium: str, tmp_path: Path) -> None:
    sources = [SourceImage(f"p/{file.name}", "p", "x", file, file.name, file.name) for file in pictures(tmp_path)]
    images = check_images(sources, quarantine := Quarantine())
    assert not quarantine.rows
    book = AnswerBook(tmp_path / "answers.jsonl")
    session = Session(book, plan_matchups(images.values(), None, 0), ("overall",), 1, 0)
    with (
        RatingServer(session, images, "t") as server,
        started(chromium, tmp_path / "profile") as browser,
        browser.tab() as page,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.open(server.url)
        page.wait("document.readyState === 'complete'")
        for address, image in server._images.items():
            seen, read = drawn(page, f"/image/{address}"), np.asarray(open_image(image.source.path))
            assert np.array_equal(seen, read), image.source.listed_as
        server.shutdown()
    book.close()
