"""What a model says behind its thought: models that reason write both as one answer, and people read the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHTS = (
    ("<think>", "</think>"),  # Qwen3's, DeepSeek R1's, GLM 4.5's and most others'
    ("[THINK]", "[/THINK]"),  # Magistral's
    ("<seed:think>", "</seed:think>"),  # Seed-OSS'
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss'
    ("<|channel>thought", "<channel|>"),  # Gemma 4's
)
_LAST = 16  # tokens of a prompt, in which its template may have opened a thought


def said(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens and the thought that it begins with; empty where that never ends.

    A thought that the prompt has opened counts, as DeepSeek R1's template does; a marker in the midst of an answer is
    part of what it says.
    """
    whole, before = (
        str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip()
        for ids in (answer_ids, prompt_ids[-_LAST:])
    )
    text = behind_thought(whole, before)
    if text is None:
        return str(tokenizer.decode(list(answer_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    for token in tokenizer.added_tokens_decoder.values():
        text = text.replace(str(token), "") if token.special else text
    return text.strip()


def behind_thought(text: str, before: str = "") -> str | None:
    """What comes behind the thought that `text` begins with or `before` opens; None where there is no thought."""
    for opening, closing in _THOUGHTS:
        if text.startswith(opening) or before.endswith(opening):
            return text.partition(closing)[2]
    return None
