"""A picture is the same array for the people who rate it and for every model that reads it."""

from __future__ import annotations

import http.client
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from prefmill.core.image_rows import GeneratedImage
from prefmill.demo.tiny_models import build
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.loading import load_tokenizer
from prefmill.families.causal.vision import ImageReader
from prefmill.families.causal.vision_families import open_reader
from prefmill.families.reward.data import PixelReader
from prefmill.families.reward.model import create_reward
from prefmill.families.reward.scoring import open_scorer
from prefmill.families.sdxl.encoding import load_pixels
from prefmill.images.answers import AnswerBook, Session
from prefmill.images.collection import GoodImage, Quarantine, SourceImage, check_images
from prefmill.images.grids import draw_grid
from prefmill.images.rating import plan_matchups, sharpness
from prefmill.images.rating_server import RatingServer
from prefmill.store.pictures import ImageError, image_size, open_image
from tests.conftest import REPOSITORY

ZOO = REPOSITORY.parent / "shared" / "cases" / "images"
GOOD = (
    "alpha.png", "animated.gif", "cmyk.jpg", "exif6.jpg", "grey.png", "palette.png", "sixteen_bit.png", "upright.jpg",
    "wide.png",
)  # fmt: skip
BAD = {"truncated.jpg": "damaged image", "not_an_image.png": "not an image", "bomb.png": "image too large to decode"}
TESTED_ELSEWHERE = {"prompts_comma.csv", "prompts_two_columns.csv", "ratings_surplus.csv", "torn_journal.log"}
Pixels = NDArray[np.uint8]


@pytest.fixture(autouse=True, scope="module")
def _zoo() -> None:
    if not ZOO.is_dir():
        pytest.skip("needs the cases beside the checkout (shared/cases/images)")


def test_every_file_of_the_zoo_has_a_test() -> None:
    """Tables are read in test_image_prompts.py, the journal in test_sweep_failures.py."""
    assert {path.name for path in ZOO.iterdir()} == {*GOOD, *BAD, *TESTED_ELSEWHERE}


def expected(name: str) -> Pixels:
    """The picture that a person sees, [H, W, 3], without the code under test."""
    stored = Image.open(ZOO / name)
    values = np.asarray(stored)
    if name == "alpha.png":
        share = values[..., 3:] / 255
        return np.rint(values[..., :3] * share + 255 * (1 - share)).astype(np.uint8)
    if name == "sixteen_bit.png":
        return np.repeat(np.rint(values / 65535 * 255).astype(np.uint8)[..., None], 3, axis=2)
    if name == "exif6.jpg":
        return np.rot90(values, -1)  # TIFF 6.0, tag 274: the stored first row is the right side
    if name in ("palette.png", "animated.gif"):
        palette = stored.getpalette()
        assert palette is not None
        return np.array(palette, dtype=np.uint8).reshape(-1, 3)[values]
    return np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 else np.asarray(stored.convert("RGB"))


@pytest.fixture
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The expected picture as a PNG that nobody can read in two ways."""
    target = tmp_path / "plain.png"
    Image.fromarray(np.ascontiguousarray(expected(request.node.callspec.params["name"]))).save(target)
    return target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[PixelReader, Any, ImageReader]:
    """What reads pictures for the reward model's training, its judging, and the vision-language model."""
    from transformers import CLIPModel, CLIPProcessor

    root = tmp_path_factory.mktemp("models")
    clip, language = build("clip", root / "clip"), build("qwen2_5_vl", root / "vl")
    processor = CLIPProcessor.from_pretrained(clip)
    create_reward(CLIPModel.from_pretrained(clip), 16, 0).save_pretrained(root / "reward")
    processor.save_pretrained(root / "reward")
    reader = open_reader(str(language), load_tokenizer(str(language)), ImageLimits())
    assert reader is not None
    return PixelReader(processor), open_scorer(root / "reward"), reader


def good_images(quarantine: Quarantine) -> dict[str, GoodImage]:
    sources = [
        SourceImage(f"p/{name}", "p", "a prompt", ZOO / name, name, f"images.csv:{name}") for name in (*GOOD, *BAD)
    ]
    return check_images(sources, quarantine)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RatingServer]:
    good = good_images(Quarantine())
    book = AnswerBook(tmp_path_factory.mktemp("page") / "answers.jsonl")
    session = Session(book, plan_matchups(good.values(), None, 0), ("overall",), 1, 0)
    with RatingServer(session, good, "t") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    book.close()


