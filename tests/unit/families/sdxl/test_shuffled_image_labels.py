"""Image labels drawn anew for a control: wins and losses of every image are even, and only sides are exchanged."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from prefmill.families.sdxl.data import PairImages, balance_labels


def tournament(images: int, share: float = 1.0) -> list[PairImages]:
    """Pairs of three prompts' images, the brighter one first: all of them, or a share at random."""
    kept = random.Random(images)
    return [
        PairImages(f"{prompt}-{low}-{high}", prompt, "a scene", (Path(high), Path(low)), (high, low))
        for prompt in "abc"
        for low, high in combinations([f"image{number}" for number in range(images)], 2)
        if kept.random() < share
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("images", "share"), [(7, 1.0), (6, 1.0), (2, 1.0), (12, 0.4)])
def test_every_image_wins_as_often_as_it_loses(images: int, share: float, seed: int) -> None:
    """To within one, where its pairs are odd in number; whatever graph the pairs are, for each prompt by itself."""
    pairs = tournament(images, share)
    drawn = list(balance_labels(pairs, seed))
    net = Counter[tuple[str, str]]()
    met = Counter[tuple[str, str]]()
    for pair in drawn:
        net.update({(pair.prompt_id, pair.digests[0]): 1, (pair.prompt_id, pair.digests[1]): -1})
        met.update((pair.prompt_id, digest) for digest in pair.digests)
    assert {image: abs(net[image]) for image in met} == {image: count % 2 for image, count in met.items()}


def test_labels_follow_the_seed_alone_and_only_sides_are_exchanged() -> None:
    """Not the order of the rows, which is kept; two seeds draw other labels."""
    pairs = tournament(7)
    drawn = list(balance_labels(pairs, 1))
    assert [{pair, pair.swapped} for pair in drawn] == [{pair, pair.swapped} for pair in pairs]
    assert drawn[::-1] == list(balance_labels(pairs[::-1], 1))
    assert drawn != list(balance_labels(pairs, 2))
    swapped = sum(new != old for new, old in zip(drawn, pairs, strict=True)) / len(pairs)
    assert 0.2 < swapped < 0.8


def test_each_label_is_a_fair_coin_over_the_seeds() -> None:
    """Of 400 draws a pair is swapped in half, to within four standard errors."""
    pairs = tournament(5)
    swaps = Counter(
        pair.pair_id
        for seed in range(400)
        for pair, old in zip(balance_labels(pairs, seed), pairs, strict=True)
        if pair != old
    )
    assert all(abs(swaps[pair.pair_id] / 400 - 0.5) < 4 * 0.025 for pair in pairs), swaps
