"""Image pairs to train on: read, weighted, and as the one group a pair is."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.image_rows import ImagePair, ImageSplit
from prefmill.store.jsonl import read_jsonl
from prefmill.training.data import Pair

PAIRS = "pairs.jsonl"


@dataclass(frozen=True)
class PairImages:
    """A pair as a group of two samples: `images` are the winner's and the loser's files and their sha256.

    A `held_out` one is seen as it is, whatever is changed in
    training: what is measured on it could not be compared.
    """

    pair_id: str
    prompt_id: str
    prompt: str
    images: tuple[Path, Path]
    digests: tuple[str, str]
    weight: float = 1.0
    soft_label: float | None = None
    held_out: bool = False

    @property
    def pairs(self) -> Sequence[Pair]:
        """The pair, by the places of its images."""
        return (Pair(self.pair_id, 0, 1),)

    @property
    def swapped(self) -> PairImages:
        """The pair with winner and loser exchanged."""
        return replace(self, images=self.images[::-1], digests=self.digests[::-1])


def read_image_pairs(artifact: Artifact, split: ImageSplit) -> list[PairImages]:
    """The pairs of a split; raises InputError naming the row for an image that is missing or a weight not above 0."""
    digests = {entry.path: entry.sha256 for entry in artifact.manifest.files}
    rows = enumerate(read_jsonl(artifact.file(PAIRS)), 1)
    where = str(artifact.path / PAIRS)
    found = ((f"{where}:{number}", row) for number, row in rows if row.get("split") == split)
    return [replace(_pair(row, artifact.path, digests, at), held_out=split != "train") for at, row in found]


def balance_labels(pairs: Sequence[PairImages], seed: int) -> Iterator[PairImages]:
    """The pairs with winner and loser drawn anew by `seed`, so that an image wins as often as it loses, to within one.

    Not each by a coin: a few more wins of one kind of image would move a model one way in every picture alike.
    """
    winners = dict(_walks(sorted(pairs, key=lambda pair: (pair.prompt_id, pair.pair_id)), random.Random(seed)))
    for pair in pairs:
        yield pair if winners[pair.pair_id] == pair.digests[0] else pair.swapped


def _walks(pairs: Sequence[PairImages], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Ids of pairs and the image that wins: random walks over all pairs as edges, the image that is left wins."""
    images = defaultdict[tuple[str, str], dict[str, PairImages]](dict)
    for pair in pairs:
        for digest in pair.digests:
            images[pair.prompt_id, digest][pair.pair_id] = pair
    order = draw.sample(list(images), len(images))
    # Euler's way: a walk from an image with an odd number of pairs ends at another, so that the rest return.
    for prompt, at in [*(image for image in order if len(images[image]) % 2), *order]:
        while ahead := images[prompt, at]:
            pair = ahead.pop(draw.choice(list(ahead)))
            yield pair.pair_id, at
            at = pair.digests[at == pair.digests[0]]
            del images[prompt, at][pair.pair_id]


def _pair(row: ImagePair, folder: Path, digests: dict[str, str], where: str) -> PairImages:
    try:
        files = (row["preferred"], row["rejected"])
        # Against the manifest, not the disk: its digests name the cached latents.
        absent = [name for name in files if name not in digests]
        weight = float(row["weight"])
        named = (str(row["pair_id"]), str(row["prompt_id"]), str(row["prompt"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("not an image pair", where=where, got=repr(error), fix="rerun build_image_pairs") from None
    if absent:
        raise InputError(
            "a pair's image is not in the artifact", where=where, got=absent[0], expected="a file of its manifest",
            fix="rerun build_image_pairs",
        )  # fmt: skip
    # Not `weight <= 0`, which is false for nan too.
    if not weight > 0:
        raise InputError("a pair's weight must be above 0", where=where, got=weight, fix="correct the row")
    paths = (folder / files[0], folder / files[1])
    return PairImages(*named, paths, (digests[files[0]], digests[files[1]]), weight)
