"""The reference's scores, computed once with the policy before its first step: no second model in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from prefmill.core.errors import DivergedError
from prefmill.core.files import digest_json, digest_path
from prefmill.core.graceful_stop import Stopped
from prefmill.core.revisions import snapshot
from prefmill.core.stage import Task
from prefmill.distributed.collectives import from_all_ranks, num_ranks, rank_zero_says, wait_for_all
from prefmill.distributed.devices import device_kind, rank
from prefmill.distributed.sharding import uses_fsdp
from prefmill.store.kept_tensors import KeptTensors
from prefmill.store.missing import Progress, missing
from prefmill.training.cache_place import cache_place
from prefmill.training.config import TrainingConfig, weights_precision
from prefmill.training.data import Group

SPOT_CHECK_SHARE = 0.01
_TOLERANCE = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.1}  # of a response's summed log-likelihood, in nats
_log = logging.getLogger(__name__)
KeyT = TypeVar("KeyT")


@dataclass(frozen=True)
class GroupScoring:
    """How a family scores a group's responses with the reference.

    `content` is JSON that says all of what is scored; `score` gives a batch's scores and `join` makes one tensor of
    those of a group's batches. `in_step`: ranks hold parts of the model, and all have to run it equally often.
    """

    content: Callable[[Group], Any]
    batches: Callable[[Group], Sequence[Any]]
    score: Callable[[Any], Tensor]
    join: Callable[[Group, Sequence[Tensor]], Tensor]
    in_step: bool = False

    def of(self, group: Group) -> Tensor:
        """The group's scores, [S, ...] float64 on the CPU."""
        batches = self.batches(group)
        calls = max(from_all_ranks(len(batches))) if self.in_step else len(batches)
        # A rank with fewer batches runs its last one again: sharded weights are gathered by all ranks at once.
        found = [self.score(batches[min(call, len(batches) - 1)]).double().cpu() for call in range(calls)]
        return require_numbers(self.join(group, found[: len(batches)]))


def require_numbers(scores: Tensor) -> Tensor:
    """`scores`; raises DivergedError where one is NaN or infinite: kept, it would end every training that reads it."""
    if not bool(torch.isfinite(scores).all()):
        raise DivergedError(
            "the reference's scores are not numbers", got=f"{scores.dtype} with NaN or infinite entries",
            fix="set precision: bf16 where it is fp16, whose numbers end at 65,504, or download the model again",
        )  # fmt: skip
    return scores


def start_weights(task: Task, config: TrainingConfig) -> str:
    """What the weights are that training starts from, by content where they lie on this machine."""
    policy = task.optional_input("policy")
    base = policy.manifest.content_digest if policy else weights_of(str(config.model_name_or_path), config.revision)
    return base if config.lora_start is None else f"{base}+{digest_path(config.lora_start)}"


def weights_of(name: str, revision: str | None) -> str:
    """What a checkpoint's weights are: by content where it is a folder, else the commit that is in the hub's cache.

    To be asked when the checkpoint is loaded: a branch may have moved since, and other weights come under its name.
    """
    if Path(name).is_dir():
        return digest_path(Path(name))
    cached = snapshot(name, revision)
    return f"{name}@{cached.name if cached else revision}"


def computed_as(config: TrainingConfig) -> dict[str, Any]:
    """What rounds a reference's scores, whatever the family: another precision or strategy is another cache."""
    return {
        "precision": config.precision, "weights": weights_precision(config), "attention": config.attn_implementation,
        "fsdp": uses_fsdp(config), "deepspeed": config.deepspeed is not None,
        # Left out where unset, so that caches from before this key are still found.
        **({"quantization": config.quantization} if config.quantization else {}),
    }  # fmt: skip


def kept_reference(task: Task, weights: str, settings: Mapping[str, Any], device: torch.device) -> KeptTensors:
    """Where scores of these weights are kept, computed as `settings` say on this kind of device."""
    key = digest_json({"weights": weights, "settings": dict(settings), "device": device_kind(device)})
    return KeptTensors(cache_place(task, f"reference/{key}"))


