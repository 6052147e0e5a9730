"""What every pair did at every step: to `margins_log.jsonl`, to one .npy a step, and as means to the tracker."""

from __future__ import annotations

import logging
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefmill.core.files import append_row
from prefmill.core.statistics import correlation
from prefmill.distributed.collectives import from_all_ranks
from prefmill.distributed.devices import has_gpu
from prefmill.training.objectives import Objective, PairScores, Settings

SPEED = "speed"


class Speed:
    """Counts a rank's tokens, or images, between two log lines; a second of them is of all work, evaluation too."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / SPEED / f"rank{rank}.jsonl"
        self._count, self._unit, self._since = 0, "tokens", time.monotonic()

    def add(self, count: int, unit: str = "tokens") -> None:
        """Take in a microbatch of so many tokens, padding and prompts included, or of so many images."""
        self._count, self._unit = self._count + count, unit

    def window(self, step: int) -> dict[str, float]:
        """`tokens_per_second`, or `images_per_second`, since the last call; `peak_memory_gb` since the start; filed.

        Returns them for the tracker: the sum and the highest over ranks, and each rank's as `rank0/...` where there are
        several. Every rank must call.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = f"{self._unit}_per_second"
        own = {rate: self._count / seconds, "peak_memory_gb": peak_memory_gb()}
        append_row(self._path, {"step": step, **own})
        self._count, self._since = 0, time.monotonic()
        ranks = from_all_ranks(own)
        each = {f"rank{n}/{name}": value for n, values in enumerate(ranks) for name, value in values.items()}
        return {
            rate: sum(values[rate] for values in ranks),
            "peak_memory_gb": max(values["peak_memory_gb"] for values in ranks),
            **(each if len(ranks) > 1 else {}),
        }


def peak_memory_gb() -> float:
    """The most this process has held, in GB of 2^30 bytes: of its GPU, or of the host where there is none."""
    if has_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts it in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


MARGINS = "margins"
LOG = "margins_log.jsonl"
ALARMS = "alarms.jsonl"
CHOSEN_DROP = 0.5  # nats per token: e^-0.5 of the likelihood at every token


class Telemetry:
    """Collects the pairs of an optimizer step over its microbatches and ranks; rank 0 writes them when it is taken."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder / MARGINS
        self._rank = rank
        self.speed = Speed(folder, rank)
        self._held: list[tuple[list[str], dict[str, torch.Tensor]]] = []
        self._window: list[dict[str, Any]] = []
        self._folder.mkdir(parents=True, exist_ok=True)

    def add(self, pair_ids: list[str], scores: PairScores, objective: Objective, settings: Settings) -> None:
        """Take in the pairs of one microbatch; their values stay on the device until the step is taken."""
        columns = self.columns(scores, objective, settings)
        # Not detached, they would hold the graph of every microbatch until the step is taken.
        self._held.append((pair_ids, {name: column.detach() for name, column in columns.items()}))

    def columns(self, scores: PairScores, objective: Objective, settings: Settings) -> dict[str, torch.Tensor]:
        """The values of every pair by name, [N] each."""
        columns = {
            "chosen_logps": scores.chosen,
            "rejected_logps": scores.rejected,
            "margin": scores.margin,
            "chosen_length": scores.chosen_length,
            "rejected_length": scores.rejected_length,
            "gradient_coefficient": gradient_coefficient(scores, objective, settings),
        }
        if scores.ref_chosen is not None and scores.ref_rejected is not None:
            columns |= {"ref_chosen_logps": scores.ref_chosen, "ref_rejected_logps": scores.ref_rejected}
        return columns

    def step(self, step: int, epoch: int) -> None:
        """Write the pairs of optimizer step `step` (from 1) of `epoch` (from 0), those of the first rank first.

        A repeated step writes them again. Every rank must call.
        """
        held, self._held = self._held, []
        own = [row for pair_ids, columns in held for row in _rows(pair_ids, columns)]
        rows = [row for rows in from_all_ranks(own) for row in rows]
        if self._rank == 0:
            append_row(self._folder / LOG, *({"step": step, "epoch": epoch, **row} for row in rows))
            folder = self._folder / f"epoch_{epoch:03}"
            folder.mkdir(exist_ok=True)
            np.save(folder / f"step_{step:05}.npy", np.array([row["margin"] for row in rows], dtype=np.float32))
        self._window += [{**row, "step": step} for row in rows]

    def means(self) -> dict[str, float]:
        """Means over the pairs of all ranks since the last call: margin, accuracy, that of "longer wins", likelihoods.

        `chosen_change` is how much likelier the chosen side is than under the reference, in nats per token;
        `length_correlation` is that of margin and length difference: near 1 in a model that learns lengths alone.
        """
        rows, self._window = self._window, []
        if not rows:
            return {}
        changes = [
            (row["chosen_logps"] - row["ref_chosen_logps"]) / row["chosen_length"] if "ref_chosen_logps" in row else 0.0
            for row in rows
        ]
        change = _mean(changes)
        if change < -CHOSEN_DROP and self._rank == 0:
            # The model unlearns what it is to prefer.
            told = f"chosen responses are {-change:.2f} nats per token less likely than under the reference"
            alarm(self._folder.parent, rows[-1]["step"], told, "lower learning_rate, or mix in sft by loss_type")
        return {
            "margin": _mean([row["margin"] for row in rows]),
            "accuracy": _mean([win_of(row["margin"]) for row in rows]),
            "length_accuracy": _mean([win_of(row["chosen_length"] - row["rejected_length"]) for row in rows]),
            "chosen_logps": _mean([row["chosen_logps"] for row in rows]),
            "rejected_logps": _mean([row["rejected_logps"] for row in rows]),
            "chosen_change": change,
            "length_correlation": correlation(
                [row["margin"] for row in rows], [row["chosen_length"] - row["rejected_length"] for row in rows]
            ),
        }

    def evaluated(self, losses: torch.Tensor, margins: torch.Tensor, pair_ids: Sequence[str]) -> dict[str, float]:
        """What an evaluation reports of its pairs' losses and margins, [N] float64 each."""
        wins = [win_of(margin) for margin in margins.tolist()]
        return {
            "eval_loss": losses.mean().item(),
            "eval_margin": margins.mean().item(),
            "eval_accuracy": _mean(wins),
            "eval_f1": f1_by_coin(wins, pair_ids),
        }


