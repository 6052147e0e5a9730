"""Row lengths in the model's tokens, against its context."""

from __future__ import annotations

from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefmill.core.errors import ConfigError
from prefmill.datasets.examples import CheckedRow
from prefmill.families.causal.chat import apply_template
from prefmill.families.causal.token_ids import token_ids


class TokenCounter:
    """Counts tokens of prompt and completion with a model's tokenizer, chat template and, if any, reader of images.

    Raises InputError for a row that the template or the reader refuses.
    """

    def __init__(self, tokenizer: Any, reader: Any, folder: Path) -> None:
        self._tokenizer, self._reader, self._folder = tokenizer, reader, folder
        # Caches of the instance: a decorated method would keep it and its tokenizer in memory for good.
        self._prompt_length = lru_cache(maxsize=64)(self._count_prompt)
        asked = self._count_chat([{"role": "user", "content": "a"}], True)
        answer = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        # What a template writes after an answer, such as <|im_end|> and a newline, as a difference of two chats.
        self._num_closing = max(0, self._count_chat(answer, False) - asked - self._count_text("b"))

    @property
    def counts_images(self) -> bool:
        """Whether sft and dpo can show the model images."""
        return self._reader is not None

    def count(self, example: CheckedRow) -> int:
        """Tokens of the prompt with its images and the longest completion."""
        longest = max(self._count_text(answer.completion) for answer in example.answers)
        return self._prompt_length(example.prompt, example.images) + longest + self._num_closing

    def _count_prompt(self, prompt: str, images: tuple[str, ...]) -> int:
        turns = [{"role": "user", "content": prompt}]
        if not images:
            return self._count_chat(turns, True)
        from prefmill.families.causal.vision import with_images

        shown = with_images(turns, [str(self._folder / name) for name in images])
        return len(self._reader.encode_prompt(shown))

    def _count_chat(self, messages: list[dict[str, str]], asks: bool) -> int:
        return self._count_text(apply_template(self._tokenizer, messages, asks))

    def _count_text(self, text: str) -> int:
        return len(token_ids(self._tokenizer, text))


def open_counter(name_or_path: str, folder: Path) -> TokenCounter:
    """The counter of a model's folder or hub name; raises InputError when its tokenizer cannot be loaded."""
    from prefmill.families.causal.image_limits import ImageLimits
    from prefmill.families.causal.loading import load_tokenizer
    from prefmill.families.causal.vision_families import open_reader

    tokenizer = load_tokenizer(name_or_path, today=date.today())  # every day is as long
    return TokenCounter(tokenizer, open_reader(name_or_path, tokenizer, ImageLimits()), folder)


def context_of(name_or_path: str) -> int:
    """The context in tokens that a model's configuration states; raises ConfigError where it states none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError("no model configuration", where=name_or_path, got=first_line, fix="set max_length") from None
    # Models of images and text state their context in the part of the configuration for text.
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int):
        raise ConfigError("the model does not state its context", where=name_or_path, fix="set max_length")
    return context
