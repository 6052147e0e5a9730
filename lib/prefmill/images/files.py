"""Image files from anywhere: what is wrong with one, its size, and how it comes into an artifact."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from prefmill.core.errors import PrefmillError

MAX_PIXELS = 40_000_000  # a file of some kilobytes can claim more than a machine's memory holds
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


class ImageError(PrefmillError):
    """An image file that cannot be used; `what` says why in a few words."""


@dataclass(frozen=True)
class ImageFacts:
    """A decodable image file: size in pixels, sha256 of the file, and the suffix its format goes by."""

    width: int
    height: int
    sha256: str
    suffix: str


def inspect_image(content: bytes | Path, where: object = None, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Decode an image wholly, to be sure that it can be; raises ImageError naming what is wrong.

    The size is looked at before any pixel is decoded: more than `max_pixels` are refused.
    """
    from PIL import Image, UnidentifiedImageError

    where = where or (content if isinstance(content, Path) else None)
    try:
        data = content.read_bytes() if isinstance(content, Path) else content
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ImageError("missing image", where=where, fix="put the file there, or take the row out") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower bound follows
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
            _require_size(image.size, where, max_pixels)
            image.verify()  # checksums to the end, which decoding does not need
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
            image.load()
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), where, max_pixels) from None
    except UnidentifiedImageError:
        expected = "a whole PNG, JPEG or WebP file"
        raise ImageError("not an image", where=where, got=f"{len(data)} bytes", expected=expected) from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files that are cut or damaged
        raise ImageError("damaged image", where=where, got=f"{len(data)} bytes: {_first_line(error)}") from None
    suffix = FORMATS[str(image.format)]
    return ImageFacts(image.width, image.height, hashlib.sha256(data).hexdigest(), suffix)


def place(source: Path, target: Path, is_ours: bool) -> None:
    """Have the content of `source` at `target` too; files of finished artifacts are linked: nobody edits them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    if is_ours:
        try:
            os.link(source, target)
        except OSError:  # another disk, or one without hard links
            pass
        else:
            return
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def _require_size(size: tuple[int, int], where: object, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise _too_large(f"{size[0]} x {size[1]} pixels", where, max_pixels)


def _too_large(got: str, where: object, max_pixels: int) -> ImageError:
    return ImageError(
        "image too large to decode", where=where, got=got, expected=f"at most {max_pixels:,} pixels",
        fix="scale it down",
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
