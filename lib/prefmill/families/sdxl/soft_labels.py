"""Labels from a reward model: how surely it prefers a pair's winner."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from prefmill.core.errors import ConfigError
from prefmill.core.files import digest_json
from prefmill.core.image_rows import HEADS
from prefmill.core.stage import Task
from prefmill.families.reward.scoring import open_scorer
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.data import PairImages
from prefmill.store.missing import in_batches
from prefmill.store.pictures import DECODER
from prefmill.store.tensor_cache import TensorCache
from prefmill.training.reference import keep_together

_BLOCK = 64  # images scored between two that are kept


def with_soft_labels(
    pairs: Sequence[PairImages], config: SdxlPreferenceConfig, task: Task, cache: TensorCache
) -> list[PairImages]:
    """The pairs with p = s((R_w - R_l) / tau), R the weighted sum of the input `reward`'s heads, kept in `cache`."""
    weights = head_weights(config.reward_weights)
    # Each picture once, however many pairs it is in.
    shown = {
        (digest, pair.prompt): path for pair in pairs for digest, path in zip(pair.digests, pair.images, strict=True)
    }
    found = {seen: float(rewards @ weights) for seen, rewards in _rewards(shown, task, cache)}
    margins = [found[pair.digests[0], pair.prompt] - found[pair.digests[1], pair.prompt] for pair in pairs]
    labels = expit(np.array(margins) / config.reward_temperature)
    return [replace(pair, soft_label=float(label)) for pair, label in zip(pairs, labels, strict=True)]


def _rewards(
    shown: dict[tuple[str, str], Path], task: Task, cache: TensorCache
) -> Iterator[tuple[tuple[str, str], NDArray[np.float32]]]:
    """The heads' rewards of pictures by (sha256, prompt); the model is loaded only where some are not kept."""
    reward = task.input("reward")
    score = functools.cache(lambda: open_scorer(reward.path))
    blocks = in_batches(list(shown), _BLOCK)
    keys = [f"{digest_json([DECODER, reward.manifest.content_digest, block])}-rewards" for block in blocks]

    def keep(index: int) -> None:
        prompts, files = [prompt for _, prompt in blocks[index]], [shown[seen] for seen in blocks[index]]
        cache.save(keys[index], {"rewards": torch.from_numpy(score()(prompts, files))})

    keep_together(range(len(blocks)), lambda index: cache.holds(keys[index]), keep, task, f"x {_BLOCK} images scored")
    for key, block in zip(keys, blocks, strict=True):
        yield from zip(block, cache.load(key)["rewards"].numpy(), strict=True)


def head_weights(given: dict[str, float] | None) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A weight for every head, their mean by default; raises ConfigError for a head that there is none of."""
    unknown = sorted(set(given or {}) - set(HEADS))
    if unknown:
        raise ConfigError(
            "no such head of the reward model", where="reward_weights", got=", ".join(unknown),
            expected=", ".join(HEADS), fix="correct the names",
        )  # fmt: skip
    weights = {head: 1 / len(HEADS) for head in HEADS} if given is None else given
    return np.array([weights.get(head, 0.0) for head in HEADS], dtype=np.float32)
