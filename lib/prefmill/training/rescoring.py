"""A finished folder scored again on a few training samples: what was saved must be what was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefmill.core.errors import PipelineError
from prefmill.core.precision import Precision
from prefmill.training.batches import AnyGroup, GroupPart
from prefmill.training.family import Family

# Few, as after a sharded training one rank scores them alone, in fp32 on its CPU.
NUM_SAMPLES = 8
# How far the saved folder may be from the trained model, as a share of what training changed: docs/decisions/0107.
LOST_SHARE: dict[Precision, float] = {"fp32": 0.01, "bf16": 0.1, "fp16": 0.1}
# How far the model in training may be from the same weights in fp32, as a share of the scores themselves.
COMPUTED: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
_ROUNDING = 1e-5  # of fp32 sums, as a share of the scores


@dataclass(frozen=True)
class Rescoring:
    """Scores, [S] float64 in nats, of the same few training samples under any model of a family.

    `load` gives a folder's whole model in fp32 as `score` runs it; `live` scores the model in training. `quantized`:
    the model in training computes with a rounded base that the finished one does not have.
    """

    load: Callable[[str], Any]
    score: Callable[[Any, torch.device], Tensor]
    live: Callable[[Any, torch.device], Tensor]
    quantized: bool = False


@dataclass(frozen=True)
class Scores:
    """The samples' scores, [S] each: of the start, of the trained weights in fp32, and of the saved folder."""

    start: Tensor
    trained: Tensor
    saved: Tensor

    @property
    def difference(self) -> float:
        """The largest difference of a sample's score that saving made, in nats."""
        return float((self.saved - self.trained).abs().max())

    @property
    def lost_share(self) -> float:
        """|saved - trained| / |trained - start|: 0: all of the training was saved, 1: maybe nothing of it."""
        effect = float((self.trained - self.start).norm())
        lost = float((self.saved - self.trained).norm())
        return lost / effect if effect else float(lost > 0)

    def faithful(self, precision: Precision) -> bool:
        """Whether saving in this precision kept what training changed; False where a score is not a number."""
        effect, size = (float(value.norm()) for value in (self.trained - self.start, self.trained))
        # The second term lets a training pass that changed next to nothing, where rounding of sums is all there is.
        return float((self.saved - self.trained).norm()) <= LOST_SHARE[precision] * effect + _ROUNDING * size


def check_live(live: Tensor, trained: Tensor, precision: Precision) -> None:
    """Raises PipelineError where the model in training, [S], was not these weights: one was lost on the way."""
    # `not <=` in place of `>`: NaN compares false with everything, and has to be refused.
    if not float((live - trained).norm()) <= COMPUTED[precision] * float(trained.norm()):
        raise PipelineError(
            "the weights to publish are not those of the model in training",
            got=f"scores that differ by up to {float((live - trained).abs().max()):.3g} nats",
            expected=f"at most {COMPUTED[precision]:.1%} of {float(trained.norm()):.3g}",
            fix="lower learning_rate if the loss grew; else this is a bug: report it, the last checkpoint is kept",
        )  # fmt: skip


def shortest_pairs(groups: Sequence[AnyGroup], size: Callable[[Any, Any], int]) -> list[GroupPart]:
    """The few pairs that are cheapest to score, `size` being a group's and a pair's."""
    sizes = [
        (size(group, pair), place, index)
        for place, group in enumerate(groups)
        for index, pair in enumerate(group.pairs)
    ]
    return [GroupPart(place, (index,)) for _, place, index in sorted(sizes)[:NUM_SAMPLES]]


def pair_scorer(
    family: Family, groups: Sequence[AnyGroup], parts: Sequence[GroupPart]
) -> Callable[[Any, torch.device], Tensor]:
    """What scores both sides of the parts' pairs, [S], one part after the other."""

    def score(model: Any, device: torch.device) -> Tensor:
        sides = []
        for part in parts:
            batch = family.encode(groups, [part], 0).to(device)
            scores = family.score(model, batch).double()
            # Masked diffusion has a value for every draw, other families one a sample.
            scores = scores.reshape(len(scores), -1).mean(1)
            sides += [scores[batch.chosen], scores[batch.rejected]]
        return torch.cat(sides).cpu()

    return score