def shown(page: RatingServer, name: str) -> Image.Image:
    """The picture that the page sends, decoded as a browser would: no alpha, no turn, no second frame left to it."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    (address,) = (known for known, image in page._images.items() if image.source.image_id == f"p/{name}")
    connection.request("GET", f"/image/{address}", headers={"Cookie": f"prefmill_{page.port}=t"})
    reply = connection.getresponse()
    image = Image.open(io.BytesIO(reply.read()))
    assert reply.getheader("Content-Type") == Image.MIME[str(image.format)]
    connection.close()
    assert image.mode in ("RGB", "L")
    assert not image.getexif()
    return image.convert("RGB")


@pytest.mark.timing
@pytest.mark.parametrize("name", GOOD)
def test_every_stage_reads_the_picture_that_people_see(
    name: str, plain: Path, models: tuple[PixelReader, Any, ImageReader], page: RatingServer
) -> None:
    reward, score, language = models
    file, seen = ZOO / name, expected(name)
    assert np.array_equal(np.asarray(open_image(file)), seen)
    assert image_size(file) == seen.shape[1::-1]
    assert np.array_equal(np.asarray(shown(page, name)), seen)
    assert torch.equal(reward.read([(file, None)]), reward.read([(plain, None)]))
    assert np.array_equal(score(["a prompt"], [file]), score(["a prompt"], [plain]))
    for ours, theirs in zip(load_pixels(file, (64, 64), False), load_pixels(plain, (64, 64), False), strict=True):
        assert torch.equal(ours, theirs)
    assert language.grid(str(file)) == language.grid(str(plain))
    assert torch.equal(language.pixels([str(file)])["pixel_values"], language.pixels([str(plain)])["pixel_values"])
    assert np.array_equal(sharpness(["a prompt"], [file]), sharpness(["a prompt"], [plain]))
    assert np.array_equal(grid_of(file), grid_of(plain))


def grid_of(file: Path) -> Pixels:
    """The report's grid with one picture, `file`."""
    row = GeneratedImage(
        image_id="p/0", prompt_id="p", prompt="a prompt", seed=0, file=f"base/{file.name}", width=1, height=1, sha256=""
    )
    return np.asarray(draw_grid(file.parent.parent, [[row]], [file.parent.name]))[22:]  # below the side's name


def test_a_turned_photo_is_the_upright_one() -> None:
    turned, upright = (np.asarray(open_image(ZOO / name)).astype(int) for name in ("exif6.jpg", "upright.jpg"))
    assert np.abs(turned - upright).mean() < 4  # of 255: two JPEG encodings


def test_files_that_cannot_be_read_are_set_aside_by_name_before_anything_is_trained() -> None:
    quarantine = Quarantine()
    good = good_images(quarantine)
    assert sorted(good) == sorted(f"p/{name}" for name in GOOD)
    assert {(row["image_id"], row["reason"]) for row in quarantine.rows} == {(f"p/{n}", why) for n, why in BAD.items()}
    assert (good["p/exif6.jpg"].width, good["p/exif6.jpg"].height) == (96, 64)


@pytest.mark.parametrize("name", BAD)
def test_models_refuse_what_cannot_be_read(name: str, models: tuple[PixelReader, Any, ImageReader]) -> None:
    reward, score, language = models
    readers = (
        lambda: reward.read([(ZOO / name, None)]), lambda: score(["a prompt"], [ZOO / name]),
        lambda: load_pixels(ZOO / name, (64, 64), False), lambda: language.pixels([str(ZOO / name)]),
    )  # fmt: skip
    for read in readers:
        with pytest.raises(ImageError, match=rf"{BAD[name]}[\s\S]*{name}[\s\S]*fix: +\w+"):
            read()


def test_values_without_a_scale_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(ImageError, match=r"an image without a scale[\s\S]*depth\.tif"):
        open_image(tmp_path / "depth.tif")
