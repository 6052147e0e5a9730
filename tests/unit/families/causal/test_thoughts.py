"""Answers of models that think first: the text behind the thought, as these models' own pages read it."""

from __future__ import annotations

from typing import Any

import pytest

from prefmill.families.causal.generation import GenerationRequest, Sampling, as_completion
from tests.tiny import make_tokenizer

SPECIAL = ["[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|start|>", "<|end|>"]
USER = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Markers are added tokens as Qwen3's, special ones as Magistral's and gpt-oss', or plain text."""
    found = make_tokenizer()
    found.add_tokens(["<think>", "</think>"])
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    return found


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        (USER, "<think>\nit is bad\n</think>\n\nit is good", "it is good"),
        (USER, "<think>\n\n</think>\n\nit is good", "it is good"),  # what Qwen3's template trains
        (USER + "<think>\n", "it is bad\n</think>\n\nit is good", "it is good"),  # DeepSeek R1's template
        (USER + "<think>\n\n</think>\n\n", "it is good", "it is good"),  # enable_thinking: false
        (USER, "<think>\nit is", ""),
        (USER + "<think>\n", "it is", ""),
        (USER, "[THINK]it is bad[/THINK]it is good", "it is good"),
        (USER, "<seed:think>it is bad</seed:think>it is good", "it is good"),
        (USER, "<|channel|>analysis<|message|>it is bad<|end|><|start|>assistant<|channel|>final<|message|>it is good",
         "it is good"),
        (USER, "<|channel>thought\nit is bad<channel|>it is good", "it is good"),
        (USER, "it is a <think> token and a </think> token", "it is a <think> token and a </think> token"),
        (USER, "<think>bad</think>the </think> token", "the </think> token"),
        (USER, "it is [THINK] good", "it is  good"),
    ],
)  # fmt: skip
def test_a_thought_is_no_part_of_the_review(tokenizer: Any, prompt: str, answer: str, text: str) -> None:
    ids, written = (tokenizer(said)["input_ids"] for said in (prompt, answer))
    request = GenerationRequest("paper", 0, tuple(ids))
    ends = [tokenizer.eos_token_id]
    found = as_completion(request, [*written, *ends], ends, tokenizer, Sampling(99, 0.0, 1.0, 0))
    assert found["text"] == text
    assert found["num_tokens"] == len(written)
