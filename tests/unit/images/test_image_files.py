"""Image files: what is wrong with one is said before anything is decoded from it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from prefmill.core.files import copy_once
from prefmill.images.files import inspect_image
from prefmill.store.pictures import ImageError, image_size, open_image
from tests.e2e.image_artifacts import bomb, draw


def test_a_good_image(tmp_path: Path) -> None:
    for name, suffix in (("a.png", ".png"), ("a.jpeg", ".jpg"), ("a.webp", ".webp")):
        facts = inspect_image(draw(tmp_path / name, 0, side=40))
        assert (facts.width, facts.height, facts.suffix) == (40, 40, suffix)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_cut_file_is_damaged_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    whole = draw(tmp_path / name, 0).read_bytes()
    for length in {0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 20}:
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(ImageError, match=r"damaged image|not an image"):
            inspect_image(tmp_path / name)


def test_a_bomb_is_not_decoded(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (50_000, 9_000):  # above and below the bound at which Pillow itself refuses
        with pytest.raises(ImageError, match="image too large to decode"):
            inspect_image(bomb(tmp_path / "b.png", side, side))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_missing_foreign_and_other_formats(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing image"):
        inspect_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="missing image"):
        inspect_image(tmp_path)
    (tmp_path / "a.png").write_text("a picture")
    with pytest.raises(ImageError, match="not an image"):
        inspect_image(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.ppm")
    with pytest.raises(ImageError, match="format that is not read"):
        inspect_image(tmp_path / "a.ppm")


def test_ours_are_linked_and_others_copied(tmp_path: Path) -> None:
    source = draw(tmp_path / "a.png", 0)
    copy_once(source, tmp_path / "x" / "ours.png", may_link=True)
    copy_once(source, tmp_path / "x" / "theirs.png", may_link=False)
    assert (tmp_path / "x" / "ours.png").samefile(source)
    assert not (tmp_path / "x" / "theirs.png").samefile(source)
    assert (tmp_path / "x" / "theirs.png").read_bytes() == source.read_bytes()
    copy_once(source, tmp_path / "x" / "theirs.png", may_link=False)  # done again after a kill


@pytest.mark.parametrize(
    ("name", "exif"),
    [
        ("a.webp", b"MX\0*\0\0\0\x08"),
        # The width as text (TIFF 6.0, page 34: a number), beside a turn by 90 degrees.
        ("a.jpg", b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\0\0\2\0\0\0\2a\0\0\0\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    ],
)
def test_a_picture_whose_exif_cannot_be_read_is_set_aside_by_name(tmp_path: Path, name: str, exif: bytes) -> None:
    """One of them ended the run with a traceback of Pillow."""
    Image.new("RGB", (4, 2)).save(tmp_path / name, exif=exif)
    for read in (inspect_image, open_image):
        with pytest.raises(ImageError, match=rf"damaged image[\s\S]*{name}"):
            read(tmp_path / name)


def oriented(file: Path, behind: bool) -> Path:
    """A PNG that lies on its side, says the chunk before its pixels or, as exiftool writes it, behind them."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 20)).save(file, exif=exif)
    data = file.read_bytes()
    start, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
    assert start < end
    file.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:] if behind else data)
    return file


@pytest.mark.parametrize("behind", [False, True])
def test_the_size_of_a_png_is_the_upright_ones_wherever_that_is_said(tmp_path: Path, behind: bool) -> None:
    file = oriented(tmp_path / "a.png", behind)
    assert image_size(file) == open_image(file).size == (20, 30)


def test_the_size_of_a_png_is_told_without_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow decodes them all for what may stand behind them: hours for the pictures of a large set."""
    file = draw(tmp_path / "a.png", 0, side=40)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    assert image_size(file) == (40, 40)
