"""The SDXL family of the preference trainer: a sample's score is the negative error of the model's prediction."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.data import PairImages
from prefmill.families.sdxl.encoding import ImageKeys, Size, TextKeys, encode_images, encode_texts
from prefmill.families.sdxl.loading import SdxlFolder
from prefmill.families.sdxl.noise import Schedule, draw
from prefmill.store.missing import Progress, silent
from prefmill.store.pictures import image_size
from prefmill.store.tensor_cache import TensorCache
from prefmill.training.batches import GroupPart, Movable
from prefmill.training.family import Family
from prefmill.training.objectives import PairScores


@dataclass(frozen=True)
class SdxlBatch(Movable):
    """N winners, then N losers: S = 2N samples. Latents and noise [S, C, H, W] and time ids [S, 6] are fp32.

    `weight` [N] is what the pairs count, `soft_label` [N] their label, `ref_predictions` [N, C, H, W] what the
    reference predicts for the winners, where the objective asks for them.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    embeddings: Tensor
    pooled: Tensor
    time_ids: Tensor
    weight: Tensor
    soft_label: Tensor | None = None
    ref_predictions: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """N."""
        return len(self.latents) // 2

    @property
    def chosen(self) -> Tensor:
        """The winners' places."""
        return torch.arange(self.num_pairs, device=self.latents.device)

    @property
    def rejected(self) -> Tensor:
        """The losers' places."""
        return self.chosen + self.num_pairs

    @property
    def num_images(self) -> int:
        """S."""
        return len(self.latents)

    @property
    def lengths(self) -> Tensor:
        """Ones: an error is a mean already."""
        return torch.ones(len(self.latents), device=self.latents.device)

    def side(self, places: Tensor) -> SdxlBatch:
        """The samples at these places, which are no pairs any more."""
        names = ("latents", "noise", "timesteps", "embeddings", "pooled", "time_ids")
        return replace(self, **{name: getattr(self, name)[places] for name in names})


@dataclass(frozen=True)
class PairReader:
    """Makes batches of pairs from the caches; the noise follows from (seed, pair, epoch)."""

    cache: TensorCache
    images: ImageKeys
    texts: TextKeys
    schedule: Schedule
    seed: int
    random_flip: bool = False
    caption_dropout: float = 0.0
    noise_offset: float = 0.0

    def prompt(self, pair: PairImages, epoch: int) -> str | None:
        """The prompt that an epoch shows with a pair; none in a share `caption_dropout` of them."""
        share = 0.0 if pair.held_out else self.caption_dropout
        chance = random.Random(f"{self.seed}:{epoch}:{pair.pair_id}").random() if share else 1.0
        return None if chance < share else pair.prompt

    def size(self, pair: PairImages) -> Size:
        """The size in pixels that both images of a pair are brought to: the winner's bucket."""
        return self.images.size(*image_size(pair.images[0])) if self.images.bucket_step else self.images.size(1, 1)

    def flipped(self, pair: PairImages, epoch: int) -> bool:
        """Whether an epoch sees both images of a pair mirrored."""
        # From another seed than the noise: else an epoch would mirror just the pairs with certain timesteps.
        may = self.random_flip and not pair.held_out
        return may and bool(draw(self.seed + 1, pair.pair_id, epoch, (1,), 2).timestep)

    def offset(self, pair: PairImages) -> float:
        """How far the noise of a pair's channels is moved."""
        return 0.0 if pair.held_out else self.noise_offset

    def keys(self, pair: PairImages, epoch: int) -> list[str]:
        """The keys of the latents of winner and loser in an epoch."""
        flip = self.flipped(pair, epoch)
        return [self.images.of(digest, flip, self.size(pair)) for digest in pair.digests]

    def encode(
        self, folder: SdxlFolder, seen: Sequence[tuple[PairImages, int]], vae_batch_size: int, device: torch.device,
        advance: Progress = silent,
    ) -> None:  # fmt: skip
        """Have what batches of these pairs and epochs need in the cache, and what stands for no prompt."""
        files = {
            (path, digest, self.flipped(pair, epoch), self.size(pair))
            for pair, epoch in seen
            for path, digest in zip(pair.images, pair.digests, strict=True)
        }
        encode_images(sorted(files), folder, self.images, self.cache, vae_batch_size, device, advance)
        prompts = [None, *sorted({pair.prompt for pair, _ in seen})]
        encode_texts(prompts, folder, self.texts, self.cache, device, advance)

    def batch(self, pairs: Sequence[PairImages], epochs: Sequence[int]) -> SdxlBatch:
        """These pairs, each as its epoch has it."""
        kept = [
            [self.cache.load(key) for key in self.keys(pair, epoch)] for pair, epoch in zip(pairs, epochs, strict=True)
        ]
        sides = [pair[0] for pair in kept] + [pair[1] for pair in kept]
        latents = torch.stack([side["latents"] for side in sides])
        shape, given = tuple(latents.shape[1:]), list(zip(pairs, epochs, strict=True))
        # Winner and loser share timestep and noise, as in Diffusion-DPO's code: their difference then varies less.
        draws = [
            draw(
                self.seed, pair.pair_id, epoch, shape, self.schedule.num_timesteps, self.offset(pair),
                self.schedule.sample,
            )
            for pair, epoch in given
        ] * 2  # fmt: skip
        said = [self.prompt(pair, epoch) for pair, epoch in given]
        texts = [self.cache.load(self.texts.of(prompt)) for prompt in said] * 2
        labels = [pair.soft_label for pair in pairs]
        return SdxlBatch(
            latents,
            torch.stack([one.noise for one in draws]),
            torch.tensor([one.timestep for one in draws]),
            torch.stack([text["embeddings"] for text in texts]),
            torch.stack([text["pooled"] for text in texts]),
            torch.stack([side["time_ids"] for side in sides]),
            torch.tensor([pair.weight for pair in pairs]),
            None if None in labels else torch.tensor(labels),
        )


