"""Labels from a reward model: how surely it prefers a pair's winner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.special import expit

from prefmill.core.errors import ConfigError
from prefmill.core.image_rows import HEADS
from prefmill.core.stage import Task
from prefmill.families.reward.scoring import score_images
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.data import PairImages


def with_soft_labels(pairs: Sequence[PairImages], config: SdxlPreferenceConfig, task: Task) -> list[PairImages]:
    """The pairs with p = s((R_w - R_l) / tau), R the weighted sum of the input `reward`'s heads."""
    weights = head_weights(config.reward_weights)
    folder = task.input("reward").path
    # Each picture once, however many pairs it is in.
    shown = {
        (digest, pair.prompt): path for pair in pairs for digest, path in zip(pair.digests, pair.images, strict=True)
    }
    rewards = score_images(folder, [prompt for _, prompt in shown], list(shown.values())) @ weights
    found = dict(zip(shown, rewards.astype(float), strict=True))
    margins = [found[pair.digests[0], pair.prompt] - found[pair.digests[1], pair.prompt] for pair in pairs]
    labels = expit(np.array(margins) / config.reward_temperature)
    return [replace(pair, soft_label=float(label)) for pair, label in zip(pairs, labels, strict=True)]


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
