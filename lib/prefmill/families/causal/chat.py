"""Chats as token ids: one way to split them into prompt and completion, for every stage that trains or scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str:
    """The chat up to where the model's answer begins, assistant header included."""
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


def image_paths(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The images that stand in `messages` as parts, in their order."""
    return [part["path"] for turn in messages if isinstance(turn["content"], list)
            for part in turn["content"] if part["type"] == "image"]  # fmt: skip


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion, end of turn included.

    They are tokenised apart, so that a prompt has the same ids whatever follows it. Raises InputError when the
    chat template changes what was said before the answer, or when there is no answer.
    """
    prompt = prompt_text(tokenizer, messages)
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": answer}], tokenize=False, add_generation_prompt=False
    )
    if not whole.startswith(prompt):
        raise InputError(
            "the chat template rewrites the prompt once an answer follows", got=whole[: len(prompt)][-80:],
            expected=prompt[-80:], fix="use a template whose generation prompt is a prefix of the finished chat",
        )  # fmt: skip
    if not answer.strip():
        raise InputError("an empty answer cannot be trained on", where=prompt[:80], fix="leave the row out")
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return prompt_ids, tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
