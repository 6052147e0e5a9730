"""The reference's scores, computed once with the policy before its first step: no second model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from prefmill.core.errors import ArtifactError
from prefmill.core.files import digest_json, digest_path
from prefmill.core.stage import Task
from prefmill.store.tensor_cache import TensorCache
from prefmill.training.config import TrainingConfig
from prefmill.training.data import Group

GroupT = TypeVar("GroupT")
SPOT_CHECK_SHARE = 0.01
_TOLERANCE = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.1}  # of a response's summed log-likelihood, in nats


def reference_key(groups: Sequence[Group], weights: str, settings: Mapping[str, Any]) -> str:
    """What cached scores of token groups hold for: every token id, the reference's weights, how they were computed."""
    return content_key([[group.prompt, group.responses] for group in groups], weights, settings)


def content_key(content: Any, weights: str, settings: Mapping[str, Any]) -> str:
    """What cached scores hold for; `content` is JSON that says all of what was scored."""
    return digest_json({"groups": digest_json(content), "weights": weights, "settings": dict(settings)})


def start_weights(task: Task, config: TrainingConfig) -> str:
    """What the weights are that training starts from, by content where they lie on this machine."""
    policy = task.optional_input("policy")
    if policy is not None:
        return policy.manifest.content_digest
    return weights_of(str(config.model_name_or_path), config.revision)


def weights_of(name: str, revision: str | None) -> str:
    """What a checkpoint's weights are: by content where it is a folder, else its name on the hub."""
    return digest_path(Path(name)) if Path(name).is_dir() else f"{name}@{revision}"


def reference_scores(
    groups: Sequence[GroupT], score: Callable[[GroupT], Tensor], cache: TensorCache, key: str, precision: str
) -> list[Tensor]:
    """The reference's scores of a group's samples, [S, ...] fp32 for each group, from the cache or computed and kept.

    `score` must still be the reference. Ranks share the work. Cached scores are recomputed for one group in a
    hundred; raises ArtifactError when one differs by more than the precision allows.
    """
    key = key.removeprefix("sha256:")
    if not _rank_zero_says(cache.holds(key)):
        scores = _computed(groups, score)
        if _rank() == 0:
            cache.save(key, {str(index): values for index, values in enumerate(scores)})
        return scores
    stored = cache.load(key)
    cached = [stored[str(index)] for index in range(len(groups))]
    every = max(1, round(1 / SPOT_CHECK_SHARE))
    for index in range(0, len(groups), every):
        worst = (score(groups[index]).cpu() - cached[index]).abs().max().item()
        if not worst <= _TOLERANCE[precision]:
            raise ArtifactError(
                "cached reference scores are not those of this reference", where=cache.path(key),
                got=f"a difference of {worst:.3g} nats in group {index}",
                expected=f"at most {_TOLERANCE[precision]}", fix="delete that file and run again",
            )  # fmt: skip
    return cached


def _computed(groups: Sequence[GroupT], score: Callable[[GroupT], Tensor]) -> list[Tensor]:
    """Scores of all groups, every rank having computed its share."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    own = range(_rank(), len(groups), ranks)
    share = {index: score(groups[index]).cpu() for index in tqdm(own, desc="reference scores", unit=" groups")}
    shares = [share]
    if ranks > 1:
        shares = [{} for _ in range(ranks)]
        dist.all_gather_object(shares, share)
    together = {index: values for share in shares for index, values in share.items()}
    return [together[index] for index in range(len(groups))]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _rank_zero_says(decision: bool) -> bool:
    """The same answer on every rank: another run may be writing the file between two looks."""
    said = [decision]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    return said[0]
