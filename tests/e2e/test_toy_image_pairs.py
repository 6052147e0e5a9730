"""toy_image_pairs: a fault a pair, three raters who see it, prompts held out, a source build_image_pairs reads."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from PIL import Image
from reward_artifacts import make_samples
from training_artifacts import content

from prefmill.core.image_rows import DIMENSIONS, HEADS
from prefmill.store.jsonl import read_jsonl


def test_what_it_writes(tmp_path: Path) -> None:
    made = make_samples(tmp_path / "a")
    pairs = list(read_jsonl(made.file("pairs.jsonl")))
    assert len(pairs) == 40
    assert Counter(pair["split"] for pair in pairs) == {"train": 28, "val": 6, "test": 6}
    by_split = {split: {pair["prompt"] for pair in pairs if pair["split"] == split} for split in ("train", "test")}
    prompt_ids = {pair["prompt_id"]: pair["split"] for pair in pairs}
    assert len(prompt_ids) == 20
    assert by_split["train"] != by_split["test"]
    for pair in pairs:
        assert pair["labels"]["overall"] == 1.0
        assert sum(pair["labels"][head] == 1.0 for head in HEADS) >= 1
        with Image.open(made.path / pair["preferred"]) as good, Image.open(made.path / pair["rejected"]) as bad:
            assert good.size == bad.size == (32, 32)
            assert good.tobytes() != bad.tobytes()
    with made.file("ratings.csv").open() as stream:
        ratings = list(csv.DictReader(stream))
    assert len(ratings) == 40 * 3 * len(DIMENSIONS)
    assert {row["choice"] for row in ratings} == {"left", "right", "tie", "skip"}
    first_is_better = Counter(pair["preferred"].endswith(("0.png", "2.png")) for pair in pairs)
    assert min(first_is_better.values()) > 5, "the better picture comes first or second"


def test_no_prompt_is_drawn_twice(tmp_path: Path) -> None:
    """Of the demo's 100 every sixth was another one's, often of another split: a scorer judged what it had learnt."""
    made = make_samples(tmp_path / "a", num_prompts=100, pairs_per_prompt=1)
    assert len({pair["prompt"] for pair in read_jsonl(made.file("pairs.jsonl"))}) == 100


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_samples(tmp_path / name, seed=seed, num_prompts=6)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")
