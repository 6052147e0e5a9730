"""toy_preferences: datasets as build_datasets names them, balanced, their prompts held out, the same every time."""

from __future__ import annotations

import re
from pathlib import Path

from mdlm_artifacts import make_toy
from training_artifacts import content

from prefmill.demo.toy_language import KIND_PATTERN
from prefmill.store.jsonl import read_jsonl
from prefmill.training.data import read_pairs


def test_what_it_writes(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "a")
    train, val = (list(read_pairs(toy.file(f"dpo_clean_{split}/data.jsonl"))) for split in ("train", "val"))
    assert (len(train), len(val)) == (48, 6)
    assert all(re.search(KIND_PATTERN, pair.chosen) for pair in train)
    assert not any(re.search(KIND_PATTERN, pair.rejected) for pair in train)
    assert not {pair.group for pair in train} & {pair.group for pair in val}
    answers = [row["messages"][-1]["content"] for row in read_jsonl(toy.file("sft_clean_train/data.jsonl"))]
    assert sum(bool(re.search(KIND_PATTERN, answer)) for answer in answers) == len(answers) / 2
    make_toy(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
