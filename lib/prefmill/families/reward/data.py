"""Image pairs for a reward model: read and checked, gathered by prompt, and as tensors."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from prefmill.core.errors import InputError
from prefmill.core.image_rows import HEADS, ImagePair
from prefmill.store.jsonl import read_jsonl
from prefmill.store.pictures import open_image
from prefmill.training.data import Pair

PAIRS = "pairs.jsonl"
Half = Literal["all", "policy", "judge"]
Labelled = tuple[str, Tensor, Tensor, Tensor]
WeightedT = TypeVar("WeightedT", bound=Any)  # a dataclass with a `weight`
Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the image


@dataclass(frozen=True)
class LabelledPair:
    """Two images of a prompt; `labels` [K] in [0, 1] are NaN where nobody said, for the heads in their order."""

    pair_id: str
    prompt_id: str
    prompt: str
    preferred: Path
    rejected: Path
    labels: tuple[float, ...]
    weight: float
    split: str


@dataclass(frozen=True)
class ImageGroup:
    """A prompt, its distinct images, and its pairs: by their places among the images, and as they were read."""

    prompt_id: str
    prompt: str
    images: tuple[Path, ...]
    pairs: tuple[Pair, ...]
    rows: tuple[LabelledPair, ...]


def read_pairs(folder: Path, overall_for_missing: bool = False) -> list[LabelledPair]:
    """The pairs of an image_pairs artifact; those without a label on any head are left out.

    With `overall_for_missing` a head nobody answered for takes the rater's overall choice. Raises InputError for a
    row with a missing key, a label outside [0, 1] or a weight that is not above 0, and when no pair is left.
    """
    path = folder / PAIRS
    rows = [
        _labelled(row, folder, f"{path}:{number}", overall_for_missing)
        for number, row in enumerate(read_jsonl(path), 1)
    ]
    kept = [row for row in rows if not all(map(math.isnan, row.labels))]
    if not kept:
        raise InputError(
            "no pair has a label that a head could learn", where=path, got=f"{len(rows)} pairs",
            expected=f"a label on one of {', '.join(HEADS)}",
            fix="rate these dimensions, or set overall_for_missing=true where only the overall choice is known",
        )  # fmt: skip
    return kept


def counted_alike(pairs: Sequence[WeightedT]) -> list[WeightedT]:
    """Pairs that train or are evaluated together, with weights that average 1: steps and losses keep their size."""
    mean = sum(pair.weight for pair in pairs) / max(1, len(pairs))
    return [replace(pair, weight=pair.weight / mean) for pair in pairs]


def in_half(prompt_id: str, half: Half) -> bool:
    """Whether a prompt belongs to a half; `policy` and `judge` share none, whatever other prompts there are."""
    if half == "all":
        return True
    # By a hash with a prefix of its own: independent of the split, which is a hash of the prompt too.
    is_judges = hashlib.sha256(f"half:{prompt_id}".encode()).digest()[0] % 2 == 1
    return is_judges == (half == "judge")


def flip_by_coin(rows: Sequence[LabelledPair], seed: int) -> list[LabelledPair]:
    """Every pair with its labels turned round by a coin of (seed, pair): a control that leaves nothing to learn."""
    # 1 - nan is nan: what nobody said stays unsaid.
    turned = (replace(row, labels=tuple(1 - label for label in row.labels)) for row in rows)
    return [other if coin(seed, row.pair_id) else row for row, other in zip(rows, turned, strict=True)]


def coin(seed: int, pair_id: str) -> bool:
    """Heads or tails, by the pair and not by its place."""
    # Seeded by text, which random hashes with SHA-512: hash() differs from process to process.
    return random.Random(f"{seed}:{pair_id}").random() < 0.5


def group_pairs_by_prompt(rows: Sequence[LabelledPair]) -> list[ImageGroup]:
    """The pairs by prompt, prompts in the order in which they first appear."""
    by_prompt: dict[str, list[LabelledPair]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    return [_group(held) for held in by_prompt.values()]


class PixelReader:
    """Images as a CLIP processor's tensors [3, H, W]; with a crop, the same part of every image of a prompt."""

    def __init__(self, processor: Any, crop_scale: float = 1.0, seed: int = 0) -> None:
        self.processor, self.crop_scale, self.seed = processor, crop_scale, seed

    def read(self, parts: Sequence[tuple[Path, Box | None]]) -> Tensor:
        """Images [N, 3, H, W]: of each path the part `box`, together, as every call of a processor has its price."""
        images = [_part(open_image(path), box) for path, box in parts]
        pixels: Tensor = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels

    def crop(self, prompt_id: str, epoch: int) -> Box | None:
        """The part of a prompt's images that an epoch shows: `crop_scale` to 1 of each side; None is all."""
        if self.crop_scale >= 1:
            return None
        draw = random.Random(f"{self.seed}:{prompt_id}:{epoch}")
        side = draw.uniform(self.crop_scale, 1)
        left, top = draw.uniform(0, 1 - side), draw.uniform(0, 1 - side)
        return left, top, left + side, top + side

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [P, T], filled up or cut to what CLIP reads."""
        # All of one width: what else is in a batch changes no text embedding.
        text = self.processor.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        return {name: text[name] for name in ("input_ids", "attention_mask")}


class PairPreferenceDataset(Dataset[Labelled]):
    """Items are (prompt, preferred image [3, H, W], rejected image [3, H, W], labels [K]).

    A label is the probability in [0, 1] that the preferred image is the better one on that head's dimension, NaN where
    nobody said. The sides come as the rows name them; whoever measures has to randomise their order.
    """

    def __init__(self, rows: Sequence[LabelledPair], reader: PixelReader) -> None:
        self.rows, self.reader = rows, reader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Labelled:
        row = self.rows[index]
        labels = torch.tensor(row.labels, dtype=torch.float32)
        preferred, rejected = self.reader.read([(row.preferred, None), (row.rejected, None)])
        return row.prompt, preferred, rejected, labels


def _part(image: Image, box: Box | None) -> Image:
    if box is None:
        return image
    width, height = image.size
    left, top, right, bottom = box
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


def _group(rows: Sequence[LabelledPair]) -> ImageGroup:
    places: dict[Path, int] = {}
    for row in rows:
        # An image that is in several pairs gets one place, and so one pass through CLIP.
        for path in (row.preferred, row.rejected):
            places.setdefault(path, len(places))
    pairs = tuple(Pair(row.pair_id, places[row.preferred], places[row.rejected]) for row in rows)
    return ImageGroup(rows[0].prompt_id, rows[0].prompt, tuple(places), pairs, tuple(rows))


def _labelled(row: ImagePair, folder: Path, where: str, overall_for_missing: bool) -> LabelledPair:
    try:
        given = row["labels"]
        other = given.get("overall") if overall_for_missing else None
        labels = [other if given.get(name) is None else given[name] for name in HEADS]
        weight = float(row["weight"])
        found = LabelledPair(
            row["pair_id"], row["prompt_id"], row["prompt"], folder / row["preferred"], folder / row["rejected"],
            tuple(math.nan if label is None else float(label) for label in labels), weight, row["split"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("not an image pair", where=where, got=repr(error), fix="rerun build_image_pairs") from None
    if any(not (math.isnan(label) or 0 <= label <= 1) for label in found.labels):
        raise InputError("a label is no probability", where=where, got=given, expected="0 to 1", fix="correct the row")
    # Not `weight <= 0`, which is false for nan too.
    if not weight > 0:
        raise InputError("a pair's weight must be above 0", where=where, got=weight, fix="correct the row")
    return found
