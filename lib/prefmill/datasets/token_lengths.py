"""Row lengths in the model's tokens, against its context."""

from __future__ import annotations

from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefmill.core.errors import ConfigError
from prefmill.core.records import IMAGE_MARKER
from prefmill.datasets.examples import CheckedRow
from prefmill.families.causal.chat import apply_template
from prefmill.store.pictures import image_size

_IMAGE_FRAME_TOKENS = 2  # one before and one after an image's own


class TokenCounter:
    """Counts tokens of prompt and completion with a model's tokenizer, chat template and image processor."""

    def __init__(self, tokenizer: Any, image_processor: Any, folder: Path) -> None:
        self._tokenizer, self._image_processor, self._folder = tokenizer, image_processor, folder
        # Caches of the instance: a decorated method would keep it and its tokenizer in memory for good.
        self._prompt_length = lru_cache(maxsize=64)(self._count_prompt)
        self._image_length = lru_cache(maxsize=4096)(self._count_image)
        asked = self._count_chat([{"role": "user", "content": "a"}], True)
        answer = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        # What a template writes after an answer, such as <|im_end|> and a newline, as a difference of two chats.
        self._num_closing = max(0, self._count_chat(answer, False) - asked - self._count_text("b"))

    @property
    def counts_images(self) -> bool:
        """Whether the model says how many tokens per image takes."""
        return hasattr(self._image_processor, "get_number_of_image_patches")

    def count(self, example: CheckedRow) -> int:
        """Tokens of the prompt with its images and the longest completion."""
        longest = max(self._count_text(answer.completion) for answer in example.answers)
        images = sum(self._image_length(name) for name in example.images)
        # Without markers: in the model's input each one becomes its image's tokens, which are added here.
        return self._prompt_length(example.prompt.replace(IMAGE_MARKER, "")) + longest + self._num_closing + images

    def _count_prompt(self, prompt: str) -> int:
        return self._count_chat([{"role": "user", "content": prompt}], True)

    def _count_chat(self, messages: list[dict[str, str]], asks: bool) -> int:
        return self._count_text(apply_template(self._tokenizer, messages, asks))

    def _count_text(self, text: str) -> int:
        # The template has already written the special tokens.
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _count_image(self, name: str) -> int:
        width, height = image_size(self._folder / name)
        patches = int(self._image_processor.get_number_of_image_patches(height, width))
        return patches // int(self._image_processor.merge_size) ** 2 + _IMAGE_FRAME_TOKENS


def open_counter(name_or_path: str, folder: Path) -> TokenCounter:
    """The counter of a model's folder or hub name; raises InputError when its tokenizer cannot be loaded."""
    from transformers import AutoImageProcessor

    from prefmill.families.causal.loading import load_tokenizer

    tokenizer = load_tokenizer(name_or_path, today=date.today())  # every day is as long
    try:
        image_processor = AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError):  # a model of text
        image_processor = None
    return TokenCounter(tokenizer, image_processor, folder)


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
