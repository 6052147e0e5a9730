"""Which formats of pictures are read; other files by name, from their first bytes."""

from __future__ import annotations

import re

# By Pillow's name, with the suffix that a copy gets. A phone's MPO opens as JPEG.
FORMATS = {
    "PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "AVIF": ".avif", "GIF": ".gif", "TIFF": ".tif",
    "BMP": ".bmp", "JPEG2000": ".jp2",
}  # fmt: skip
READ = "a whole PNG, JPEG, WebP, AVIF, GIF, TIFF, BMP or JPEG 2000 file"
HEAD = 1024  # bytes, enough for `format_of`
_OURS = rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP|....ftypavi[fs]|GIF8|II\*\0|MM\0\*|BM|\0\0\0\x0cjP  |\xff\x4f\xff\x51"
_NAMES = {
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC", rb"\xff\x0a|....JXL ": "JPEG XL", rb"[^\0]*<svg": "SVG",
    rb"II\*\0....CR|....ftypcrx|FUJIFILMCCD|IIRO|IIRS|IIU\0": "a camera's raw file", rb"8BPS": "Photoshop",
    rb"%PDF": "PDF", rb"%!PS|\xc5\xd0\xd3\xc6": "EPS", rb"\0\0[\x01\x02]\0": "an icon", rb"P[1-7f]\s": "PPM",
    rb"qoif": "QOI", rb"DDS ": "DDS", rb"v/1\x01": "OpenEXR", rb"#\?R": "Radiance HDR",
    rb"....ftyp(?!avi[fs])|\x1aE\xdf\xa3": "a video",
}  # fmt: skip
# Primaries and transfer functions by their numbers in ITU-T H.273.
_SRGB = {(1, 13), (1, 1), (1, 6)}  # with BT.709's curve too, which browsers show as sRGB's
_COLOURS = {(12, 13): "Display P3", (9, 16): "HDR, PQ", (9, 18): "HDR, HLG", (12, 16): "HDR, PQ"}
_NO_PICTURES = {
    rb"(?i)\s*<(!doctype html|html)": ("an HTML page", "get the file again: a page was saved in its place"),
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


def coded_colours(head: bytes) -> str | None:
    """What a PNG's cICP chunk says of its colours where that is not sRGB; Pillow passes the chunk over."""
    found = re.search(rb"cICP(.)(.)", head.partition(b"IDAT")[0], re.DOTALL)
    codes = (found[1][0], found[2][0]) if found else (1, 13)
    return None if codes in _SRGB else f"cICP {codes[0]}, {codes[1]}: {_COLOURS.get(codes, 'other than sRGB')}"
