"""The masked-diffusion family of the preference trainer: a value for every draw, and their live variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefmill.distributed.collectives import from_all_ranks
from prefmill.families.causal.group_layout import compared
from prefmill.families.mdlm.blocks import block_spans
from prefmill.families.mdlm.config import DiffusionPreferenceConfig, DiffusionTrainingConfig, Sampling
from prefmill.families.mdlm.estimator import Draws, draws_of, recommend_draws
from prefmill.families.mdlm.scorer import DiffusionBatch, encode_samples, score_batch
from prefmill.training.batches import GroupPart
from prefmill.training.data import Group
from prefmill.training.family import Family, Reference
from prefmill.training.objective_names import Need
from prefmill.training.objectives import PairScores


@dataclass(frozen=True)
class Drawing:
    """How rows are drawn: the number of draws, which kind, from which seed; the power of an upper bound and the blocks
    that draws are made in, if any.
    """

    num_draws: int
    sampling: Sampling
    seed: int
    # Not in the text by which references are kept: those made before these keys are still found.
    upper_power: float | None = field(default=None, repr=False)
    block_length: int | None = field(default=None, repr=False)

    def of(self, prompt: list[int], response: list[int], epoch: int) -> Draws:
        """The draws of a row in an epoch: of each block after what precedes it, a draw of the row has one of each."""
        tokens = [*prompt, *response]
        blocks = [
            draws_of(tokens[:end], end - start, self.num_draws, self.sampling, self.seed, epoch)
            for start, end in block_spans(len(prompt), len(tokens), self.block_length)
        ]
        weights = [np.broadcast_to(drawn.weights[:, None], drawn.masked.shape) for drawn in blocks]
        return Draws(np.concatenate([drawn.masked for drawn in blocks], axis=1), np.concatenate(weights, axis=1))


@dataclass
class LiveVariance:
    """The variance that one draw has in a pair's margin, and how many draws it asks for.

    `in_use` of the `most` draws that were made are scored; where `adaptive` they follow the recommendation.
    """

    most: int
    beta: float
    tolerance: float
    adaptive: bool = False
    in_use: int = field(init=False)
    _sum: Tensor | float = field(default=0.0, init=False)
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.in_use = min(4, self.most) if self.adaptive else self.most

    def add(self, variances: Tensor) -> None:
        """Take in the variance of one draw's margin for each pair, [N], squared nats."""
        self._sum = self._sum + variances.sum().double()  # read when it is asked for: reading stops a GPU
        self._count += len(variances)

    def report(self) -> dict[str, float]:
        """The mean since the last report and what follows from it, the same on every rank; empty without draws."""
        total, count = map(sum, zip(*from_all_ranks((float(self._sum), self._count)), strict=True))
        self._sum, self._count = 0.0, 0
        if count == 0:
            return {}
        variance = total / count
        # Beyond the draws that were made too: the log then says that more would be needed.
        recommended = recommend_draws(variance, self.beta, self.tolerance, max(self.most, 1024))
        return {"draw_variance": variance, "recommended_draws": recommended, "draws": self.in_use}

    def follow(self, report: dict[str, Any]) -> None:
        """Use what a report recommends from now on: at least 2 draws, so that there still is a variance.

        A variance of 0 recommends nothing: at the first step the policy is the reference, and every margin is 0.
        """
        if self.adaptive and report.get("draw_variance", 0) > 0:
            self.in_use = int(min(self.most, max(2, report["recommended_draws"])))


