"""A reward model's word as a soft label of a pair."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.core.image_rows import HEADS
from prefmill.families.sdxl import soft_labels
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.soft_labels import head_weights, with_soft_labels
from prefmill.store.tensor_cache import TensorCache
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "tests" / "e2e"))


def make_reward(folder: Path) -> Any:
    """A reward model that has learnt nothing."""
    from training_artifacts import publish_as
    from transformers import CLIPModel, CLIPProcessor

    from prefmill.demo.tiny_models import build
    from prefmill.families.reward.model import create_reward

    clip = build("clip", folder / "clip")
    create_reward(CLIPModel.from_pretrained(clip), 16, 0).save_pretrained(folder / "reward")
    CLIPProcessor.from_pretrained(clip).save_pretrained(folder / "reward")
    return publish_as(folder / "reward", "reward_model")


def test_a_label_is_the_logistic_of_the_rewards_difference(tmp_path: Path) -> None:
    from image_pair_artifacts import make_pairs
    from training_artifacts import make_task

    from prefmill.families.reward.scoring import score_images
    from prefmill.families.sdxl.data import read_image_pairs

    reward, artifact = make_reward(tmp_path), make_pairs(tmp_path / "pairs", train=3, val=0)
    pairs = read_image_pairs(artifact, "train")
    task = make_task("sdxl_dpo", tmp_path / "run", reward=reward)
    keys = {"reward_temperature": 0.1, "reward_weights": {"style": 1.0}}
    cache = TensorCache(tmp_path / "cache")
    found = with_soft_labels(pairs, validate(SdxlPreferenceConfig, keys), task, cache)
    column = HEADS.index("style")
    for pair in found:
        rewards = score_images(reward.path, [pair.prompt] * 2, list(pair.images))[:, column]
        assert pair.soft_label == pytest.approx(1 / (1 + math.exp(-(rewards[0] - rewards[1]) / 0.1)), rel=1e-4)
    turned = with_soft_labels([pair.swapped for pair in pairs], validate(SdxlPreferenceConfig, keys), task, cache)
    assert [pair.soft_label for pair in turned] == pytest.approx([1 - float(pair.soft_label or 0) for pair in found])
    assert len({pair.soft_label for pair in found}) == 3


class Killed(BaseException):
    """What ends a training without letting it do anything more."""


def test_a_picture_of_many_pairs_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven pictures of a prompt have 21 pairs: each was scored six times, and at every start again."""
    from itertools import combinations

    from training_artifacts import make_task

    from prefmill.families.sdxl.data import PairImages

    asked: list[str] = []

    def score(prompts: list[str], paths: list[Path]) -> Any:
        asked.extend(f"{prompt} {path.name}" for prompt, path in zip(prompts, paths, strict=True))
        if len(asked) > 12 and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise Killed
        return np.array([[float(path.name)] * 5 for path in paths], dtype=np.float32)

    monkeypatch.setattr(soft_labels, "open_scorer", lambda _: score)
    monkeypatch.setattr(soft_labels, "_BLOCK", 4)
    pairs = [
        PairImages(f"{prompt}:{a}:{b}", prompt, prompt, (Path(str(a)), Path(str(b))), (f"sha {a}", f"sha {b}"))
        for prompt in ("a cat", "a dog") for a, b in combinations(range(7), 2)
    ]  # fmt: skip
    task = make_task("sdxl_dpo", tmp_path / "run", reward=make_reward(tmp_path))
    given = (pairs, validate(SdxlPreferenceConfig, {}), task, TensorCache(tmp_path / "cache"))
    with pytest.raises(Killed):
        with_soft_labels(*given)
    found = with_soft_labels(*given)
    assert (len(asked), len(set(asked))) == (16, 14)  # the last four were asked for twice, of which two are new
    assert with_soft_labels(*given) == found
    assert len(asked) == 16
    for pair in found:
        margin = int(pair.images[0].name) - int(pair.images[1].name)
        assert pair.soft_label == pytest.approx(1 / (1 + math.exp(-margin)))


@pytest.mark.parametrize("half", ["all", "policy", "judge"])
def test_weights_average_one_in_both_trainings_whichever_half_it_is(tmp_path: Path, half: Any) -> None:
    """A reward model's loss was the smaller the more pairs a prompt has, 0.14 for 0.69; a half's was off in both."""
    from image_pair_artifacts import make_pairs

    from prefmill.families.reward.data import read_pairs
    from prefmill.families.reward.train import split_rows
    from prefmill.families.sdxl.dpo import _pairs
    from prefmill.store.jsonl import read_jsonl, write_jsonl

    artifact, file = make_pairs(tmp_path / "made", train=12, val=4), tmp_path / "made" / "pairs.jsonl"
    rows = [{**row, "weight": 1 / (1 + n), "labels": {"style": 1.0}} for n, row in enumerate(read_jsonl(file))]
    write_jsonl(file, rows)
    config = validate(SdxlPreferenceConfig, {"prompt_half": "all" if half == "judge" else half})
    train, held_out = split_rows(read_pairs(artifact.path), half, artifact.path)
    tuned = _pairs(config, artifact, "train")
    for pairs in (train, held_out["val"], tuned):
        assert sum(pair.weight for pair in pairs) / len(pairs) == pytest.approx(1, abs=1e-6)  # type: ignore[attr-defined]
    told = {row["pair_id"]: row["weight"] for row in rows}
    first, second = train[:2]
    assert first.weight / second.weight == pytest.approx(told[first.pair_id] / told[second.pair_id])


def test_a_head_that_there_is_not_is_refused() -> None:
    assert head_weights(None).tolist() == pytest.approx([0.2] * 5)
    with pytest.raises(ConfigError, match="no such head"):
        head_weights({"beauty": 1.0})


@pytest.mark.parametrize("weights", [{}, {"style": 0.0}, {"style": -1.0, "material": 0}])
def test_weights_that_prefer_nothing_are_refused(weights: dict[str, float]) -> None:
    """Every label was 1/2, or turned round: the training ran to its end, and learnt nothing or the worse picture."""
    keys = {"objective": "dspo_rm", "reward_weights": weights}
    with pytest.raises(ConfigError, match="of reward_weights none is above 0"):
        validate(SdxlPreferenceConfig, keys)
    validate(SdxlPreferenceConfig, {**keys, "reward_weights": {**weights, "fidelity": 0.5}})
