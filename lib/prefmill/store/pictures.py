"""Pictures as people see them, one decoder for all: upright, on white, 8 bits, RGB; and why a file is refused."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import struct
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from prefmill.core.errors import InputError
from prefmill.store.picture_formats import (
    FORMATS,
    HEAD,
    READ,
    coded_colours,
    ends_behind_pixels,
    format_of,
    is_ours,
    other_content,
)

if TYPE_CHECKING:
    from PIL.Image import Image

DECODER = 5  # raised where pictures become other arrays than before: what was computed of them is not taken again
MAX_PIXELS = 40_000_000  # a file of some kilobytes can claim more than a machine's memory holds
_NOTICED = 0.05  # of a picture's area or side: rounding to whole latents cuts less
_ROUNDING = 2  # of 255: between sRGB profiles of several makers; the same picture with and without one stays the same
_UNSCALED = ("I", "F")  # 32-bit integers and floats: nothing in the file says which value is white
_PLAIN = {"PNG", "JPEG", "WEBP"}
_CODED = {"PNG", "AVIF", "HEIF"}  # formats that may say their colours by numbers
# Pillow gives a PNG's transparent colour in the file's depth, and the pixels in 8 bits.
_CLEAR_AS = {"L;2": lambda value: value * 85, "L;4": lambda value: value * 17, "RGB;16B": lambda value: value >> 8}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF 6.0, pages 29, 37 (0 is white) and 80 (2 has a sign)
_COMPRESSION, _PLANES = 259, 284  # TIFF 6.0, pages 30 (1 is none) and 38 (2 is a plane for each channel)
_NEW_SUBFILE_TYPE, _DNG_VERSION = 254, 50706  # TIFF 6.0, page 36; DNG 1.4, page 22
_AGAIN = "make the image again, or take the row out"


class ImageError(InputError):
    """An image file that cannot be used; `what` says why in a few words."""


def open_image(path: str | Path) -> Image:
    """The picture at `path` in RGB, 8 bits a channel; raises ImageError naming a file that cannot be used.

    Turned upright by its EXIF orientation; what is transparent is on white; 16 bits are scaled to 8 by 255 / 65535;
    CMYK, grey and palettes are converted, colours by their ICC profile to sRGB; of an animation or of several pages
    the first. More than `MAX_PIXELS` are not decoded.
    """
    with reading(path):
        return as_seen(_opened(path, path), path)


def on_disk(folder: Path, name: str) -> Path:
    """The file `name` below `folder`, also where one has its accents as one sign and the other, as macOS, as two.

    Or, as archives made on Windows unpack, backslashes for the slashes: one file then, in no folder.
    """
    others = (name, name.replace("/", "\\"))
    names = (name, *(unicodedata.normalize(form, other) for other in others for form in ("NFC", "NFD")))
    return next((path for path in map(folder.joinpath, names) if os.path.exists(path)), folder / name)


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the picture that `open_image` gives, from the head of the file; raises ImageError."""
    with reading(path):
        return upright_size(_opened(path, path))


def cut_images(paths: Iterable[Path], fit: Callable[[int, int], tuple[int, int]]) -> dict[Path, float]:
    """Of those that lose more than 5 % of their area where they are scaled to cover `fit` of their size, that share."""
    shares = ((path, cut_share(*(size := image_size(path)), fit(*size))) for path in paths)
    return {path: share for path, share in shares if share > _NOTICED}


def enlarged_images(paths: Iterable[Path], fit: Callable[[int, int], tuple[int, int]]) -> dict[Path, float]:
    """Of those that are scaled up by more than 5 % to cover `fit` of their size, by how much."""
    sizes = ((path, image_size(path)) for path in paths)
    scales = ((path, max(map(truediv, fit(*size), size))) for path, size in sizes)
    return {path: scale for path, scale in scales if scale > 1 + _NOTICED}


def cut_share(width: int, height: int, size: tuple[int, int]) -> float:
    """The share of an image's area, in [0, 1), that scaling it to cover `size` leaves outside."""
    scale = max(size[0] / width, size[1] / height)
    return 1 - size[0] * size[1] / (width * height * scale**2)


