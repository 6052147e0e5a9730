"""Image files from anywhere: what is wrong with one, and its size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from prefmill.store.picture_formats import FORMATS
from prefmill.store.pictures import as_seen, check_image, reading, upright_size

_LONGEST = 255  # characters of a name, on every common file system


@dataclass(frozen=True)
class ImageFacts:
    """A decodable image file: size as people see it, sha256 of the file and of its pixels, its format's suffix."""

    width: int
    height: int
    sha256: str
    pixels_sha256: str
    suffix: str


def inspect_image(content: bytes | Path, where: object = None) -> ImageFacts:
    """Decode an image wholly, to be sure that it can be; raises ImageError naming the fault: see `check_image`."""
    where = where or (content if isinstance(content, Path) else None)
    with reading(where):
        # Read once: the digest is that of the very bytes that were decoded, even if the file changes meanwhile.
        data = content.read_bytes() if isinstance(content, Path) else content
        image = check_image(data, where)
        width, height = upright_size(image)
        pixels = hashlib.sha256(f"{width}x{height}".encode() + as_seen(image, where).tobytes()).hexdigest()
    return ImageFacts(width, height, hashlib.sha256(data).hexdigest(), pixels, FORMATS[str(image.format)])


def no_file(name: str | None) -> str | None:
    """Why what stands where a picture's file should cannot be one."""
    if name and ("://" in name or name.startswith("data:")):
        return "an image by its address, not a file"
    return "an image as text, not a file" if name and any(len(part) > _LONGEST for part in name.split("/")) else None
