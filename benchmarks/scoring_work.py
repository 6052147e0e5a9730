"""What `benchmarks.scoring` scores: papers of a file with their reviews, a model, and everyone's prompts."""

from __future__ import annotations

import gzip
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 1000


@dataclass(frozen=True)
class Work:
    """What everyone scores: papers with their reviews, the model's folder, and the gigabytes of a vLLM's cache.

    `paper_first`: the usual script puts title and abstract before the review, not behind it.
    """

    papers: list[tuple[Any, list[Any]]]
    model: str
    kv_cache_gb: float
    paper_first: bool = False

    @property
    def reviews(self) -> list[tuple[Any, Any]]:
        """Every review with its paper."""
        return [(paper, review) for paper, reviews in self.papers for review in reviews]


def draw(path: Path, num_papers: int, folder: Path, kv_cache_gb: float) -> Work:
    """Papers whose mean prompt is nearest to the length wanted of a hundred draws, and the model saved to `folder`."""
    papers: dict[str, list[Any]] = defaultdict(list)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:  # type: ignore[operator]
        for row in map(json.loads, stream):
            papers[row["paper_id"]].append(row)
    rows = list(papers.values())
    save_model(folder, [row["review_text"] for reviews in rows[:500] for row in reviews])
    chance = random.Random(0)
    samples = [chance.sample(rows, min(num_papers, len(rows))) for _ in range(100)]
    draws = [Work([_paper(reviews) for reviews in sample], str(folder), kv_cache_gb) for sample in samples]
    prompts = open_prompts(draws[0])

    def distance(work: Work) -> float:
        lengths = [len(before) for before, _ in _pieces(work, prompts)]
        return abs(statistics.mean(lengths) + statistics.mean(map(len, prompts.questions)) - PROMPT_TOKENS)

    return min(draws, key=distance)


def _paper(rows: Sequence[Any]) -> tuple[Any, list[Any]]:
    paper = {"paper_id": rows[0]["paper_id"], "title": rows[0]["title"], "abstract": rows[0]["abstract"], "text": ""}
    reviews = [{"paper_id": row["paper_id"], "review_id": row["review_id"], "text": row["review_text"]} for row in rows]
    return paper, reviews


def save_model(folder: Path, texts: Sequence[str], shape: Any = None) -> None:
    """The model, of another `shape` where one is given, and a tokenizer of 4,000 words that spells yes and no."""
    from prefmill.checklist.items import load_checklist
    from prefmill.demo.text import Shape, create_qwen2, save
    from prefmill.demo.tokenizer import train_chat_tokenizer

    # A large vocabulary holds the prompt's own words whole; so must this one, or items would be too long.
    own = ["Yes No", "No Yes", "assistant Answer with one word, BEGIN REVIEW END REVIEW Title: Abstract:"]
    questions = [item.question for item in load_checklist().items]
    tokenizer = train_chat_tokenizer([*texts, *own * 1000, *questions * 100], 4000)
    shape = shape or Shape(hidden_size=768, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=1,
                  intermediate_size=4480)  # fmt: skip
    # Weights of a standard deviation that gives answers on both sides of 0.5.
    save(create_qwen2(tokenizer, shape, seed=0, initializer_range=0.1), tokenizer, folder)


def open_prompts(work: Work) -> Any:
    """The engines' own prompts for the model."""
    from prefmill.checklist.items import load_checklist
    from prefmill.checklist.prompts import Prompts
    from prefmill.families.causal.loading import load_tokenizer

    return Prompts(load_tokenizer(work.model), load_checklist(), "title_abstract")


def _pieces(work: Work, prompts: Any) -> list[tuple[tuple[int, ...], Sequence[tuple[int, ...]]]]:
    """A review's tokens before its items, and the items'."""
    return [(prompts.shared(paper) + prompts.foreign(review["text"]), prompts.questions)
            for paper, review in work.reviews]  # fmt: skip


def every_prompt(work: Work, prompts: Any) -> list[tuple[int, ...]]:
    """The token ids of the engines' whole prompts."""
    return [before + question for before, questions in _pieces(work, prompts) for question in questions]


def distinct_tokens(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that must be computed when no prefix is computed twice."""
    ordered = sorted(prompts)
    return sum(map(len, ordered)) - sum(shared_length(*pair) for pair in pairwise(ordered))


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many tokens both begin with."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def usual_prompts(work: Work, item_first: bool) -> list[str]:
    """What a usual script asks: one text for every item of every review."""
    from transformers import AutoTokenizer

    from prefmill.checklist.items import load_checklist

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    texts = []
    for paper, review in work.reviews:
        task = ("You judge a peer review of a scientific paper by one question. Answer yes only where the review "
                "itself shows it.")  # fmt: skip
        about = f"Title: {paper['title']}\n\nAbstract: {paper['abstract']}"
        text = f"BEGIN REVIEW\n{review['text']}\nEND REVIEW"
        material = [task, about, text] if work.paper_first or not item_first else [task, text, about]
        for item in load_checklist().items:
            question = f"{item.question}\nAnswer with one word, Yes or No."
            content = "\n\n".join([question, *material] if item_first else [*material, question])
            message = [{"role": "user", "content": content}]
            texts.append(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    return texts
