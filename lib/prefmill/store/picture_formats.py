"""Which formats of pictures are read; other files by name, from their first bytes."""

from __future__ import annotations

import io
import re
import struct
from typing import BinaryIO

# By Pillow's name, with the suffix that a copy gets. A phone's MPO opens as JPEG.
FORMATS = {
    "PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "AVIF": ".avif", "GIF": ".gif", "TIFF": ".tif",
    "BMP": ".bmp", "JPEG2000": ".jp2", "HEIF": ".heic",
}  # fmt: skip
READ = "a whole PNG, JPEG, WebP, AVIF, GIF, TIFF, BMP or JPEG 2000 file"
HEAD = 1024  # bytes, enough for `format_of`
_OURS = rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP|....ftypavi[fs]|GIF8|II\*\0|MM\0\*|BM|\0\0\0\x0cjP  |\xff\x4f\xff\x51"
_NAMES = {
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC", rb"\xff\x0a|....JXL ": "JPEG XL", rb"[^\0]*<svg": "SVG",
    rb"II\*\0....CR|....ftypcrx|FUJIFILMCCD|IIRO|IIRS|IIU\0": "a camera's raw file", rb"8BPS": "Photoshop",
    rb"%PDF": "PDF", rb"%!PS|\xc5\xd0\xd3\xc6": "EPS", rb"\0\0[\x01\x02]\0": "an icon or a TGA", rb"P[1-7f]\s": "PPM",
    rb"qoif": "QOI", rb"DDS ": "DDS", rb"v/1\x01": "OpenEXR", rb"#\?R": "Radiance HDR",
    rb"....ftyp(?!avi[fs])|\x1aE\xdf\xa3": "a video",
}  # fmt: skip
# By their numbers in ITU-T H.273; 2 says nothing, and browsers show BT.709's curve as sRGB's.
_SRGB_PRIMARIES, _SRGB_CURVES = {1, 2}, {1, 2, 6, 13}
_NUMBERED = {b"cICP", b"sRGB", b"gAMA", b"cHRM"}
_SRGB_GAMMA, _NEAR_GAMMA = 1 / 2.2, 0.05
_SRGB_POINTS = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # white, red, green, blue of IEC 61966-2-1
_NEAR_POINTS = 0.02
_META = 1 << 16  # bytes of an AVIF, its boxes before the picture
_COLOURS = {(12, 13): "Display P3", (9, 16): "HDR, PQ", (9, 18): "HDR, HLG", (12, 16): "HDR, PQ"}
_NO_PICTURES = {
    rb"(?i)\s*<(!doctype html|html)": ("an HTML page", "get the file again: a page was saved in its place"),
    rb"\Z": ("an empty file", "get the file again"),
    rb"version https://git-lfs": ("a Git LFS pointer", "run git lfs pull"),
}


def format_of(head: bytes) -> str | None:
    """The name of a picture's format that is not read, from the first `HEAD` bytes of the file."""
    return next((name for pattern, name in _NAMES.items() if _starts(pattern, head)), None)


def other_content(head: bytes) -> tuple[str, str] | None:
    """What stands where a picture should, and what to do about it."""
    return next((said for pattern, said in _NO_PICTURES.items() if _starts(pattern, head)), None)


def is_ours(head: bytes) -> bool:
    """Whether a file begins as those that are read do."""
    return _starts(_OURS, head)


def _starts(pattern: bytes, head: bytes) -> bool:
    return re.match(pattern, head, re.DOTALL) is not None


def coded_colours(stream: BinaryIO) -> str | None:
    """What a PNG or an AVIF says of its colours by numbers, where that is not sRGB; Pillow passes the numbers over."""
    if stream.read(8) != b"\x89PNG\r\n\x1a\n":
        found = re.search(rb"colrnclx\0(.)\0(.)", stream.read(_META), re.DOTALL)
        return _by_code(found[1][0], found[2][0]) if found else None
    told = _before_pixels(stream)
    if len(codes := told.get(b"cICP", b"")) >= 2:
        return _by_code(*codes[:2])
    # As browsers do: one of the first two counts, and primaries only beside a gamma.
    return None if b"sRGB" in told else _by_measure(told.get(b"gAMA", b""), told.get(b"cHRM", b""))


def _by_code(primaries: int, curve: int) -> str | None:
    if primaries in _SRGB_PRIMARIES and curve in _SRGB_CURVES:
        return None
    return f"colours {primaries}, {curve}: {_COLOURS.get((primaries, curve), 'other than sRGB')}"


def _by_measure(gamma: bytes, places: bytes) -> str | None:
    if len(gamma) != 4 or not (value := int.from_bytes(gamma) / 1e5):
        return None
    if abs(value / _SRGB_GAMMA - 1) > _NEAR_GAMMA:
        return f"gamma {value:.3g}"
    points = [value / 1e5 for value in struct.unpack(">8I", places)] if len(places) == 32 else _SRGB_POINTS
    far = max(abs(there - srgb) for there, srgb in zip(points, _SRGB_POINTS, strict=True)) > _NEAR_POINTS
    return "primaries other than sRGB's" if far else None


def ends_behind_pixels(stream: BinaryIO) -> bool:
    """Whether a PNG has its end behind its pixels, and nothing else there."""
    stream.seek(8)
    has_pixels = False
    while len(head := stream.read(8)) == 8 and (kind := head[4:]) != b"IEND":
        if has_pixels and kind != b"IDAT":
            return False
        has_pixels = kind == b"IDAT"
        stream.seek(int.from_bytes(head[:4]) + 4, io.SEEK_CUR)
    return len(head) == 8


def _before_pixels(stream: BinaryIO) -> dict[bytes, bytes]:
    """What a PNG says of its colours in numbers, by chunk."""
    found = {}
    # From chunk to chunk: a generator's settings may stand before them, of any length and with any text.
    while len(head := stream.read(8)) == 8 and (kind := head[4:]) != b"IDAT":
        size = int.from_bytes(head[:4])
        if kind in _NUMBERED and size <= 32:
            found[kind] = stream.read(size)
            size = 0
        stream.seek(size + 4, io.SEEK_CUR)
    return found
