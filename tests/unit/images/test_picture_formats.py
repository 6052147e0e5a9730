"""Formats and colours of pictures from phones, browsers and generators: read as people see them, or refused by name."""

from __future__ import annotations

import io
import random
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from prefmill.images.files import inspect_image
from prefmill.store import pictures
from prefmill.store.pictures import ImageError, image_size, open_image, shown_bytes

P3, SRGB = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
D50, D65 = np.array([0.9642, 1.0, 0.8249]), np.array([0.95047, 1.0, 1.08883])


XMP_TURN = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def colours(side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def to_xyz(primaries: Any) -> Any:
    """Linear RGB to XYZ under D65, from the primaries' chromaticities (SMPTE RP 177)."""
    x, y = np.array(primaries).T
    columns = np.stack([x / y, np.ones(3), (1 - x - y) / y])
    return columns * np.linalg.solve(columns, D65)


def p3_profile() -> bytes:
    """An ICC profile of Display P3, version 4: a matrix under D50 and sRGB's curve (ICC.1:2010, sections 7 to 10)."""
    adapted = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ D65)) @ BRADFORD @ to_xyz(P3)

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {name: b"XYZ \0\0\0\0" + fixed(*values) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), adapted.T)}  # noqa: B905
    tags |= {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    place, table = 132 + 12 * len(tags), struct.pack(">I", len(tags))
    for name, value in tags.items():
        table += name + struct.pack(">II", place, len(value))
        place += len(value)
    head = struct.pack(">I4xI", place, 0x04000000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + fixed(*D50)
    return head.ljust(128, b"\0") + table + b"".join(tags.values())


def in_srgb(values: Any) -> Any:
    """Display P3's numbers as sRGB's, by the published formulas in float64."""
    values = values / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(P3)).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.avif"])
def test_colours_are_those_of_the_profile_for_people_and_models(tmp_path: Path, name: str) -> None:
    options = {"icc_profile": p3_profile(), **({"quality": 100, "subsampling": "4:4:4"} if name == "a.avif" else {})}
    file = saved(tmp_path / name, colours(), **options)
    stored, ours = np.asarray(Image.open(file).convert("RGB")).astype(float), np.asarray(open_image(file)).astype(float)
    assert np.abs(ours - in_srgb(stored)).max() < 1.5
    assert np.abs(ours - stored).max() > 30
    sent = Image.open(io.BytesIO(shown_bytes(file)[0]))
    assert "icc_profile" not in sent.info  # a browser would apply it once more
    assert np.array_equal(np.asarray(sent), ours)


def test_a_profile_keeps_alpha_and_one_that_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 200, 100, 0))
    assert open_image(saved(tmp_path / "a.png", clear, icc_profile=p3_profile())).getpixel((0, 0)) == (255, 255, 255)
    for number, (image, profile) in enumerate(((colours(), b"junk"), (colours().convert("L"), p3_profile()))):
        file = saved(tmp_path / f"{number}.png", image, icc_profile=profile)
        assert np.array_equal(np.asarray(open_image(file)), np.asarray(image.convert("RGB")))
        assert "icc_profile" not in Image.open(io.BytesIO(shown_bytes(file)[0])).info


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png"])
@pytest.mark.parametrize("camera", [False, True])
def test_a_turn_that_only_xmp_tells_is_none_as_in_browsers(tmp_path: Path, name: str, camera: bool) -> None:
    """Pillow turns such pictures, and whoever reads ours may look for a turn once more, as transformers does."""
    image, exif, told = colours().crop((0, 0, 16, 8)), Image.Exif(), PngInfo()
    exif.update({0x10F: "a camera"} if camera else {})
    told.add_itxt("XML:com.adobe.xmp", XMP_TURN.decode())
    file = saved(tmp_path / name, image, xmp=XMP_TURN, exif=exif, pnginfo=told)
    assert ImageOps.exif_transpose(Image.open(file)).size == (8, 16)
    assert image_size(file) == (16, 8)
    assert ImageOps.exif_transpose(open_image(file)).size == (16, 8)
    assert np.array_equal(open_image(file), np.asarray(Image.open(file)))


