"""A picture is read as a person sees it: upright, and what is transparent on white."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers import LlavaConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prefmill.core.errors import InputError
from prefmill.demo.tiny_models import build
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.loading import load_tokenizer
from prefmill.families.causal.vision import ImageReader, with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.store.pictures import open_image

SEEN = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
# What turns the picture back, by orientation (TIFF 6.0, tag 274): a camera that stored it so says how to hold it.
STORED = {
    1: SEEN, 2: SEEN[:, ::-1], 3: SEEN[::-1, ::-1], 4: SEEN[::-1],
    5: SEEN.swapaxes(0, 1), 6: np.rot90(SEEN), 7: SEEN[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(SEEN, -1),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen2_5_vl", tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def reader(tiny_vl: Path) -> ImageReader:
    found = open_reader(str(tiny_vl), load_tokenizer(str(tiny_vl)), ImageLimits())
    assert found is not None
    return found


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_a_turned_picture_is_read_upright(
    orientation: int, ending: str, reader: ImageReader, tiny_vl: Path, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = str(tmp_path / f"turned.{ending}")
    Image.fromarray(STORED[orientation]).save(path, exif=exif)
    assert np.array_equal(np.asarray(open_image(path)), SEEN)
    assert reader.grid(path) == (1, 4, 8)
    pixels, grids = reader.pixels([path]).values()
    expected = Qwen2VLImageProcessorPil.from_pretrained(tiny_vl)(images=[Image.fromarray(SEEN)], return_tensors="pt")
    assert grids.tolist() == expected["image_grid_thw"].tolist()
    assert (pixels == expected["pixel_values"]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    path = str(tmp_path / "clear.png")
    shown = Image.new("RGBA", (8, 4), (10, 10, 10, 255))
    shown.paste((200, 200, 200, 0), (4, 0, 8, 4))  # a colour that nobody sees
    shown.convert(mode).save(path)
    assert np.asarray(open_image(path))[:, [0, 7]].tolist() == [[[10] * 3, [255] * 3]] * 4


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    path = str(tmp_path / "half.png")
    Image.new("RGBA", (2, 2), (0, 100, 255, 51)).save(path)  # a fifth: 0.2 c + 0.8 x 255
    assert np.asarray(open_image(path))[0, 0].tolist() == [204, 224, 255]


def test_a_prompt_is_collapsed_to_one_token_an_image(reader: ImageReader) -> None:
    image = reader.image_token
    assert reader.collapsed([1, image, image, image, 2, image, 3]) == [1, image, 2, image, 3]
    assert reader.collapsed([1, 2]) == [1, 2]


def test_without_files_for_images_text_is_read_and_an_image_refused(tiny_vl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_vl, folder, ignore=shutil.ignore_patterns("*processor_config.json"))
    reader = open_reader(str(folder), load_tokenizer(str(folder)), ImageLimits())
    assert reader is not None
    assert reader.encode([{"role": "user", "content": "a"}], "b")[1]
    assert reader.digest([[]])
    reader.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="image processor cannot be loaded"):
        reader.encode_prompt(with_images([{"role": "user", "content": "<image>"}], ["a.png"]))


def test_a_family_whose_images_are_not_known_has_no_reader(tiny_vl: Path, tmp_path: Path) -> None:
    """Its rows of text alone are trained."""
    LlavaConfig().save_pretrained(tmp_path)
    assert open_reader(str(tmp_path), load_tokenizer(str(tiny_vl)), ImageLimits()) is None
