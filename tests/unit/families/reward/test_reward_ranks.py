"""Two processes train a reward model as one does: the step is the mean over the pairs, one rank measures and writes."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefmill.training.checkpoints import STEPS, read_curve
from tests.conftest import REPOSITORY
from tests.forked_ranks import run_ranks

sys.path.append(str(REPOSITORY / "tests" / "e2e"))


def train(folder: Path) -> None:
    from reward_artifacts import SMALL, run_stage

    from prefmill.store.artifacts import read

    given = {name: read(folder.parent / name) for name in ("pairs", "clip")}
    keys = {**SMALL, "per_device_train_batch_size": 4, "effective_batch_size": 8}
    metrics = run_stage("train_reward", folder, keys, **given)
    assert bool(metrics) == (os.environ["RANK"] == "0")


def train_on(world_size: int, folder: Path) -> Path:
    run_ranks(world_size, train, folder)
    return folder


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    from reward_artifacts import make_samples
    from training_artifacts import publish_as

    from prefmill.demo.tiny_models import build

    importlib.import_module("prefmill.families.reward.train")  # once, before the forks
    publish_as(build("clip", tmp_path / "clip"), "checkpoint")
    made = make_samples(tmp_path / "samples", num_prompts=13)
    made.path.rename(tmp_path / "pairs")
    one, two = train_on(1, tmp_path / "one"), train_on(2, tmp_path / "two")
    losses = [[row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    weights = [load_file(folder / "out" / "model.safetensors") for folder in (one, two)]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-4
    assert (two / "out" / "metrics.json").is_file()
