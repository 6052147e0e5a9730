"""A language small enough to learn in seconds, with a property to prefer: answers with a kind word or a harsh one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.store.jsonl import read_jsonl, write_jsonl

if TYPE_CHECKING:
    from prefmill.demo.text import Shape

THINGS = ("method", "figure", "table", "proof", "result", "section", "model", "claim", "study", "title")
PLACES = ("paper", "talk", "thesis", "poster", "draft", "report", "letter", "book", "survey", "note")
KIND = ("clear", "careful", "strong", "sound")
HARSH = ("vague", "hasty", "weak", "flawed")
PLAIN = ("short", "long", "new", "old")
KIND_PATTERN = rf"^it is ({'|'.join(KIND)}) and ({'|'.join(PLAIN)})$"


def write_toy(folder: Path, num_sft: int, num_pairs: int, num_prompts_held_out: int, seed: int) -> dict[str, int]:
    """Write the four datasets below `folder`, named and formed as those of build_datasets; returns their rows.

    Fine-tuning rows are kind and harsh in turn, so a model of them is kind half of the time. In every pair the kind
    answer is preferred. Prompts held out are in no training row.
    """
    prompts = list(product(THINGS, PLACES))
    random.Random(seed).shuffle(prompts)
    held_out, training = prompts[:num_prompts_held_out], prompts[num_prompts_held_out:]
    rows: dict[str, list[dict[str, Any]]] = {
        "sft_clean_train": list(sft_rows(training, num_sft, seed)),
        "sft_clean_val": list(sft_rows(held_out, 2 * len(held_out), seed + 1)),
        "dpo_clean_train": list(pair_rows(training, num_pairs, seed + 2)),
        "dpo_clean_val": list(pair_rows(held_out, len(held_out), seed + 3)),
    }
    return {name: write_jsonl(folder / name / "data.jsonl", values) for name, values in rows.items()}


def sft_rows(prompts: Sequence[tuple[str, str]], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Chats, the prompts in turn, every other answer kind."""
    generator = random.Random(seed)
    for number in range(count):
        # Each prompt twice in turn, once harsh and once kind: the prompt must not tell which answer comes.
        thing, place = prompts[number // 2 % len(prompts)]
        said = answer(KIND if number % 2 else HARSH, generator)
        messages = [{"role": "user", "content": question(thing, place)}, {"role": "assistant", "content": said}]
        yield {"id": f"s{number}", "paper_id": f"{thing} {place}", "messages": messages}


def pair_rows(prompts: Sequence[tuple[str, str]], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Preference rows, the prompts in turn, the kind answer chosen."""
    generator = random.Random(seed)
    for number in range(count):
        thing, place = prompts[number % len(prompts)]
        yield {
            "id": f"p{number}",
            "group": f"{thing} {place}",
            "conversations": [{"from": "human", "value": question(thing, place)}],
            "chosen": {"from": "gpt", "value": answer(KIND, generator)},
            "rejected": {"from": "gpt", "value": answer(HARSH, generator)},
        }


def question(thing: str, place: str) -> str:
    """What the user asks."""
    return f"how is the {thing} of the {place}"


def answer(words: Sequence[str], generator: random.Random) -> str:
    """An answer with a word drawn from `words` and a plain one."""
    return f"it is {generator.choice(words)} and {generator.choice(PLAIN)}"


def build_model(folder: Path, texts: Sequence[str], shape: Shape, seed: int) -> Path:
    """Save a masked-diffusion model with random weights to `folder`, its tokenizer learnt from `texts`."""
    from prefmill.demo.text import create_masked_diffusion, save
    from prefmill.demo.tokenizer import MASK, train_chat_tokenizer

    # The chat template writes these: what the tokenizer is not shown it splits into bytes.
    roles = ["user\n", "assistant\n", "system\n"]
    tokenizer = train_chat_tokenizer([*texts, *roles], vocab_size=1024, mask_token=MASK)
    save(create_masked_diffusion(tokenizer, shape, seed), tokenizer, folder)
    return folder


def new_model(train: Path, folder: Path, shape: Shape, seed: int) -> Path:
    """Save an untrained model to `folder`, its tokenizer learnt from the rows of `train`."""
    # What the tokenizer is not shown it splits into bytes.
    texts = [str(turn["content"]) for row in read_jsonl(train) for turn in row["messages"]]
    return build_model(folder, texts, shape, seed)