def test_avif_is_read_upright_on_white_and_its_first_frame(tmp_path: Path) -> None:
    turn = Image.Exif()
    turn[0x112] = 6
    image = colours(4).resize((48, 32), Image.Resampling.BICUBIC)  # smooth: AVIF halves the colours' resolution
    plain, turned = (
        saved(tmp_path / "a.avif", image, quality=90),
        saved(tmp_path / "t.avif", image, quality=90, exif=turn),
    )
    assert np.array_equal(np.asarray(open_image(turned)), np.rot90(np.asarray(open_image(plain)), -1))
    assert np.abs(np.asarray(open_image(plain)).astype(int) - np.asarray(image)).mean() < 6
    assert (image_size(turned), inspect_image(turned).suffix) == ((32, 48), ".avif")
    # As PNG: other decoders of AVIF round otherwise, and apply colours that the file names by a number alone.
    assert shown_bytes(plain)[1] == "image/png"
    assert open_image(saved(tmp_path / "c.avif", Image.new("RGBA", (8, 8), "#f000"))).getpixel((4, 4)) == (255,) * 3
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    moving = saved(tmp_path / "m.avif", frames[0], save_all=True, append_images=frames[1:])
    assert open_image(moving).getpixel((4, 4)) == (255, 255, 255)


def test_an_avif_that_claims_to_be_large_is_not_decoded(tmp_path: Path) -> None:
    data = saved(tmp_path / "a.avif", colours()).read_bytes()
    size = b"ispe" + struct.pack(">4xII", 16, 16)
    (tmp_path / "a.avif").write_bytes(data.replace(size, b"ispe" + struct.pack(">4xII", 9000, 9000)))
    with pytest.raises(ImageError, match="too large to decode"):
        inspect_image(tmp_path / "a.avif")


@pytest.mark.parametrize("name", ["a.avif", "a.jp2", "a.tif", "a.webp"])
def test_bytes_that_were_lost_or_changed_never_end_a_run(tmp_path: Path, name: str) -> None:
    draw, file, faults = random.Random(0), tmp_path / name, 0
    whole = saved(file, colours()).read_bytes()
    for number in range(150):
        data = bytearray(whole[: draw.randrange(1, len(whole))] if number % 3 == 0 else whole)
        data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data)
        try:
            inspect_image(file)
        except ImageError:
            faults += 1
    assert faults > 50


@pytest.mark.parametrize(
    ("head", "what", "named"),
    [
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1", "a format that is not read", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a format that is not read", "JPEG XL"),
        (b"\xff\x0a\xcb\x40", "a format that is not read", "JPEG XL"),
        (b"<?xml version='1.0'?>\n<!-- a drawing -->\n<svg xmlns=", "a format that is not read", "SVG"),
        (b"\0\0\0\x18ftypcrx \0\0", "a format that is not read", "a camera's raw file"),
        (b"8BPS\0\1", "a format that is not read", "Photoshop"),
        (b"", "not an image", "an empty file"),
        (b"\n<!DOCTYPE html><title>404", "not an image", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image", "git lfs pull"),
        (b"\0\0\0 ftypavif\0\0", "damaged image", "cut"),
        (b"\x89PNG\r\n", "damaged image", "cut"),
    ],
)
def test_other_files_are_named(tmp_path: Path, head: bytes, what: str, named: str) -> None:
    (tmp_path / "a.png").write_bytes(head)
    with pytest.raises(ImageError, match=rf"{what}[\s\S]*a\.png[\s\S]*{named}"):
        open_image(tmp_path / "a.png")