def alarm(logs: Path, step: int, told: str, fix: str) -> None:
    """Say, in the log and where the console looks after the training, that it is not as it should be."""
    append_row(logs / ALARMS, {"step": step, "alarm": told, "fix": fix})
    logging.getLogger(__name__).warning("step %d: %s", step, told)


def f1_by_coin(wins: Sequence[float], pair_ids: Sequence[str]) -> float:
    """F1 of "the first side is better", a coin of each pair's id saying which side comes first.

    `wins` are 1 where the chosen side has the higher score, 1/2 for a tie. Were the chosen side always the first, a
    guess would have 2/3; by the coin it has 1/2.
    """
    first = [random.Random(pair_id).random() < 0.5 for pair_id in pair_ids]
    found = sum(win for win, is_first in zip(wins, first, strict=True) if is_first)
    wrong = sum(1 - win for win in wins)  # missed where the chosen side is first, a false alarm where it is second
    return 2 * found / (2 * found + wrong) if found + wrong else 0.5


def gradient_coefficient(scores: PairScores, objective: Objective, settings: Settings) -> torch.Tensor:
    """-dL/ds of the chosen score, [N]: gradient weight of the pair (b s(-bD) for the sigmoid objective)."""
    # The graph begins at the scores: the model's own is not walked a second time.
    chosen = scores.chosen.detach().requires_grad_()
    detached = replace(scores, chosen=chosen, rejected=scores.rejected.detach(), chosen_whole=None)
    with torch.enable_grad():
        # A loss depends on its own pair alone, so the gradient of the sum is that of every pair.
        (gradient,) = torch.autograd.grad(objective.loss(detached, settings).sum(), chosen)
    return -gradient


def _rows(pair_ids: list[str], columns: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """A row for every pair, from one copy off the device."""
    values = torch.stack(list(columns.values())).T.tolist()
    return [
        {"pair_id": pair_id, **dict(zip(columns, row, strict=True))}
        for pair_id, row in zip(pair_ids, values, strict=True)
    ]


def win_of(difference: float) -> float:
    """1 where a side is ahead by `difference` > 0, 1/2 for a tie, else 0."""
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
