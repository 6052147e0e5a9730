"""Pictures as people see them, one decoder for all: upright, on white, 8 bits, RGB; and why a file is refused."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prefmill.core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 40_000_000  # a file of some kilobytes can claim more than a machine's memory holds
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "GIF": ".gif", "TIFF": ".tif", "BMP": ".bmp"}
_UNSCALED = ("I", "F")  # 32-bit integers and floats: nothing in the file says which value is white
_PLAIN = {"PNG", "JPEG", "WEBP"}
_OPENED_AS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")  # MPO is found behind JPEG


class ImageError(InputError):
    """An image file that cannot be used; `what` says why in a few words."""


def open_image(path: str | Path) -> Image:
    """The picture at `path` in RGB, 8 bits a channel; raises ImageError naming a file that cannot be used.

    Turned upright by its EXIF orientation; what is transparent is on white; 16 bits are scaled to 8 by 255 / 65535;
    CMYK, grey and palettes are converted; of an animation the first frame. More than `MAX_PIXELS` are not decoded.
    """
    with reading(path):
        return as_seen(_opened(path, path), path)


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the picture that `open_image` gives, from the head of the file; raises ImageError."""
    with reading(path):
        return upright_size(_opened(path, path))


def check_image(data: bytes, where: object, max_pixels: int = MAX_PIXELS) -> Image:
    """The image in `data`, decoded as it is stored and checked to its last byte; raises ImageError naming `where`."""
    with reading(where):
        _opened(io.BytesIO(data), where, max_pixels).verify()  # checksums to the end, which decoding does not need
        # Opened anew: after verify() Pillow's image is of no further use.
        image = _opened(io.BytesIO(data), where, max_pixels)
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
    from PIL import Image, ImageOps

    _require_scale(image, where)
    image.load()
    image = _eight_bits(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        # Put on white first: RGB alone would show the colours that stand under transparent pixels, often black.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright_size(image: Image) -> tuple[int, int]:
    """Width and height of an opened image once it is turned upright; Pillow gives a TIFF's so already."""
    lies = image.format != "TIFF" and _orientation(image) >= 5
    return (image.height, image.width) if lies else image.size


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """Turn all that Pillow raises for files that it cannot read into ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower bound follows
            yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ImageError("missing image", where=where, fix="put the file there, or take the row out") from None
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), where, MAX_PIXELS) from None
    except UnidentifiedImageError:
        raise ImageError(
            "not an image", where=where, expected="a whole PNG, JPEG, WebP, GIF, TIFF or BMP file",
            fix="make the image again, or take the row out",
        ) from None  # fmt: skip
    except (OSError, SyntaxError, ValueError) as error:
        got = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "make the image again, or take the row out"
        raise ImageError("damaged image", where=where, got=got, fix=fix) from None


def _opened(source: str | Path | io.BytesIO, where: object, max_pixels: int = MAX_PIXELS) -> Image:
    """The size is looked at before any pixel is decoded."""
    from PIL import Image

    # No other decoders: for EPS, Pillow starts Ghostscript on whatever the file says.
    image = Image.open(source, formats=_OPENED_AS)
    if image.width * image.height > max_pixels:
        raise _too_large(f"{image.width} x {image.height} pixels", where, max_pixels)
    return image


def _eight_bits(image: Image) -> Image:
    """Pillow's own conversion of 16-bit grey cuts every value over 255 to white."""
    if not image.mode.startswith("I;16"):
        return image
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    # In 32 bits, as 16 cannot hold the product; the half of 65535 that is added makes the division round.
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _is_plain(image: Image) -> bool:
    """Whether every browser shows the file's own numbers: no turn, no alpha, no colour profile, one frame."""
    adjusted = {"icc_profile", "gamma", "chromaticity"} & image.info.keys()
    plain = image.format in _PLAIN and image.mode in ("RGB", "L") and getattr(image, "n_frames", 1) == 1
    return plain and not adjusted and not image.has_transparency_data and _orientation(image) == 1


def _orientation(image: Image) -> int:
    from PIL import ExifTags

    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _require_scale(image: Image, where: object) -> None:
    if image.mode in _UNSCALED:
        raise ImageError(
            "an image without a scale", where=where, got=f"32-bit values, mode {image.mode}",
            expected="8 or 16 bits a channel", fix="save it with 8 bits a channel",
        )  # fmt: skip


def _too_large(got: str, where: object, max_pixels: int) -> ImageError:
    return ImageError(
        "image too large to decode", where=where, got=got, expected=f"at most {max_pixels:,} pixels",
        fix="scale it down",
    )  # fmt: skip
