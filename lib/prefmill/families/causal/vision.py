"""Images in prompts of vision-language models: their tokens, their places in 3-D rotary positions, their pixels.

Qwen2-VL to Qwen3.5: an image of h x w patches is h/2 x w/2 tokens, and its positions are (time, row, column).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from prefmill.core.errors import InputError
from prefmill.core.records import IMAGE_MARKER
from prefmill.families.causal.chat import Answer, encode, encode_turns, image_paths, prompt_text
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.store.pictures import image_size, open_image

Grid = tuple[int, int, int]  # patches of an image: time (1), height, width
TRAINED = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"})


class ImageReader:
    """Reads images as a model's processor does; `limits` replace the processor's own bounds on pixels."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, limits: ImageLimits, **options: Any) -> None:
        self.tokenizer = tokenizer
        config = AutoConfig.from_pretrained(name, **options)
        self.image_token: int = config.image_token_id
        self.processor = AutoImageProcessor.from_pretrained(name, **options)
        # Under these names, which speak of edges, Qwen2-VL keeps numbers of pixels.
        size = dict(self.processor.size)
        bounds = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
        self.processor.size = {key: bounds[key] or size[key] for key in bounds}
        self.merge: int = self.processor.merge_size

    def encode(
        self, messages: Sequence[Mapping[str, Any]], answer: Answer, tools: Sequence[Any] = ()
    ) -> tuple[list[int], list[int]]:
        """Token ids of prompt and completion as `chat.encode`, with as many image tokens as each image has.

        Images stand in `messages` as parts `{"type": "image", "path": ...}`: see `with_images`.
        """
        prompt, completion = encode(self.tokenizer, messages, answer, tools)
        if self.image_token in completion:
            raise _own_image_tokens(prompt.count(self.image_token), len(image_paths(messages)))
        return self._expanded(prompt, messages), completion

    def encode_turns(
        self, messages: Sequence[Mapping[str, Any]], places: Sequence[int], tools: Sequence[Any] = ()
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat and which are trained, as `chat.encode_turns`."""
        ids, trained = encode_turns(self.tokenizer, messages, places, tools)
        if (self.image_token, True) in zip(ids, trained, strict=True):
            raise _own_image_tokens(ids.count(self.image_token), len(image_paths(messages)))
        marked = zip(ids, trained, self._times(ids, messages), strict=True)
        expanded = [(token, learnt) for token, learnt, times in marked for _ in range(times)]
        return [token for token, _ in expanded], [learnt for _, learnt in expanded]

    def encode_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the prompt alone, as `encode` gives them."""
        ids = self.tokenizer(prompt_text(self.tokenizer, messages), add_special_tokens=False)["input_ids"]
        return self._expanded(ids, messages)

    def _expanded(self, prompt: Sequence[int], messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return [token for token, times in zip(prompt, self._times(prompt, messages), strict=True) for _ in range(times)]

    def _times(self, ids: Sequence[int], messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """How often each token stands once images have all of theirs."""
        paths = image_paths(messages)
        if ids.count(self.image_token) != len(paths):
            raise _own_image_tokens(ids.count(self.image_token), len(paths))
        counts = iter([self.num_tokens(self.grid(path)) for path in paths])
        return [next(counts) if token == self.image_token else 1 for token in ids]

    def collapsed(self, prompt: Sequence[int]) -> list[int]:
        """`prompt` with one token an image, as the chat template has it."""
        runs = groupby(prompt, lambda token: token == self.image_token)
        return [token for is_image, run in runs for token in ([self.image_token] if is_image else run)]

    def num_tokens(self, grid: Grid) -> int:
        """Tokens of an image in the prompt."""
        return grid[1] * grid[2] // self.merge**2

    def grid(self, path: str) -> Grid:
        """The patches that an image will have, from its size alone."""
        return _grid(path, self.processor.patch_size, self.merge, *self._bounds)

    def pixels(self, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Pixel values [patches, 3 x 2 x patch x patch] fp32 of images one after another, and their grids [n, 3]."""
        images = [open_image(path) for path in paths]
        read = self.processor(images=images, return_tensors="pt")
        return read["pixel_values"], read["image_grid_thw"]

    def positions(self, prompt: Sequence[int], grids: Sequence[Grid]) -> Tensor:
        """The rotary positions of a prompt's tokens, [3, P] int64: time, row, column."""
        runs: list[Tensor] = []
        place, start, images = 0, 0, iter(grids)
        while place < len(prompt):
            if prompt[place] == self.image_token:
                _, height, width = next(images)
                rows, columns = height // self.merge, width // self.merge
                runs.append(start + torch.stack([
                    torch.zeros(rows * columns, dtype=torch.long),
                    torch.arange(rows).repeat_interleave(columns),
                    torch.arange(columns).repeat(rows),
                ]))  # fmt: skip
                # Qwen2-VL (arXiv 2409.12191), 3D rotary positions: what follows an image goes on after its longer side.
                place, start = place + rows * columns, start + max(rows, columns)
            else:
                end = place
                while end < len(prompt) and prompt[end] != self.image_token:
                    end += 1
                runs.append((start + torch.arange(end - place)).expand(3, -1))
                place, start = end, start + end - place
        return torch.cat(runs, dim=1)

    def digest(self, images: Sequence[Sequence[str]]) -> str:
        """What the pixels of these prompts' images are: of every file's bytes, and the bounds they are resized to."""
        content = [[_file_digest(path) for path in paths] for paths in images]
        return hashlib.sha256(json.dumps([content, self._bounds]).encode()).hexdigest()

    def save_pretrained(self, folder: Path) -> None:
        """Write tokenizer and image processor as a vision-language model's folder has them."""
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @property
    def _bounds(self) -> tuple[int, int]:
        return self.processor.size["shortest_edge"], self.processor.size["longest_edge"]


def open_reader(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    limits: ImageLimits,
    families: Collection[str] = TRAINED,
    **options: Any,
) -> ImageReader | None:
    """The reader of the model `name`, of one of `families`; None for any other: it is shown text alone."""
    config = AutoConfig.from_pretrained(name, **options)
    if config.model_type not in families:
        return None
    return ImageReader(name, tokenizer, limits, **options)


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


def embed(model: Any, input_ids: Tensor, pixels: Tensor | None, grids: Tensor | None) -> dict[str, Any]:
    """Arguments of the text model: input embeddings [R, T, H] with the images' features at their tokens.

    Qwen3-VL's early layers take features of their own too. Without images the vision part still runs, on one blank
    image that counts for nothing: under ZeRO-3 and DDP every rank must run every part.
    """
    backbone = model.base_model
    embedded: Tensor = model.get_input_embeddings()(input_ids)
    vision = backbone.visual
    if pixels is None or grids is None:
        side = vision.spatial_merge_size
        blank = torch.zeros(side * side, vision.patch_embed.in_channels * vision.patch_embed.temporal_patch_size
                            * vision.patch_embed.patch_size**2, device=input_ids.device)  # fmt: skip
        grid = torch.tensor([[1, side, side]], device=input_ids.device)
        features, deep = _features(backbone, blank, grid)
        # Times 0, yet in the graph: gradients of 0 reach every weight of the vision part.
        nothing = torch.stack([part.sum() for part in (features, *deep)]).sum() * 0.0
        return {"inputs_embeds": embedded + nothing.to(embedded.dtype)}
    features, deep = _features(backbone, pixels, grids)
    at_images = input_ids == model.config.image_token_id
    spread = at_images[..., None].expand_as(embedded)
    assert spread.sum() == features.numel(), "as many image tokens as features"
    given: dict[str, Any] = {"inputs_embeds": embedded.masked_scatter(spread, features.to(embedded.dtype))}
    return given | ({"visual_pos_masks": at_images, "deepstack_visual_embeds": deep} if deep else {})


def prompt_positions(reader: ImageReader) -> Callable[[Sequence[int], Sequence[str]], Tensor]:
    """Rotary positions [3, P] of a prompt with these images."""
    return lambda prompt, images: reader.positions(prompt, [reader.grid(path) for path in images])


def _own_image_tokens(found: int, expected: int) -> InputError:
    return InputError(
        "the text holds image tokens of its own", got=found, expected=expected,
        fix="remove the model's image token from the texts, or use the model's own chat template",
    )  # fmt: skip


def _features(backbone: Any, pixels: Tensor, grids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features [tokens, H] of all images, and of each layer that takes some too."""
    found = backbone.get_image_features(pixels, grids, return_dict=True)
    deep = getattr(found, "deepstack_features", None) or ()
    return torch.cat(tuple(found.pooler_output)), [torch.cat(tuple(layer)) for layer in deep]


@lru_cache(maxsize=65536)
def _grid(path: str, patch: int, merge: int, least: int, most: int) -> Grid:
    width, height = image_size(path)
    try:
        # The processor's own rule, so that a size gives the number of tokens and no pixel is decoded.
        height, width = smart_resize(height, width, factor=patch * merge, min_pixels=least, max_pixels=most)
    except ValueError as error:
        raise InputError("this image cannot be used", where=path, got=error, fix="leave it out") from None
    return 1, height // patch, width // patch


@lru_cache(maxsize=65536)
def _file_digest(path: str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
