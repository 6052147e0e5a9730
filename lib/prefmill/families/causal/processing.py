"""The processor of a vision-language model, without torchvision."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLProcessor


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video half, the only part of it that needs torchvision.

    transformers finds the parts of a processor by the arguments of its constructor.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)
