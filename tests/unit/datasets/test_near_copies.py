"""Near copies against the windows that texts share, counted in plain Python."""

from __future__ import annotations

import random

import pytest

from prefmill.datasets.near_copies import NearCopies, sketch
from prefmill.datasets.occurrences import Files, fingerprint

LENGTH = 48


def windows(text: str) -> set[str]:
    starts = [place + 1 for place, letter in enumerate(text) if letter == " " and place < len(text) - LENGTH]
    return {text[start : start + LENGTH] for start in starts}


def in_common(one: str, other: str) -> float:
    return len(windows(one) & windows(other)) / len(windows(one) | windows(other))


def text_of(generator: random.Random, num_words: int = 300) -> str:
    return " ".join(f"w{generator.randrange(10_000)}" for _ in range(num_words))


def edited(text: str, share: float, generator: random.Random) -> str:
    return " ".join("edited" if generator.random() < share else word for word in text.split())


def found(one: str, other: str) -> bool:
    copies = NearCopies(Files())
    copies.add("train", one, fingerprint(one), "a", 1)
    copies.add("val", other, fingerprint(other), "b", 1)
    return bool(list(copies.shared("train", "val")))


@pytest.mark.parametrize("share", [0.003, 0.01, 0.03, 0.1])
def test_sketches_share_what_their_texts_do(share: float) -> None:
    """Of the least hashes of both together, a share like that of their windows is in both (Broder 1997)."""
    generator = random.Random(0)
    estimates, truths = [], []
    for _ in range(200):
        text = text_of(generator)
        other = edited(text, share, generator)
        one, two = set(sketch(text)), set(sketch(other))
        least = sorted(one | two)[:8]
        estimates.append(sum(value in one and value in two for value in least) / 8)
        truths.append(in_common(text, other))
    assert sum(estimates) / 200 == pytest.approx(sum(truths) / 200, abs=0.04)


def test_near_copies_are_found_and_others_are_not() -> None:
    generator = random.Random(1)
    texts = [text_of(generator) for _ in range(200)]
    close = [edited(text, 0.005, generator) for text in texts]
    far = [edited(text, 0.2, generator) for text in texts]
    assert sum(map(found, texts, close)) >= 196
    assert sum(map(found, texts, far)) <= 2
    assert found("\r\n".join(texts[0].upper().split()), texts[0])


def test_a_short_text_has_no_sketch() -> None:
    assert sketch("Fine.") == sketch("") == sketch("See my comments above, which say all that there is.") == []


def test_repeated_texts_and_several_copies_are_told_by_their_first_places() -> None:
    generator = random.Random(2)
    text, copies = text_of(generator), NearCopies(Files())
    copies.add("train", text_of(generator), 1, "a", 1)
    for line in (2, 3):  # a review stands in several rows
        copies.add("train", text, fingerprint(text), "a", line)
    copies.add("test", edited(text, 0.005, generator), 2, "b", 9)
    ((here, there),) = copies.shared("train", "test")
    assert (str(here), str(there)) == ("a:2", "b:9")
    assert list(copies.shared("train", "dev")) == []