@dataclass(frozen=True)
class DiffusionFamily(Family):
    """Scores a sample by the mean over its draws; references are [N, n], a value for each of the same draws.

    Where upper bounds are wanted they are a last column of both, and all draws are in use.
    """

    supplies: ClassVar[frozenset[Need]] = DiffusionPreferenceConfig.supplies

    live: LiveVariance | None = None

    def pair_scores(
        self, model: Any, batch: Any, ref_chosen: Tensor | None = None, ref_rejected: Tensor | None = None
    ) -> PairScores:
        """As `Family.pair_scores`; in training with the draws in use, and with their variance noted."""
        # Evaluation takes all draws: its figures would else change with the number in use.
        num_draws = self.live.in_use if self.live and model.training else batch.weights.shape[1]
        batch = batch.first(num_draws)
        found = self.score(model, batch)
        values, upper = (found, None) if batch.upper_power is None else (found[:, :-1], found[:, -1])
        sides = [values[batch.chosen], values[batch.rejected]]
        references = [None if ref is None else ref[:, :num_draws] for ref in (ref_chosen, ref_rejected)]
        if self.live and model.training and num_draws > 1:
            self.live.add(margin_variance(sides, references))
        lengths = batch.lengths.to(values.dtype)
        means = [None if ref is None else ref.mean(1) for ref in references]
        return PairScores(
            sides[0].mean(1), sides[1].mean(1), lengths[batch.chosen], lengths[batch.rejected], means[0], means[1],
            rejected_upper=None if upper is None else upper[batch.rejected],
            ref_rejected_upper=None if upper is None or ref_rejected is None else ref_rejected[:, -1],
        )  # fmt: skip


def diffusion_family(drawing: Drawing, live: LiveVariance | None = None) -> DiffusionFamily:
    """The family whose rows are drawn by `drawing`; fine-tuning has groups of one response, its pair with itself."""
    return DiffusionFamily(partial(encode_pairs, drawing=drawing), score_batch, live)


def fill_groups(
    groups: Sequence[Group], config: DiffusionTrainingConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Group]:
    """Groups whose responses go on in end tokens up to a multiple of `answer_block_tokens`, or to `max_length`.

    Of the answer's tokens, or of the text's for a model that writes in blocks, which are counted from its start.

    The model learns them like any other token, and so where answers stop. The width follows from the row alone:
    filled up to the longest of a microbatch, as by LLaDA's guidelines, a model trained row by row learns no stop.
    """
    end, block = tokenizer.eos_token_id, config.answer_block_tokens
    assert isinstance(end, int)

    def filled(prompt: list[int], response: list[int]) -> list[int]:
        before = 0 if config.block_length is None else len(prompt)
        width = min(config.max_length - len(prompt), -(-(before + len(response)) // block) * block - before)
        return response + [end] * (width - len(response))

    return [replace(group, responses=[filled(group.prompt, one) for one in group.responses]) for group in groups]


def encode_pairs(groups: Sequence[Group], parts: Sequence[GroupPart], epoch: int, drawing: Drawing) -> DiffusionBatch:
    """Every distinct response of the parts' pairs as a sample with its draws in `epoch`."""
    prompted, chosen, rejected = compared(groups, parts)
    samples = [(prompt, response) for prompt, responses in prompted for response in responses]
    draws = [drawing.of(*sample, epoch) for sample in samples]
    return encode_samples(samples, draws, chosen, rejected, drawing.upper_power)


def encode_responses(group: Group, epoch: int, drawing: Drawing) -> DiffusionBatch:
    """All responses of a group, with the draws they have in `epoch`; no preferences."""
    samples = [(group.prompt, response) for response in group.responses]
    draws = [drawing.of(*sample, epoch) for sample in samples]
    return encode_samples(samples, draws, upper_power=drawing.upper_power)


def by_epoch(values: Sequence[Tensor]) -> Reference:
    """The reference of groups whose draws' values are [S, E, n]: [S, n] in each of E epochs."""
    return lambda group, epoch: values[group][:, epoch]


def margin_variance(sides: Sequence[Tensor], references: Sequence[Tensor | None]) -> Tensor:
    """The variance of each pair's margin, as if of one draw, [N], from values [N, n] of both sides; n > 1.

    Half the squared difference of the two halves' means: each half is a sample by itself, while single draws of a
    block balance each other. The sides' draws are independent of each other, so their variances add.
    """
    # The means of halves of n/2 draws differ by d with E[d^2] = 4 v / n: v is d^2 n / 4.
    num_draws = sides[0].shape[1] // 2 * 2
    total = torch.zeros(len(sides[0]), device=sides[0].device)
    for values, reference in zip(sides, references, strict=True):
        difference = (values if reference is None else values - reference).detach()
        halves = difference[:, :num_draws].reshape(len(difference), 2, -1).mean(2)
        total = total + (halves[:, 0] - halves[:, 1]) ** 2 * (num_draws / 4)
    return total
