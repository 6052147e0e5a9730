"""The reference's scores, computed once with the policy before its first step: no second model in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from prefmill.artifacts import digest_json
from prefmill.errors import ArtifactError
from prefmill.preference.data import Group

GroupT = TypeVar("GroupT")
SPOT_CHECK_SHARE = 0.01
_TOLERANCE = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.1}  # of a response's summed log-likelihood, in nats


def reference_key(groups: Sequence[Group], weights: str, settings: Mapping[str, Any]) -> str:
    """What cached scores of token groups hold for: every token id, the reference's weights, how they were computed."""
    return content_key([[group.prompt, group.responses] for group in groups], weights, settings)


def content_key(content: Any, weights: str, settings: Mapping[str, Any]) -> str:
    """What cached scores hold for; `content` is JSON that says all of what was scored."""
    return digest_json({"groups": digest_json(content), "weights": weights, "settings": dict(settings)})


def reference_scores(
    groups: Sequence[GroupT], score: Callable[[GroupT], Tensor], path: Path, key: str, precision: str
) -> list[Tensor]:
    """The reference's scores of a group's samples, [S, ...] fp32 for each group, from `path` or computed and kept.

    `score` must still be the reference. Cached scores are recomputed for one group in a hundred; raises
    ArtifactError when one differs by more than the precision allows.
    """
    cached = _load(path, key, len(groups))
    if cached is None:
        cached = [score(group).cpu() for group in tqdm(groups, desc="reference scores", unit=" groups")]
        _save(path, key, cached)
        return cached
    every = max(1, round(1 / SPOT_CHECK_SHARE))
    for index in range(0, len(groups), every):
        worst = (score(groups[index]).cpu() - cached[index]).abs().max().item()
        if not worst <= _TOLERANCE[precision]:
            raise ArtifactError(
                "cached reference scores are not those of this reference", where=path,
                got=f"a difference of {worst:.3g} nats in group {index}",
                expected=f"at most {_TOLERANCE[precision]}", fix="delete that file and run again",
            )  # fmt: skip
    return cached


def _load(path: Path, key: str, num_groups: int) -> list[Tensor] | None:
    """The cached scores, or None where there are none for `key`."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as stored:
        if (stored.metadata() or {}).get("key") != key:
            return None
        return [stored.get_tensor(str(index)) for index in range(num_groups)]


def _save(path: Path, key: str, scores: Sequence[Tensor]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # every rank writes one, all of the same content
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {str(index): score.contiguous() for index, score in enumerate(scores)}, partial, {"key": key, "format": "pt"}
    )
    partial.replace(path)
