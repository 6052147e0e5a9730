"""A tiny random Qwen2 with a tokenizer trained on the spot, for tests of the engine that runs a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmill.reviews.generated import generate

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(words: list[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with ChatML's special tokens and one added token that is not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_model(folder: Path, tokenizer: Any, max_position_embeddings: int = 1024) -> Path:
    """A random two-layer Qwen2 with grouped heads, whose answers are far from 0.5, and its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus_texts() -> list[str]:
    """Review texts of the generated corpus."""
    return [row["review_text"] for row in generate(7, 12)]


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory, corpus_texts: list[str]) -> Path:
    """A model folder whose tokenizer has Yes and No as single tokens."""
    tokenizer = make_tokenizer([*corpus_texts, *["Yes No"] * 50, *["No Yes"] * 50], 600)
    return save_tiny_model(tmp_path_factory.mktemp("judge"), tokenizer)


@pytest.fixture(scope="session")
def spelling_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer spells Yes in three tokens and No in two."""
    return save_tiny_model(tmp_path_factory.mktemp("spelling"), make_tokenizer([], 260), 8192)
