"""The reward models' family of the preference trainer: a sample's scores are its rewards, and the loss is per head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefmill.families.reward.data import Box, ImageGroup, PixelReader
from prefmill.training.batches import GroupPart, Movable
from prefmill.training.family import Family
from prefmill.training.objectives import PairScores


@dataclass(frozen=True)
class RewardBatch(Movable):
    """S images of P prompts and N pairs among them; `labels` [N, K] are NaN where nobody said, `weights` [N] > 0."""

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    prompt_of: Tensor
    chosen: Tensor
    rejected: Tensor
    labels: Tensor
    weights: Tensor

    @property
    def num_images(self) -> int:
        """S."""
        return len(self.prompt_of)

    @property
    def lengths(self) -> Tensor:
        """A reward sums over nothing: 1 for each of the S images."""
        return torch.ones(len(self.prompt_of), device=self.prompt_of.device)


@dataclass(frozen=True)
class RewardFamily(Family):
    """Scores [S, K]: a reward for every image and head. There is no reference."""

    supplies = frozenset({"heads"})

    def pair_scores(
        self, model: Any, batch: Any, ref_chosen: Tensor | None = None, ref_rejected: Tensor | None = None
    ) -> PairScores:
        """As `Family.pair_scores`, with the heads' own margins, labels and weights."""
        assert ref_chosen is None
        assert ref_rejected is None
        rewards = self.score(model, batch).float()
        chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]
        margins = chosen - rejected
        lengths = torch.ones(len(margins), device=margins.device)
        # The common trainer has one margin per pair: the heads' deviations from it go beside it.
        deviations = margins - margins.mean(1, keepdim=True)
        return PairScores(
            chosen.mean(1), rejected.mean(1), lengths, lengths, weight=batch.weights,
            head_deviations=deviations, head_labels=batch.labels,
        )  # fmt: skip


def reward_family(reader: PixelReader) -> RewardFamily:
    """The family whose images are read by `reader`."""
    return RewardFamily(partial(encode_pairs, reader=reader), score_batch)


def score_batch(model: Any, batch: RewardBatch) -> Tensor:
    """Rewards [S, K] of a batch's images."""
    rewards: Tensor = model(batch.pixel_values, batch.input_ids, batch.attention_mask, batch.prompt_of)
    return rewards


def encode_pairs(
    groups: Sequence[ImageGroup], parts: Sequence[GroupPart], epoch: int, reader: PixelReader
) -> RewardBatch:
    """The parts' pairs, in their order, with each of their images once and each prompt once."""
    images: list[tuple[Path, Box | None]] = []
    prompt_of: list[int] = []
    sides: list[tuple[int, int]] = []
    for number, part in enumerate(parts):
        group = groups[part.group]
        pairs = [group.pairs[index] for index in part.pairs]
        # One part for all images of a prompt: the choice must not be learnt from what a crop left out of one of them.
        box = reader.crop(group.prompt_id, epoch)
        shown = sorted({place for pair in pairs for place in (pair.chosen, pair.rejected)})
        moved = {place: len(images) + count for count, place in enumerate(shown)}
        images += [(group.images[place], box) for place in shown]
        prompt_of += [number] * len(shown)
        sides += [(moved[pair.chosen], moved[pair.rejected]) for pair in pairs]
    rows = [groups[part.group].rows[index] for part in parts for index in part.pairs]
    places = torch.tensor(sides)
    return RewardBatch(
        reader.read(images), **reader.tokens([groups[part.group].prompt for part in parts]),
        prompt_of=torch.tensor(prompt_of), chosen=places[:, 0], rejected=places[:, 1],
        labels=torch.tensor([row.labels for row in rows], dtype=torch.float32),
        weights=torch.tensor([row.weight for row in rows], dtype=torch.float32),
    )  # fmt: skip
