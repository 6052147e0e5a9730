"""Image pairs with a known answer: crops of photographs against degraded copies of them."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from image_artifacts import publish_as
from PIL import Image, ImageFilter

from prefmill.core.artifact import Artifact
from prefmill.core.image_rows import HEADS, ImagePair
from prefmill.store.jsonl import write_jsonl

SIDE = 32  # what the tiny CLIP sees: a smaller picture of the whole would hide what was done to it


def blurred(image: Image.Image, draw: random.Random) -> Image.Image:
    """Out of focus."""
    return image.filter(ImageFilter.GaussianBlur(draw.uniform(1.5, 2.5)))


def compressed(image: Image.Image, draw: random.Random) -> Image.Image:
    """Saved as a JPEG of poor quality."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=draw.randint(4, 8))
    return Image.open(stream).convert("RGB")


def noisy(image: Image.Image, draw: random.Random) -> Image.Image:
    """With a sensor's noise."""
    values = np.random.default_rng(draw.randrange(2**32)).normal(0, draw.uniform(30, 50), (*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image) + values).clip(0, 255).astype(np.uint8))


DEGRADED = {"blur": blurred, "jpeg": compressed, "noise": noisy}


def make_photo_pairs(
    folder: Path, photos: Mapping[str, tuple[Path, str]], held_out: Sequence[str], crops: int, seed: int = 0
) -> Artifact:
    """An image_pairs artifact of `crops` crops of every photograph; those of `held_out` are its test split.

    A crop is a prompt of its own, `<name>-<number>`, with the photograph's description.
    """
    rows: list[ImagePair] = []
    for name, (path, prompt) in sorted(photos.items()):
        photo = Image.open(path).convert("RGB")
        for number in range(crops):
            rows += [
                _pair(folder, name, prompt, number, kind, _crop(photo, name, number, seed), seed) for kind in DEGRADED
            ]
    for row in rows:
        row["split"] = "test" if row["prompt_id"].rpartition("-")[0] in held_out else "train"
    write_jsonl(folder / "pairs.jsonl", rows)
    return publish_as(folder, "image_pairs")


def write_photo_ratings(
    folder: Path, photos: Mapping[str, tuple[Path, str]], crops: int, kinds: Sequence[str], seed: int = 0
) -> None:
    """The same crops as a folder of somebody's own: images.csv, and ratings.csv of one rater who sees what was done.

    All crops of a photograph have its description as their prompt, so that they come into one split.
    """
    images: list[tuple[str, str]] = []
    ratings: list[tuple[str, str, str, str, str]] = []
    for name, (path, prompt) in sorted(photos.items()):
        photo = Image.open(path).convert("RGB")
        for number in range(crops):
            crop = _crop(photo, name, number, seed)
            made = [_pair(folder, name, prompt, number, kind, crop, seed) for kind in kinds]
            images += [(prompt, file) for file in (made[0]["preferred"], *(row["rejected"] for row in made))]
            for row in made:
                turned = random.Random(f"{seed}:{row['pair_id']}").random() < 0.5
                sides = (row["rejected"], row["preferred"]) if turned else (row["preferred"], row["rejected"])
                choice = "right" if turned else "left"
                ratings += [(*sides, "ada", dimension, choice) for dimension in (*HEADS, "overall")]
    for file, header, rows in (
        ("images.csv", ("prompt", "file"), images),
        ("ratings.csv", ("left", "right", "rater", "dimension", "choice"), ratings),
    ):
        with (folder / file).open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])


def _crop(photo: Image.Image, name: str, number: int, seed: int) -> Image.Image:
    """A square of `SIDE` with something in it: the liveliest of a few places."""
    draw = random.Random(f"{seed}:{name}:{number}")
    corners = [(draw.randrange(photo.width - SIDE), draw.randrange(photo.height - SIDE)) for _ in range(4)]
    crops = [photo.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
    return max(crops, key=lambda crop: float(np.asarray(crop, dtype=float).std()))


def _pair(folder: Path, name: str, prompt: str, number: int, kind: str, crop: Image.Image, seed: int) -> Any:
    original, worse = f"images/{name}/{number}.png", f"images/{name}/{number}-{kind}.png"
    (folder / original).parent.mkdir(parents=True, exist_ok=True)
    crop.save(folder / original)
    DEGRADED[kind](crop, random.Random(f"{seed}:{name}:{number}:{kind}")).save(folder / worse)
    labels = dict.fromkeys(HEADS, 1.0)
    return ImagePair(
        pair_id=f"{name}-{number}-{kind}", prompt_id=f"{name}-{number}", prompt=prompt, preferred=original,
        rejected=worse, labels={**labels}, weight=1.0, split="train",
    )  # fmt: skip