def check_image(data: bytes, where: object) -> Image:
    """The image in `data`, decoded as it is stored and checked to its last byte; raises ImageError naming `where`."""
    with reading(where):
        _opened(io.BytesIO(data), where).verify()  # checksums to the end, which decoding does not need
        # Opened anew: after verify() Pillow's image is of no further use.
        image = _opened(io.BytesIO(data), where)
        image.load()
        _require_scale(image, where)
        return image


def shown_bytes(path: Path) -> tuple[bytes, str]:
    """The picture that `open_image` gives, as a browser is sent it: the content and its type.

    A file that a browser shows as we decode it is sent as it is; any other is written as PNG.
    """
    from PIL import Image

    with reading(path), _opened(path, path) as image:
        if _is_plain(image):
            return path.read_bytes(), Image.MIME[str(image.format)]
        written = io.BytesIO()
        as_seen(image, path).save(written, format="PNG", compress_level=1)
        return written.getvalue(), "image/png"


def as_seen(image: Image, where: object) -> Image:
    """An opened image as `open_image` gives it."""
    from PIL import ExifTags, Image, ImageOps

    _require_scale(image, where)
    image.load()
    image.getexif()[ExifTags.Base.Orientation] = _orientation(image)
    image = _in_srgb(_eight_bits(ImageOps.exif_transpose(image)))
    if image.has_transparency_data:
        # Put on white first: RGB alone would show the colours that stand under transparent pixels, often black.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info.clear()  # a profile or a turn that stayed there would be applied again
    return image


def upright_size(image: Image) -> tuple[int, int]:
    """Width and height of an opened image once it is turned upright; Pillow gives a TIFF's so already."""
    lies = image.format != "TIFF" and _orientation(image) >= 5
    return (image.height, image.width) if lies else image.size


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """Turn all that Pillow raises for files that it cannot read into ImageError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower bound follows
            yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ImageError("missing image", where=where, fix="put the file there, or take the row out") from None
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), where) from None
    except (OSError, RuntimeError, SyntaxError, ValueError, struct.error) as error:  # the last of EXIF
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise ImageError("damaged image", where=where, got=got, fix=_AGAIN) from None


def _opened(source: str | Path | io.BytesIO, where: object) -> Image:
    """The size is looked at before any pixel is decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        # No other decoders: for EPS, Pillow starts Ghostscript on whatever the file says.
        image = Image.open(source, formats=_opened_as())
    except UnidentifiedImageError:
        raise _unread(_head(source), where) from None
    if image.format == "TIFF" and _is_raw(image, source):
        raise _other_format("a camera's raw file", where)
    # With a profile beside it both say the same, and the profile is read.
    if image.format in _CODED and "icc_profile" not in image.info and (colours := _coded_colours(source)):
        raise ImageError(
            "an image in colours that are not read", where=where, got=colours, expected="sRGB, or an ICC profile",
            fix="convert it to sRGB",
        )  # fmt: skip
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(f"{image.width} x {image.height} pixels", where)
    if image.format == "PNG" and image.tile and (scale := _CLEAR_AS.get(str(image.tile[0].args))):
        clear = image.info.get("transparency")
        if clear is not None:
            image.info["transparency"] = tuple(map(scale, clear)) if isinstance(clear, tuple) else scale(clear)
    return image


