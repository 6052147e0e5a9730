"""Batches of prompts with images: pixels read once for each prompt in the batch, positions in three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prefmill.families.causal.scorer import Batch
from prefmill.families.causal.vision import ImageReader
from prefmill.training.data import Group


def add_images(batch: Batch, groups: Sequence[Group], reader: ImageReader) -> Batch:
    """`batch` with the images of the groups that its prompts come from, in their order.

    Packed batches hold every prompt once, so that its images are encoded once; in others each row has them.
    """
    if not any(group.images for group in groups):
        return batch
    batch = replace(batch, images=reader.pixels([path for group in groups for path in group.images]))
    places = [found for group in groups if (found := reader.positions(group.prompt, group.images)) is not None]
    if not places:  # a family whose positions only count on
        return batch
    return replace(batch, position_ids=_packed(batch, places) if batch.segments is not None else _rows(batch, places))


def _packed(batch: Batch, prompts: Sequence[Tensor]) -> Tensor:
    """Positions [3, 1, T]: every response goes on after the highest position of its prompt."""
    assert batch.segments is not None
    positions = torch.zeros(3, 1, batch.input_ids.shape[1], dtype=torch.long)
    for segment, prompt in zip(batch.segments, prompts, strict=True):
        positions[:, 0, slice(*segment.prompt)] = prompt
        for begin, end in segment.responses:
            # Text goes on after the highest of the three: an image has more tokens than positions along an axis.
            positions[:, 0, begin:end] = prompt.max() + 1 + torch.arange(end - begin)
    return positions


def _rows(batch: Batch, prompts: Sequence[Tensor]) -> Tensor:
    """Positions [3, R, T] of rows padded on the right."""
    positions = torch.zeros(3, *batch.input_ids.shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        positions[:, row, :length] = prompt
        # Padding is counted on too: it stands behind the answer, where no token looks.
        positions[:, row, length:] = prompt.max() + 1 + torch.arange(batch.input_ids.shape[1] - length)
    return positions