@dataclass(frozen=True)
class SdxlFamily(Family):
    """Scores pairs by their weighted errors; with `residuals` the winner's residuals go along.

    Where the gradient goes through the `winner_alone`, the losers run without one, which saves their backward pass.
    """

    supplies = SdxlPreferenceConfig.supplies

    schedule: Schedule
    residuals: bool = False
    winner_alone: bool = False

    def pair_scores(
        self, model: Any, batch: Any, ref_chosen: Tensor | None = None, ref_rejected: Tensor | None = None
    ) -> PairScores:
        """As `Family.pair_scores`; the reference's scores are -m, min-SNR's weights fall on both alike."""
        predictions, target = predict_pairs(model, batch, self.schedule, self.winner_alone)
        # Of the winners: the losers have the same timesteps.
        weights = self.schedule.weights(batch.timesteps[: batch.num_pairs])
        chosen, rejected = (-errors(predictions, target)).chunk(2)
        given = [chosen, rejected, ref_chosen, ref_rejected]
        if weights is not None:
            given = [None if side is None else side * weights for side in given]
        scores = PairScores(
            given[0], given[1], batch.lengths[batch.chosen], batch.lengths[batch.chosen], given[2], given[3],  # type: ignore[arg-type]
            soft_label=batch.soft_label, weight=batch.weight,
        )  # fmt: skip
        return self._with_residuals(scores, predictions, target, batch, weights) if self.residuals else scores

    def _with_residuals(
        self, scores: PairScores, predictions: Tensor, target: Tensor, batch: SdxlBatch, weights: Tensor | None
    ) -> PairScores:
        """The residuals are scaled so that the mean of their squares is the weighted error."""
        assert batch.ref_predictions is not None
        # The root, because residuals are squared later.
        n, scale = batch.num_pairs, 1.0 if weights is None else weights.sqrt()[:, None]
        residual = (predictions[:n] - target[:n]).flatten(1) * scale
        reference = (batch.ref_predictions.float() - target[:n]).flatten(1) * scale
        return replace(scores, chosen_residual=residual, ref_chosen_residual=reference)


def sdxl_family(
    reader: PairReader, predictions: Callable[[PairImages, int], Tensor] | None, winner_alone: bool = False
) -> SdxlFamily:
    """The family whose pairs `reader` encodes; with the reference's `predictions` the winners have residuals."""

    def encode(groups: Sequence[PairImages], parts: Sequence[GroupPart], epoch: int) -> SdxlBatch:
        pairs = [groups[part.group] for part in parts]
        batch = reader.batch(pairs, [epoch] * len(pairs))
        if predictions is None:
            return batch
        return replace(batch, ref_predictions=torch.stack([predictions(pair, epoch) for pair in pairs]))

    def score(model: Any, batch: SdxlBatch) -> Tensor:
        return -errors(*predict(model, batch, reader.schedule))

    return SdxlFamily(encode, score, reader.schedule, predictions is not None, winner_alone)


def predict_pairs(model: Any, batch: SdxlBatch, schedule: Schedule, one_side_at_once: bool) -> tuple[Tensor, Tensor]:
    """As `predict`; or the winners first and then, without a gradient, the losers."""
    if not one_side_at_once:
        return predict(model, batch, schedule)
    winners = predict(model, batch.side(batch.chosen), schedule)
    # dspo with a fixed factor and sft use the losers' errors as numbers alone.
    with torch.no_grad():
        losers = predict(model, batch.side(batch.rejected), schedule)
    return torch.cat([winners[0], losers[0]]), torch.cat([winners[1], losers[1]])


def predict(model: Any, batch: SdxlBatch, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """What the model predicts for the noised samples and what it should, [S, C, H, W], fp32 at least."""
    noised = schedule.add(batch.latents, batch.noise, batch.timesteps)
    dtype = next(model.parameters()).dtype
    times = schedule.times(batch.timesteps, batch.latents)
    given = (batch.embeddings.to(dtype), batch.pooled.to(dtype), batch.time_ids)
    prediction = schedule.call(model, noised.to(dtype), times, *given)
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.to(wide), schedule.target(batch.latents, batch.noise, batch.timesteps)


def errors(predictions: Tensor, target: Tensor) -> Tensor:
    """m, [S]: the mean over channels and places of the squared difference."""
    return ((predictions - target) ** 2).flatten(1).mean(1)