def test_heic_is_read_where_its_decoder_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for pillow-heif, which is not installed here: what it cannot decode is damaged."""

    class Decoder(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            if not self.fp.read().endswith(b"whole"):  # type: ignore[union-attr]
                raise SyntaxError("cut")
            self._size, self._mode, self.tile = (2, 1), "RGB", []
            self.im = Image.new("RGB", (2, 1), (255, 0, 0)).im

    def register() -> None:
        Image.register_open("HEIF", Decoder, lambda head: head[4:8] == b"ftyp")

    file = tmp_path / "phone.heic"
    file.write_bytes(b"\0\0\0\x1cftypheic whole")
    with pytest.raises(ImageError, match=r"not read[\s\S]*HEIC[\s\S]*pip install pillow-heif"):
        open_image(file)
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    pictures._opened_as.cache_clear()
    try:
        assert open_image(file).getpixel((1, 0)) == (255, 0, 0)
        assert (inspect_image(file).suffix, shown_bytes(file)[1]) == (".heic", "image/png")
        file.write_bytes(b"\0\0\0\x1cftypheic cut")
        with pytest.raises(ImageError, match="damaged image"):
            open_image(file)
    finally:
        pictures._opened_as.cache_clear()


def test_of_several_pages_the_first_and_never_the_preview_of_a_raw_file(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert open_image(saved(tmp_path / "p.tif", pages[0], save_all=True, append_images=pages[1:])).getpixel((0, 0)) == (
        255, 0, 0,
    )  # fmt: skip
    for tag, value in ((254, 1), (50706, b"\1\4\0\0")):
        tags = ImageFileDirectory_v2()
        tags[tag] = value
        tags.tagtype[tag] = 4 if tag == 254 else 1
        with pytest.raises(ImageError, match=r"format that is not read[\s\S]*raw file"):
            open_image(saved(tmp_path / f"{tag}.tif", pages[0], tiffinfo=tags))


@pytest.mark.parametrize(
    ("codes", "told"), [((12, 13), "Display P3"), ((9, 16), "HDR, PQ"), ((9, 18), "HDR, HLG"), ((5, 5), "other"),
                        ((1, 13), None), ((1, 1), None)],
)  # fmt: skip
def test_colours_that_a_browser_shows_and_pillow_passes_over_are_refused(
    tmp_path: Path, codes: tuple[int, int], told: str | None
) -> None:
    """PNG's cICP chunk (third edition, 11.3.2.6; numbers of ITU-T H.273): raters saw what no model reads."""
    plain = saved(tmp_path / "plain.png", colours()).read_bytes()
    # Behind what a generator writes of its settings, which is long and may hold any word.
    before = chunk(b"tEXt", b"workflow\0" + b"cICP\x09\x10 " * 500) + chunk(b"cICP", bytes([*codes, 0, 1]))
    place, file = plain.index(b"IDAT") - 4, tmp_path / "coded.png"
    file.write_bytes(plain[:place] + before + plain[place:])
    if told is None:
        assert np.array_equal(np.asarray(open_image(file)), np.asarray(open_image(tmp_path / "plain.png")))
        return
    for read in (open_image, shown_bytes, inspect_image, image_size):
        with pytest.raises(
            ImageError, match=rf"colours that are not read[\s\S]*colours {codes[0]}, {codes[1]}: {told}"
        ):
            read(file)