@functools.cache
def _opened_as() -> list[str]:
    """Pillow's names of what is opened: HEIC where pillow-heif is installed, as Pillow's own wheels have no decoder."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return [name for name in FORMATS if name not in ("MPO", "HEIF")]  # MPO is found behind JPEG
    return [name for name in FORMATS if name != "MPO"]


def _bytes_of(source: str | Path | io.BytesIO) -> BinaryIO:
    return io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else Path(source).open("rb")


def _head(source: str | Path | io.BytesIO) -> bytes:
    with _bytes_of(source) as stream:
        return stream.read(HEAD)


def _coded_colours(source: str | Path | io.BytesIO) -> str | None:
    with _bytes_of(source) as stream:
        return coded_colours(stream)


def _is_raw(image: Any, source: str | Path | io.BytesIO) -> bool:
    """Whether a TIFF's first page is the small preview in front of a sensor's values, as in DNG, NEF, ARW and CR2."""
    tags = image.tag_v2
    return bool(tags.get(_NEW_SUBFILE_TYPE, 0) & 1) or _DNG_VERSION in tags or format_of(_head(source)) is not None


def _unread(head: bytes, where: object) -> ImageError:
    name = format_of(head)
    if name is not None and not (name == "HEIC" and "HEIF" in _opened_as()):
        return _other_format(name, where)
    if name or is_ours(head):
        return ImageError("damaged image", where=where, got="a file that is cut or overwritten", fix=_AGAIN)
    got, fix = other_content(head) or (None, _AGAIN)
    return ImageError("not an image", where=where, got=got, expected=READ, fix=fix)


def _other_format(name: str, where: object) -> ImageError:
    fix = "convert it to PNG or JPEG" + (", or pip install pillow-heif" if name == "HEIC" else "")
    return ImageError("an image in a format that is not read", where=where, got=name, expected=READ, fix=fix)


def _in_srgb(image: Image) -> Image:
    """The colours that a browser shows; a profile that cannot be used changes none, as there."""
    import numpy as np
    from PIL import ImageChops, ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    stored = image.convert({"LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        shown = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), stored.mode, "RGB").apply(stored)
    except (OSError, ImageCms.PyCMSError):
        return image
    differences = ImageChops.difference(stored.convert("RGB"), shown).getextrema()
    if np.max(differences) <= _ROUNDING:
        return image
    if alpha is not None:
        shown.putalpha(alpha)
    return shown


def _eight_bits(image: Image) -> Image:
    """Pillow's own conversion of 16-bit grey cuts every value over 255 to white; profile and transparency stay."""
    if not image.mode.startswith("I;16"):
        return image
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    # In 32 bits, as 16 cannot hold the product; the half of 65535 that is added makes the division round.
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    grey.info |= {key: value for key, value in image.info.items() if key == "icc_profile"}
    return grey


def _is_plain(image: Image) -> bool:
    """Whether every browser shows the file's own numbers: no turn, no alpha, no colour profile, one frame."""
    adjusted = {"icc_profile", "gamma", "chromaticity"} & image.info.keys()
    plain = image.format in _PLAIN and image.mode in ("RGB", "L") and getattr(image, "n_frames", 1) == 1
    return plain and not adjusted and not image.has_transparency_data and _orientation(image) == 1


def _orientation(image: Any) -> int:
    from PIL import ExifTags, Image

    if image.format == "PNG" and not (image.filename and _ends_behind_pixels(Path(image.filename))):
        image.load()  # an orientation may stand behind the pixels
    # Of the EXIF alone, as browsers: Pillow looks in XMP too, where editors leave a turn that they have applied.
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    found = exif.get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _ends_behind_pixels(file: Path) -> bool:
    with file.open("rb") as stream:
        return ends_behind_pixels(stream)


def _require_scale(image: Any, where: object) -> None:
    tags = image.tag_v2 if image.format == "TIFF" else {}
    # What Pillow hands on as if it were 16 bits from black to white, or 8 bits without a sign.
    faults = {
        f"32-bit values, mode {image.mode}": image.mode in _UNSCALED,
        "16 bits, 0 is white": image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == 0,
        "12 bits": 12 in tags.get(_BITS, ()),
        "16 bits in planes": 16 in tags.get(_BITS, ()) and (tags.get(_PLANES), tags.get(_COMPRESSION)) == (2, 1),
        "numbers with a sign": 2 in tags.get(_SAMPLE_FORMAT, ()),
    }
    for got in (fault for fault, is_there in faults.items() if is_there):
        raise ImageError(
            "an image without a scale", where=where, got=got, expected="8 or 16 bits a channel, from black to white",
            fix="save it with 8 bits a channel",
        )  # fmt: skip


def _too_large(got: str, where: object) -> ImageError:
    return ImageError(
        "image too large to decode", where=where, got=got, expected=f"at most {MAX_PIXELS:,} pixels",
        fix="scale it down",
    )  # fmt: skip
