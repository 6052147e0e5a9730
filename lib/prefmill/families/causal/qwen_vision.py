"""Images of Qwen2-VL to Qwen3.5: an image of h x w patches is h/2 x w/2 tokens at places (time, row, column)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from prefmill.core.errors import InputError
from prefmill.families.causal.chat import state_ends
from prefmill.families.causal.vision import ImageReader
from prefmill.families.causal.vision_parts import decoder_of
from prefmill.store.pictures import image_size, open_image

Grid = tuple[int, int, int]  # patches of an image: time (1), height, width


class QwenReader(ImageReader):
    """Images keep their aspect, within bounds on their pixels."""

    @cached_property
    def processor(self) -> Any:
        """The model's image processor with the reader's bounds."""
        processor = super().processor
        # Under these names, which speak of edges, Qwen2-VL keeps numbers of pixels.
        bounds = {"shortest_edge": self._limits.min_pixels, "longest_edge": self._limits.max_pixels}
        size = dict(processor.size)
        processor.size = {key: bounds[key] or size[key] for key in bounds}
        return processor

    def written(self, path: str) -> str:
        """As many image tokens as there are merged patches."""
        return self.placeholder * self.num_tokens(self.grid(path))

    def num_tokens(self, grid: Grid) -> int:
        """Tokens of an image in the prompt."""
        return int(grid[1] * grid[2] // self.processor.merge_size**2)

    def grid(self, path: str) -> Grid:
        """The patches that an image will have, from its size alone."""
        return _grid(path, self.processor.patch_size, self.processor.merge_size, *self._bounds)

    def pixels(self, paths: Sequence[str]) -> dict[str, Tensor]:
        """`pixel_values` [patches, 3 x 2 x patch x patch] of all images, and their grids `image_grid_thw` [n, 3]."""
        read = self.processor(images=[open_image(path) for path in paths], return_tensors="pt")
        return {name: read[name] for name in ("pixel_values", "image_grid_thw")}

    def positions(self, prompt: Sequence[int], images: Sequence[str]) -> Tensor:
        """The rotary positions of a prompt's tokens, [3, P] int64: time, row, column."""
        runs: list[Tensor] = []
        start, grids = 0, (self.grid(path) for path in images)
        for is_image, tokens in groupby(prompt, lambda token: token == self.image_token):
            left = len(list(tokens))
            while is_image and left:  # images may stand side by side
                _, height, width = next(grids)
                rows, columns = (side // self.processor.merge_size for side in (height, width))
                runs.append(start + torch.stack([
                    torch.zeros(rows * columns, dtype=torch.long),
                    torch.arange(rows).repeat_interleave(columns),
                    torch.arange(columns).repeat(rows),
                ]))  # fmt: skip
                # Qwen2-VL (arXiv 2409.12191), 3D rotary positions: what follows an image goes on after its longer side.
                left, start = left - rows * columns, start + max(rows, columns)
            runs.append((start + torch.arange(left)).expand(3, -1))
            start += left
        return torch.cat(runs, dim=1)

    @property
    def vllm_options(self) -> dict[str, Any]:
        """The reader's bounds on pixels."""
        return {"size": dict(self.processor.size)}

    def save_pretrained(self, folder: Path) -> None:
        """Write tokenizer and image processor, whose bounds are the reader's."""
        self.tokenizer.save_pretrained(folder)
        state_ends(folder, self.tokenizer)
        with suppress(InputError):  # a folder without a processor for rows of text
            self.processor.save_pretrained(folder)

    @property
    def _bounds(self) -> tuple[int, int]:
        return self.processor.size["shortest_edge"], self.processor.size["longest_edge"]


def read_qwen(
    model: Any, input_ids: Tensor, mask: Tensor | None, images: dict[str, Tensor] | None, **given: Any
) -> Any:
    """Hidden states of rows in which the images' features stand at their tokens.

    Without images the vision part still runs, on one blank image that counts for nothing: under ZeRO-3 and DDP every
    rank must run every part.
    """
    shown = _embed(model, input_ids, images)
    return decoder_of(model)(attention_mask=mask, use_cache=False, **shown, **given)


def _embed(model: Any, input_ids: Tensor, images: dict[str, Tensor] | None) -> dict[str, Any]:
    backbone = model.base_model
    embedded: Tensor = model.get_input_embeddings()(input_ids)
    features, deep = _features(backbone, images or _blank(backbone.visual, input_ids.device))
    if images is None:
        # Times 0, yet in the graph: gradients of 0 reach every weight of the vision part.
        nothing = torch.stack([part.sum() for part in (features, *deep)]).sum() * 0.0
        return {"inputs_embeds": embedded + nothing.to(embedded.dtype)}
    at_images = input_ids == model.config.image_token_id
    spread = at_images[..., None].expand_as(embedded)
    assert spread.sum() == features.numel(), "as many image tokens as features"
    given: dict[str, Any] = {"inputs_embeds": embedded.masked_scatter(spread, features.to(embedded.dtype))}
    # Qwen3-VL's early layers take features of their own too.
    return given | ({"visual_pos_masks": at_images, "deepstack_visual_embeds": deep} if deep else {})


def _blank(vision: Any, device: torch.device) -> dict[str, Tensor]:
    side, patch = vision.spatial_merge_size, vision.patch_embed
    values = patch.in_channels * patch.temporal_patch_size * patch.patch_size**2
    return {
        "pixel_values": torch.zeros(side * side, values, device=device),
        "image_grid_thw": torch.tensor([[1, side, side]], device=device),
    }


def _features(backbone: Any, images: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Features [tokens, H] of all images, and of each layer that takes some too."""
    found = backbone.get_image_features(**images, return_dict=True)
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
