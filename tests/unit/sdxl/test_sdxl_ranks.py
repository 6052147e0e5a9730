"""Two processes tune SDXL as one does: each encodes and scores its share, the step is the mean over the pairs."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prefmill.config import validate
from prefmill.training import STEPS, read_curve
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "tests" / "e2e"))

KEYS: dict[str, Any] = {
    "objective": "dspo", "resolution": 32, "precision": "fp32", "lora": {"r": 4}, "learning_rate": 1e-3,
    "num_train_epochs": 2, "per_device_train_batch_size": 2, "effective_batch_size": 4, "logging_steps": 1,
    "save_steps": 4, "report_to": [], "use_ema": True,
}  # fmt: skip


def train(folder: Path, keys: dict[str, Any]) -> None:
    from training_artifacts import make_task

    from prefmill.artifacts import read
    from stages.sdxl_dpo import SdxlDpoConfig, run

    given = {name: read(folder.parent / name) for name in ("model", "pairs")}
    config = validate(SdxlDpoConfig, {**keys, "cache_dir": str(folder / "cache")})
    run(config, make_task("sdxl_dpo", folder, **given))


def one_rank(rank: int, world_size: int, port: int, folder: Path, keys: dict[str, Any]) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.environ.update({name: str(value) for name, value in ranks.items()})
    train(folder, keys)


def train_on(world_size: int, folder: Path, keys: dict[str, Any]) -> Path:
    """Run the ranks as forks of this process, which must have started no process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=one_rank, args=(rank, world_size, port, folder, keys)) for rank in range(world_size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(150)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * world_size
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from image_pair_artifacts import make_pairs, make_sdxl

    importlib.import_module("prefmill.sdxl.dpo")  # once, before the forks
    folder = tmp_path_factory.mktemp("ranks")
    make_sdxl(folder / "model")
    make_pairs(folder / "pairs", train=11, val=2)  # the last step of an epoch leaves a rank with less
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
def test_two_ranks_train_what_one_does(folder: Path, adapter: bool) -> None:
    # Adam makes of gradients that differ in their last bits steps that differ.
    whole = {**KEYS, "lora": None, "use_ema": False, "max_steps": 3, "optim": "sgd"}
    keys = KEYS if adapter else whole
    one, two = (train_on(ranks, folder / f"{adapter}{ranks}", keys) for ranks in (1, 2))
    curves = [read_curve(path / "logs" / STEPS) for path in (one, two)]
    for key in ("loss", "eval_loss"):
        left, right = ([row[key] for row in curve if key in row] for curve in curves)
        assert left
        assert right == pytest.approx(left, abs=2e-6), key
    assert curves[1][0]["margin"] == 0.0
    name = "pytorch_lora_weights.safetensors" if adapter else "unet/diffusion_pytorch_model.safetensors"
    weights = [load_file(path / "out" / name) for path in (one, two)]
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 5e-5
    kept = [sorted(path.name for path in (path / "cache").rglob("*.safetensors")) for path in (one, two)]
    assert kept[0] == kept[1]