def reference_scores(
    groups: Sequence[Group], scoring: GroupScoring, kept: KeptTensors, task: Task, precision: str
) -> list[Tensor]:
    """The reference's scores of each group's samples, [S, ...] float64 a group, from what is kept or computed.

    The model that scores must still be the reference. Ranks share the groups, the longest first, and every round of
    one a rank is kept before the next: a kill costs no more, and a stop that is asked for comes after a round (raises
    Stopped). One in a hundred of the scores that were kept is computed again; where it differs by more than rounding,
    all are.
    """
    # By content, not by place: another order of rows, or more of them, finds what is kept.
    keys = [digest_json(scoring.content(group)) for group in groups]
    members = dict(zip(keys, groups, strict=True))
    # Ranks that read the folder at different times would see different groups, and go different rounds.
    known = rank_zero_says(kept.read)
    held = {key: known[key] for key in members if key in known}
    if held and not _still_right(held, members, scoring, _TOLERANCE[precision]):
        held = {}
        rank_zero_says(kept.forget)
    # Groups of one round are then about as long on every rank, so that no rank waits long.
    order = sorted(members, key=lambda key: -members[key].num_tokens)
    for together in missing(order, held.__contains__, advance_together(task), "reference groups", at_once=num_ranks()):
        made = _round(together, members, scoring)
        if rank() == 0:
            kept.keep(made)
        held |= made
    return [held[key] for key in keys]


def _round(keys: Sequence[str], members: Mapping[str, Group], scoring: GroupScoring) -> dict[str, Tensor]:
    """The scores of up to one group a rank; a rank without one runs along where all have to run the model."""
    own = keys[rank()] if rank() < len(keys) else keys[0]
    made = {own: scoring.of(members[own])} if rank() < len(keys) or scoring.in_step else {}
    return {key: scores for part in from_all_ranks(made) for key, scores in part.items()}


def _still_right(
    held: Mapping[str, Tensor], members: Mapping[str, Group], scoring: GroupScoring, tolerance: float
) -> bool:
    """Whether this reference still gives what is kept, by one group in a hundred; says so where it does not."""
    chosen = list(held)[:: max(1, round(1 / SPOT_CHECK_SHARE))]
    worst = torch.stack([(scoring.of(members[key]) - held[key]).abs().max() for key in chosen]).max().item()
    right = all(from_all_ranks(worst <= tolerance))  # NaN is not
    if not right and rank() == 0:
        _log.warning(
            "cached reference scores differ from this reference by %.3g nats, more than %g: all %d are computed again",
            worst, tolerance, len(held),
        )  # fmt: skip
    return right


def keep_together(
    wanted: Collection[KeyT], held: Callable[[KeyT], bool], keep: Callable[[KeyT], None], task: Task, unit: str
) -> None:
    """Have `keep` make what of `wanted` is not `held`: ranks share it, and stop together after a round of one each."""
    # Rank 0 decides: one that looks later may see more, skip a key, and wait at a barrier nobody else comes to.
    known = rank_zero_says(lambda: {key for key in wanted if held(key)})
    for together in missing(wanted, known.__contains__, advance_together(task), unit, at_once=num_ranks()):
        for key in together[rank() : rank() + 1]:
            keep(key)
        # So that no rank ends the task at `advance`, or reads, before all have written.
        wait_for_all()


def advance_together(task: Task) -> Progress:
    """`Task.advance` for ranks that work in rounds: they stop together, when rank 0 sees that it was asked for."""

    def advance(done: int, total: int | None, unit: str) -> None:
        if rank() == 0:
            task.progress(done, total, unit)
        if done != total and rank_zero_says(task.stop_asked):
            raise Stopped(f"kept {done} of {total} {unit} and stopped")

    return advance
