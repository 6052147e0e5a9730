"""The work of benchmarks.dpo_step: papers with the corpus' pairs and lengths, in random words, and a random model."""

from __future__ import annotations

import gzip
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefmill.training.data import Group, Pair

MIN_RATING_DIFF = 2
LAYERS: dict[str, dict[str, Any]] = {  # model_type and its keys, beside those of every size
    "full": {"model_type": "qwen2", "attention_dropout": 0.0},
    "window": {"model_type": "mistral", "sliding_window": 512, "head_dim": 64},
    "hybrid": {"model_type": "qwen3_5_text", "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
               "linear_key_head_dim": 64, "linear_value_head_dim": 64,
               "layer_types": ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 2},
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is trained on what: `lengths` of responses and `pairs` of their places, a paper each."""

    lengths: list[list[int]]
    pairs: list[list[tuple[int, int]]]
    prompt_tokens: int
    gpu: bool
    layers: str = "full"

    @property
    def num_pairs(self) -> int:
        """Pairs of an epoch."""
        return sum(map(len, self.pairs))


def draw(path: Path, num_groups: int, prompt_tokens: int, response_tokens: int) -> Setting:
    """Papers whose pairs and distinct responses have the corpus' means, as nearly as a thousand draws come."""
    papers: dict[str, list[tuple[float, int]]] = defaultdict(list)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:  # type: ignore[operator]
        for row in map(json.loads, stream):
            if row["decision"] == "accepted":
                papers[row["paper_id"]].append((float(row["rating"]), len(row["review_text"].split())))
    shapes = [shape for reviews in papers.values() if (shape := _shape(reviews))[1]]
    means = [statistics.mean(len(shape[part]) for shape in shapes) for part in (0, 1)]
    print(f"{len(shapes)} papers with pairs: {means[1]:.2f} pairs, {means[0]:.2f} responses a paper")
    chance = random.Random(0)
    draws = [chance.sample(shapes, num_groups) for _ in range(1000)]
    nearest = min(draws, key=lambda drawn: sum(
        abs(statistics.mean(len(shape[part]) for shape in drawn) - means[part]) for part in (0, 1)))  # fmt: skip
    scale = response_tokens / statistics.mean(words for lengths, _ in nearest for words in lengths)
    lengths = [[max(8, round(words * scale)) for words in lengths] for lengths, _ in nearest]
    return Setting(lengths, [pairs for _, pairs in nearest], prompt_tokens, gpu=False)


def _shape(reviews: Sequence[tuple[float, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Words of the reviews that are in a pair, and the pairs."""
    better = [(a, b) for a, one in enumerate(reviews) for b, other in enumerate(reviews)
              if one[0] - other[0] >= MIN_RATING_DIFF]  # fmt: skip
    places = {place: n for n, place in enumerate(sorted({side for pair in better for side in pair}))}
    return [reviews[place][1] for place in places], [(places[a], places[b]) for a, b in better]


def create_model(setting: Setting) -> Any:
    """A model with random weights: 6 layers, 256 wide, 8,000 words; on a GPU of Qwen2.5-3B's shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 8000, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 768}  # fmt: skip
    large = {"vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
             "num_key_value_heads": 2, "intermediate_size": 11_008}  # fmt: skip
    given = (large if setting.gpu else small) | LAYERS[setting.layers]
    torch.manual_seed(0)
    config = AutoConfig.for_model(**given, tie_word_embeddings=True, max_position_embeddings=32_768,
                                  bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    return model.to("cuda", torch.bfloat16) if setting.gpu else model


def groups_of(setting: Setting) -> list[Group]:
    """The papers as token groups."""
    chance = random.Random(1)
    groups = []
    for number, (lengths, pairs) in enumerate(zip(setting.lengths, setting.pairs, strict=True)):
        prompt = chance.choices(range(10, 8000), k=setting.prompt_tokens)
        answers = [chance.choices(range(10, 8000), k=length) for length in lengths]
        groups.append(Group(prompt, answers, [Pair(f"{number}:{a}-{b}", a, b) for a, b in pairs]))
    return groups
