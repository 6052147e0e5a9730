"""Images in prompts of vision-language models: their tokens as the model's processor writes them, and their pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, PreTrainedTokenizerBase

from prefmill.core.errors import InputError
from prefmill.core.records import IMAGE_MARKER
from prefmill.families.causal.chat import Answer, encode, encode_turns, image_paths, prompt_text
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.token_ids import token_ids
from prefmill.families.causal.vision_parts import KeptProcessor
from prefmill.store.pictures import DECODER


class ImageReader:
    """Reads images as a model's processor does; `limits` replace the processor's own bounds on pixels.

    A family says how an image stands in the text (`written`) and what the model's forward takes of it (`pixels`).
    """

    types_name = "mm_token_type_ids"  # under which the model's forward is told which tokens are an image's
    placeholder_key = "image_token_id"  # of the configuration

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, limits: ImageLimits, **options: Any) -> None:
        self.tokenizer, self._limits = tokenizer, limits
        self._name, self._options = name, options
        self.config = AutoConfig.from_pretrained(name, **options)
        self.image_token: int = self.config.image_token_id
        # Written out before it is tokenised: in Gemma 3's vocabulary line breaks around an image join their neighbours.
        self._writer: Any = _ImageWriter(tokenizer, self)

    @cached_property
    def processor(self) -> Any:
        """The model's image processor; raises InputError where its folder has none: rows of text need none."""
        try:
            return AutoImageProcessor.from_pretrained(self._name, **self._options)
        except (OSError, ValueError) as error:
            raise InputError(
                "this model's image processor cannot be loaded", where=self._name, got=str(error).splitlines()[0],
                fix="put the base model's preprocessor_config.json into the folder, or leave rows with images out",
            ) from None  # fmt: skip

    @property
    def placeholder(self) -> str:
        """The text by which the chat template says that here is an image."""
        return self._token(self.placeholder_key)

    def written(self, path: str) -> str:
        """What stands in the text for the image in the file `path`."""
        raise NotImplementedError

    def pixels(self, paths: Sequence[str]) -> dict[str, Tensor]:
        """Images one after another as the model's forward takes them: `pixel_values` fp32, their shapes or places."""
        raise NotImplementedError

    def positions(self, prompt: Sequence[int], images: Sequence[str]) -> Tensor | None:
        """The rotary positions of a prompt's tokens, [3, P] int64; None where they only count on."""
        return None

    @property
    def vllm_options(self) -> dict[str, Any]:
        """How vLLM reads images alike."""
        raise NotImplementedError

    def encode(
        self, messages: Sequence[Mapping[str, Any]], answer: Answer, tools: Sequence[Any] = ()
    ) -> tuple[list[int], list[int]]:
        """Token ids of prompt and completion as `chat.encode`, with as many image tokens as each image has.

        Images stand in `messages` as parts `{"type": "image", "path": ...}`: see `with_images`.
        """
        return encode(self._writer, messages, answer, tools)

    def encode_turns(
        self, messages: Sequence[Mapping[str, Any]], places: Sequence[int], tools: Sequence[Any] = ()
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat and which are trained, as `chat.encode_turns`."""
        return encode_turns(self._writer, messages, places, tools)

    def encode_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the prompt alone, as `encode` gives them."""
        return token_ids(self.tokenizer, prompt_text(self._writer, messages))

    def collapsed(self, prompt: Sequence[int]) -> list[int]:
        """`prompt` with one token an image, as the chat template has it."""
        runs = groupby(prompt, lambda token: token == self.image_token)
        return [token for is_image, run in runs for token in ([self.image_token] if is_image else run)]

    def inputs(self, paths: Sequence[str], input_ids: Tensor) -> dict[str, Tensor]:
        """All that the model's own forward takes beside `input_ids` [R, T]; nothing without images."""
        if not paths:
            return {}
        # From these transformers makes masks, and positions in three dimensions; without them Qwen's refuse images.
        return {**self.pixels(paths), self.types_name: (input_ids == self.image_token).int()}

    def digest(self, images: Sequence[Sequence[str]]) -> str:
        """What these prompts' pixels follow from: every file's bytes, the decoder, and the bounds of resizing."""
        content = [[_file_digest(path) for path in paths] for paths in images]
        read = [DECODER, self._bounds] if any(images) else None
        return hashlib.sha256(json.dumps([content, read]).encode()).hexdigest()

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer, and the files for images as the model's folder has them."""
        KeptProcessor(self.tokenizer, self._name, self._options.get("revision")).save_pretrained(folder)

    def _token(self, key: str) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(getattr(self.config, key)))

    @property
    def _bounds(self) -> Any:
        return self.processor.to_dict()


class _ImageWriter:
    """A tokenizer whose chat template writes images out in full."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reader: ImageReader) -> None:
        self._tokenizer, self._reader = tokenizer, reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, *given: Any, **options: Any) -> Any:
        return self._tokenizer(*given, **options)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The chat as text; raises InputError for image tokens that the messages hold themselves."""
        text = str(self._tokenizer.apply_chat_template(list(messages), **options))
        paths, placeholder = image_paths(messages), self._reader.placeholder
        token = str(self._tokenizer.convert_ids_to_tokens(self._reader.image_token))
        parts = text.split(placeholder)
        if len(parts) - 1 != len(paths) or (token != placeholder and token in text):
            raise InputError(
                "the text contains image tokens", got=max(len(parts) - 1, text.count(token)),
                expected=len(paths),
                fix="remove the model's image token from the texts, or use the model's own chat template",
            )  # fmt: skip
        written = [*map(self._reader.written, paths), ""]
        return "".join(piece for pair in zip(parts, written, strict=True) for piece in pair)


def with_images(messages: Sequence[Mapping[str, Any]], images: Sequence[str]) -> list[dict[str, Any]]:
    """`messages` with every `<image>` marker replaced by the image that it stands for; unchanged without images."""
    if not images:
        return [dict(turn) for turn in messages]
    left = list(images)
    turns = []
    for turn in messages:
        first, *others = turn["content"].split(IMAGE_MARKER)
        parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
        for text in others:
            if not left:
                raise InputError(
                    "more image markers than images", got=turn["content"][:80], expected=len(images),
                    fix="write one <image> for each image",
                )  # fmt: skip
            parts += [{"type": "image", "path": left.pop(0)}, {"type": "text", "text": text}]
        turns.append({**turn, "content": [part for part in parts if part.get("text") != ""]})
    if left:
        raise InputError("more images than image markers", got=len(images), fix="write one <image> for each image")
    return turns


@lru_cache(maxsize=65536)
def _file_digest(path: str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
