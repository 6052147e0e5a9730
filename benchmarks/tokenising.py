"""The time before the first step: pairs of a paper's reviews as token ids, beside TRL's DPOTrainer.

    python -m benchmarks.tokenising REVIEWS.jsonl.gz [--papers 6]

A tokenizer of 50,000 tokens is trained on the reviews. Papers are random reviews one after another, 12,000 tokens each,
with 4 answers and 5 pairs, as build_datasets makes of the corpus. TRL tokenises them as it prepares its dataset, ours
as dpo does, one process and one thread each; ids of both are compared. The last line is for machines: how many times
faster.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from prefmill.demo.text import Shape, create_qwen2
from prefmill.demo.tokenizer import train_chat_tokenizer
from prefmill.families.causal.chat import encode
from prefmill.training.data import PreferencePair, group_by_prompt

PAPER_CHARACTERS, PAIRS = 60_000, ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3))  # about 12,000 tokens
SHAPE = Shape(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16)


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reviews", type=Path)
    parser.add_argument("--papers", type=int, default=6)
    asked = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with gzip.open(asked.reviews, "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["review_text"] for line in stream]
    tokenizer = train_chat_tokenizer(texts, 50_000)
    pairs = list(_pairs(texts, asked.papers))
    ours, own = _ours(tokenizer, pairs)
    theirs, trl = _trl(tokenizer, pairs)
    if own != trl:
        raise SystemExit("the ids differ")
    for name, seconds in (("TRL's DPOTrainer", theirs), ("dpo", ours)):
        print(f"{name:<20}{1000 * seconds / len(pairs):8.1f} ms a pair")
    print(f"ratio: {theirs / ours:.2f}")


def _pairs(texts: Sequence[str], papers: int) -> Any:
    chance = random.Random(0)
    for paper in range(papers):
        words = "\n\n".join(chance.sample(texts, 200))[:PAPER_CHARACTERS]
        answers = [text.strip() for text in chance.sample(texts, 4)]
        for chosen, rejected in PAIRS:
            prompt = [{"role": "user", "content": words}]
            yield PreferencePair(f"{paper}-{chosen}-{rejected}", str(paper), prompt, answers[chosen], answers[rejected])


def _ours(tokenizer: Any, pairs: Sequence[PreferencePair]) -> tuple[float, list[Any]]:
    begun = time.perf_counter()
    groups = group_by_prompt(pairs, partial(encode, tokenizer))
    seconds = time.perf_counter() - begun
    return seconds, [
        (group.prompt, group.responses[pair.chosen], group.responses[pair.rejected])
        for group in groups for pair in group.pairs
    ]  # fmt: skip


def _trl(tokenizer: Any, pairs: Sequence[PreferencePair]) -> tuple[float, list[Any]]:
    rows = [
        {"prompt": pair.messages, **{side: [{"role": "assistant", "content": getattr(pair, side)}]
                                     for side in ("chosen", "rejected")}}
        for pair in pairs
    ]  # fmt: skip
    dataset = Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(output_dir=folder, report_to=[], use_cpu=True, max_length=None)
        model, reference = (create_qwen2(tokenizer, SHAPE, seed=0) for _ in range(2))
        begun = time.perf_counter()
        trainer = DPOTrainer(model, reference, args=options, train_dataset=dataset, processing_class=tokenizer)
        seconds = time.perf_counter() - begun
    return seconds, [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]


if __name__ == "__main__":
    main()