@pytest.mark.parametrize(("codes", "said"), [((9, 16), "HDR, PQ"), ((12, 13), "Display P3"), ((2, 2), None)])
def test_an_avif_says_its_colours_by_the_same_numbers(tmp_path: Path, codes: tuple[int, int], said: str | None) -> None:
    file = saved(tmp_path / "a.avif", colours(), quality=90)
    plain, data = np.asarray(open_image(file)), file.read_bytes()
    place = data.index(b"colrnclx") + 8
    assert struct.unpack_from(">HH", data, place) == (1, 13)  # as Pillow writes it
    file.write_bytes(data[:place] + struct.pack(">HH", *codes) + data[place + 4 :])
    if said is None:
        assert np.array_equal(np.asarray(open_image(file)), plain)
    else:
        with pytest.raises(ImageError, match=rf"colours that are not read[\s\S]*{said}"):
            open_image(file)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, rows: list[bytes], *more: bytes) -> bytes:
    """A PNG of 8 columns, by its specification (third edition, 11.2): Pillow writes few depths."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, len(rows), depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "clear", "levels"),
    [
        # Rows of two levels each, the second one transparent: its colour is in the depth of the file (11.3.1.1).
        (2, 0, [b"\xaa\xaa", b"\x55\x55"], b"\0\1", (170, 255)),
        (4, 0, [b"\xaa" * 4, b"\x55" * 4], b"\0\5", (170, 255)),
        (16, 0, [b"\xaa\xaa" * 8, b"\x12\x34" * 8], b"\x12\x34", (170, 255)),
        (16, 2, [b"\xaa" * 48, b"\x12\x34\x56\x78\x9a\xbc" * 8], b"\x12\x34\x56\x78\x9a\xbc", (170, 255)),
        # Only that value: its neighbour, which is the same in 8 bits, is not transparent.
        (16, 0, [b"\xaa\xaa" * 8, b"\x12\x33" * 8], b"\x12\x34", (170, 18)),
    ],
)  # fmt: skip
def test_a_transparent_colour_is_white_at_every_depth(
    tmp_path: Path, depth: int, colour: int, rows: list[bytes], clear: bytes, levels: tuple[int, int]
) -> None:
    (tmp_path / "a.png").write_bytes(png(depth, colour, rows, chunk(b"tRNS", clear)))
    inspect_image(tmp_path / "a.png")
    assert [open_image(tmp_path / "a.png").getpixel((3, y)) for y in (0, 1)] == [(level,) * 3 for level in levels]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_of_grey_keep_their_profile(tmp_path: Path, name: str) -> None:
    """A profile of grey as printers have it (ICC.1:2010, 9.2.1: a curve alone): the same as in 8 bits."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256)  # gamma 1
    white = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in D50))
    table = struct.pack(">I", 2) + b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, len(curve))
    head = struct.pack(">I4xI", 176 + len(curve), 0x04000000) + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    profile = (head + white[8:]).ljust(128, b"\0") + table + white + curve
    levels = np.arange(256, dtype=np.uint16)[None].repeat(8, 0)
    linear = levels[0] / 255
    as_srgb = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    for values in (levels.astype(np.uint8), levels * 257):
        shown = np.asarray(open_image(saved(tmp_path / name, Image.fromarray(values), icc_profile=profile)))[0, :, 0]
        assert np.abs(shown - as_srgb)[20:].max() < 1.5


@pytest.mark.parametrize(
    ("bits", "white", "sign", "said"),
    [(16, 0, 1, "0 is white"), (12, 1, 1, "12 bits"), (8, 1, 2, "numbers with a sign"), (16, 1, 1, None)],
)
def test_a_tiff_whose_values_pillow_takes_for_others_is_refused(
    tmp_path: Path, bits: int, white: int, sign: int, said: str | None
) -> None:
    """TIFF 6.0: a negative of 16 bits stays one, 12 bits are almost black, -1 is white: in every stage."""
    tags = [(256, 3, 4), (257, 3, 2), (258, 3, bits), (259, 3, 1), (262, 3, white), (273, 4, 8), (278, 3, 2),
            (279, 4, bits), (339, 3, sign)]  # fmt: skip
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag, 1, value) for *tag, value in tags)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + bits) + b"\xff" * bits + ifd + bytes(4))
    if said is None:
        assert open_image(tmp_path / "a.tif").getpixel((0, 0)) == (255, 255, 255)
        return
    with pytest.raises(ImageError, match=rf"without a scale[\s\S]*{said}"):
        open_image(tmp_path / "a.tif")


def test_16_bits_in_uncompressed_planes_are_refused(tmp_path: Path) -> None:
    """TIFF 6.0, page 38: Pillow takes the halves of such values for 8-bit ones of two pixels."""
    rest = struct.pack("<4H3I3I", 16, 16, 16, 0, 8, 136, 264, 128, 128, 128)
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 392), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, 400),
            (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 3, 412), (284, 3, 1, 2)]  # fmt: skip
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 424) + bytes(384) + rest + ifd)
    with pytest.raises(ImageError, match=r"without a scale[\s\S]*16 bits in planes[\s\S]*save it with 8 bits"):
        open_image(tmp_path / "a.tif")
