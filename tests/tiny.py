"""A very small Qwen2 and its tokenizer, for tests of training and scoring."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

WORDS = tuple(
    "the a paper model method data result is was good bad weak strong new old table figure and or not very it".split()  # noqa: SIM905
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 300 tokens with a ChatML template; Qwen2's class is what Auto loads back."""
    from transformers import Qwen2Tokenizer

    texts = [" ".join(random.Random(seed).choices(WORDS, k=40)) for seed in range(20)]
    roles = ["user\nassistant\nsystem\nRating: 6"] * 5
    specials = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts + roles, 340, new_special_tokens=specials)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_tiny_qwen2(folder: Path, seed: int = 0) -> Path:
    """A randomly initialised Qwen2 of two layers, with its tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence(seed: int, words: int) -> str:
    """A sentence of known words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def pair_rows(num_groups: int, pairs: int = 2) -> list[dict[str, object]]:
    """Preference rows as build_datasets writes them: groups of `pairs` pairs that share a prompt."""
    return [
        {
            "id": f"g{group}p{index}",
            "group": f"g{group}",
            "conversations": [{"from": "human", "value": sentence(group, 6 + group % 5)}],
            "chosen": {"from": "gpt", "value": sentence(1000 + 10 * group, 3 + group % 7)},
            "rejected": {"from": "gpt", "value": sentence(2000 + 10 * group + index, 5 + (group + index) % 4)},
        }
        for group in range(num_groups)
        for index in range(pairs)
    ]
