"""Two processes train a reward model as one does: the step is the mean over the pairs, one rank measures and writes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefmill.training import STEPS, read_curve
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "tests" / "e2e"))


def train(rank: int, world_size: int, port: int, folder: Path) -> None:
    from reward_artifacts import SMALL, run_stage

    from prefmill.artifacts import read

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.environ.update({name: str(value) for name, value in ranks.items()})
    given = {name: read(folder.parent / name) for name in ("pairs", "clip")}
    keys = {**SMALL, "per_device_train_batch_size": 4, "effective_batch_size": 8}
    metrics = run_stage("train_reward", folder, keys, **given)
    assert bool(metrics) == (rank == 0)


def train_on(world_size: int, folder: Path) -> Path:
    """Run the ranks as forks of this process, which must have started no process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=train, args=(rank, world_size, port, folder)) for rank in range(world_size)]
    for child in children:
        child.start()
    for child in children:
        child.join(150)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * world_size
    return folder


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    from reward_artifacts import make_samples
    from training_artifacts import publish_as

    from prefmill.tiny import build

    importlib.import_module("prefmill.reward.train")  # once, before the forks
    publish_as(build("clip", tmp_path / "clip"), "checkpoint")
    made = make_samples(tmp_path / "samples", num_prompts=13)
    made.path.rename(tmp_path / "pairs")
    one, two = train_on(1, tmp_path / "one"), train_on(2, tmp_path / "two")
    losses = [[row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    weights = [load_file(folder / "out" / "model.safetensors") for folder in (one, two)]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-4
    assert (two / "out" / "metrics.json").is_file()
