"""The reference's errors: computed before the first step, with the adapter off, and kept for every trial and resume."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefmill.core.errors import InputError
from prefmill.core.files import digest_json
from prefmill.core.stage import Task
from prefmill.distributed.collectives import from_all_ranks, rank_zero_says
from prefmill.distributed.devices import rank
from prefmill.families.sdxl.data import PairImages
from prefmill.families.sdxl.family import PairReader, errors, predict_pairs
from prefmill.store.missing import in_batches
from prefmill.training.reference import keep_together, require_numbers

CHUNK = 32  # pairs a file: a killed run loses no more than that
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative to the error
_log = logging.getLogger(__name__)

Chunk = tuple[int, int]  # epoch, and which CHUNK of the pairs


@dataclass
class ReferenceErrors:
    """-m of winner and loser of every pair in every epoch, [2]; `settings` say what else a value hangs on.

    `at_once` pairs go through the UNet together, as in training: the same shapes give the same numbers.
    """

    pairs: Sequence[PairImages]
    reader: PairReader
    settings: dict[str, Any]
    at_once: int
    dtype: torch.dtype
    with_predictions: bool = False
    one_side_at_once: bool = False
    _places: dict[str, int] = field(init=False)
    _scores: dict[Chunk, Tensor] = field(init=False, default_factory=dict)
    _keys: dict[Chunk, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._places = {pair.pair_id: place for place, pair in enumerate(self.pairs)}
        if len(self._places) < len(self.pairs):
            raise InputError(
                "two pairs have one pair_id", got=f"{len(self.pairs)} pairs", fix="rerun build_image_pairs"
            )

    def scores(self, group: int, epoch: int) -> Tensor:
        """The scores of a pair's two images, [2] fp32; what the trainer takes for a reference."""
        chunk = (epoch, group // CHUNK)
        if chunk not in self._scores:
            self._scores[chunk] = self.reader.cache.load(self.key(chunk), "scores")["scores"]
        return self._scores[chunk][group % CHUNK]

    def holds(self, pair: PairImages) -> bool:
        """Whether this is one of the pairs."""
        return pair.pair_id in self._places

    def prediction(self, pair: PairImages, epoch: int) -> Tensor:
        """What the reference predicts for a pair's winner, [C, H, W]."""
        place = self._places[pair.pair_id]
        key, name = self.key((epoch, place // CHUNK)), _named(place % CHUNK)
        return self.reader.cache.load(key, name)[name]

    def key(self, chunk: Chunk) -> str:
        """What a chunk's values are determined by, in one name."""
        if chunk not in self._keys:
            self._keys[chunk] = self._key(*chunk)
        return self._keys[chunk]

    def _key(self, epoch: int, part: int) -> str:
        pairs = self.pairs[part * CHUNK : (part + 1) * CHUNK]
        read = self.reader
        content = [[pair.pair_id, read.texts.of(read.prompt(pair, epoch)), *read.keys(pair, epoch)] for pair in pairs]
        said = [
            content, epoch, read.seed, self.at_once, self.with_predictions and "each", self.one_side_at_once,
            self.settings,
            # Nothing is added without an offset: errors kept before there was one stay valid.
            *filter(None, {read.offset(pair) for pair in pairs}),
        ]  # fmt: skip
        return f"{digest_json(said)}-reference"

    def compute(self, model: Any, used: Iterable[tuple[int, int]], device: torch.device, task: Task) -> None:
        """Have the values of all (pair, epoch) in `used` kept, computing those that are not.

        `model` is on `device`, with its adapter off or still the reference. Ranks share the chunks, and stop together
        after one where that is asked for. What is kept and not what this model gives is computed again, all of it.
        """
        wanted = sorted({(epoch, group // CHUNK) for group, epoch in used})
        cache = self.reader.cache
        held = rank_zero_says(lambda: {chunk for chunk in wanted if cache.holds(self.key(chunk))})
        if held and not self._still_right(model, min(held), device):
            held = set()
        keep_together(
            wanted, held.__contains__, lambda chunk: cache.save(self.key(chunk), self._values(model, chunk, device)),
            task, f"x {CHUNK} reference errors",
        )  # fmt: skip

    def _values(self, model: Any, chunk: Chunk, device: torch.device) -> dict[str, Tensor]:
        found = [self._run(model, pairs, chunk[0], device) for pairs in self._batches(chunk)]
        values = {"scores": require_numbers(torch.cat([scores for scores, _ in found]))}
        if self.with_predictions:
            # Each by itself: with a bucket_step pairs differ in size. Cloned, as no file may hold views of one storage.
            each = [prediction.clone() for _, predictions in found for prediction in predictions]
            values |= {_named(place): prediction for place, prediction in enumerate(each)}
        return values

    def _batches(self, chunk: Chunk) -> Sequence[Sequence[PairImages]]:
        return in_batches(self.pairs[chunk[1] * CHUNK : (chunk[1] + 1) * CHUNK], self.at_once)

    def _run(self, model: Any, pairs: Sequence[PairImages], epoch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scores [n, 2] and the winners' predictions [n, C, H, W]; a short batch is filled up with its last pair."""
        n = len(pairs)
        # A short batch would run other kernels, whose last bits differ from those of training.
        filled = [*pairs, *[pairs[-1]] * (self.at_once - n)]
        batch = self.reader.batch(filled, [epoch] * len(filled)).to(device)
        with torch.no_grad(), adapter_off(model):
            predictions, target = predict_pairs(model, batch, self.reader.schedule, self.one_side_at_once)
        scores = torch.stack((-errors(predictions, target)).chunk(2), dim=1)
        # The UNet computed predictions in this dtype: nothing is lost, and the file is half as large.
        return scores[:n].cpu(), predictions[:n].to(self.dtype).cpu()

    def _still_right(self, model: Any, chunk: Chunk, device: torch.device) -> bool:
        """Whether this model still gives what is kept for the chunk's first pairs; says so where it does not."""
        pairs = self._batches(chunk)[0]
        kept = self.reader.cache.load(self.key(chunk), "scores")["scores"][: len(pairs)]
        again, _ = self._run(model, pairs, chunk[0], device)
        worst = ((again - kept).abs() / kept.abs().clamp_min(1e-6)).max().item()
        right = all(from_all_ranks(worst <= _TOLERANCE[self.dtype]))
        if not right and rank() == 0:
            _log.warning(
                "cached reference errors differ from this reference's by a share of %.3g, more than %g: all are "
                "computed again", worst, _TOLERANCE[self.dtype],
            )  # fmt: skip
        return right


def _named(place: int) -> str:
    return f"prediction_{place}"


def adapter_off(model: Any) -> AbstractContextManager[Any]:
    """The base alone while this is entered; never run a backward pass inside, it would miss the adapter."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def used_by(plan: Iterable[Any]) -> set[tuple[int, int]]:
    """The (pair, epoch) that a plan's microbatches ask for; a rank without pairs runs pair 0."""
    return {(part.group, item.epoch) for item in plan for part in item.parts} | {(0, item.epoch) for item in plan}
