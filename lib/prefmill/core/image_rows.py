"""The rows that the image stages exchange, one JSON object a line; paths are relative to the artifact of the row."""

from __future__ import annotations

from typing import Literal, TypedDict, get_args

ImageSplit = Literal["train", "val", "test"]
Dimension = Literal["spatial", "iconographic", "style", "fidelity", "material", "overall"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
HEADS: tuple[Dimension, ...] = DIMENSIONS[:5]
"""What a reward model has a head for; `overall` is the rater's own choice and stands beside them."""


class ImagePrompt(TypedDict):
    """A prompt; `prompt_id` is safe as a file name."""

    prompt_id: str
    prompt: str


class GeneratedImage(TypedDict):
    """An image of `images.jsonl`, at `file`; `image_id` is `<prompt_id>/<seed>`, `sha256` that of the file."""

    image_id: str
    prompt_id: str
    prompt: str
    seed: int
    file: str
    width: int
    height: int
    sha256: str


class Rating(TypedDict):
    """A line of `ratings.csv`: one rater's choice between two images of a prompt, on one dimension.

    `choice` is `left`, `right`, `tie` or `skip`; `left` and `right` are image ids as the rater saw them placed.
    """

    prompt_id: str
    left: str
    right: str
    rater: str
    dimension: Dimension
    choice: Literal["left", "right", "tie", "skip"]


class ImagePair(TypedDict):
    """A line of `pairs.jsonl`: two images of a prompt, whose `preferred` is the better one overall.

    `labels[d]` is the probability, in [0, 1], that `preferred` is the better one on dimension d; None where nobody
    said. `weight` > 0 counts the pair's share (1 / number of pairs of its prompt's ranking, or 1).
    """

    pair_id: str
    prompt_id: str
    prompt: str
    preferred: str
    rejected: str
    labels: dict[str, float | None]
    weight: float
    split: ImageSplit
