"""ZeRO and FSDP2 on two processes train what one process does: same losses, same finished folder, really sharded."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefmill.artifacts import digest_path
from prefmill.config import validate
from prefmill.preference.config import PreferenceConfig
from prefmill.records import write_jsonl
from prefmill.stage import Task
from prefmill.training import STEPS, TrainingConfig, read_curve
from tests.conftest import REPOSITORY
from tests.tiny import pair_rows, save_tiny_qwen2, sentence

DEEPSPEED = REPOSITORY / "configs" / "deepspeed"
KEYS: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 2, "precision": "fp32", "per_device_train_batch_size": 2,
    "effective_batch_size": 8, "logging_steps": 1, "save_steps": 2, "max_length": 400, "report_to": [],
    "lr_scheduler_type": "constant", "layout": "group",
}  # fmt: skip
SHARDS = "shards.txt"


def train(folder: Path, keys: dict[str, Any]) -> None:
    """Preference training, or supervised training without a layout; says how much of the model this rank held."""
    from prefmill.causal.dpo import train_dpo
    from prefmill.causal.sft import train_sft

    (folder / "out").mkdir(parents=True, exist_ok=True)
    task = Task("r", "train", "clean", {}, {}, {}, folder / "out", folder / "logs")
    model, rows = folder.parent / "model", folder.parent / ("pairs.jsonl" if "layout" in keys else "chats.jsonl")
    note_shards(folder)
    if "layout" in keys:
        train_dpo(validate(PreferenceConfig, keys), task, str(model), rows, rows)
    else:
        train_sft(validate(TrainingConfig, keys), task, str(model), rows, rows)


def note_shards(folder: Path) -> None:
    """Write down the share of the weights that this process holds when training ends."""
    from prefmill import strategies

    original = strategies.make_whole

    def make_whole(model: Any, keep: bool) -> None:
        weights = list(model.parameters())
        held = sum(weight.ds_tensor.numel() if hasattr(weight, "ds_tensor") else _local(weight) for weight in weights)
        total = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
        (folder / f"{os.environ['RANK']}-{SHARDS}").write_text(str(held / total))
        original(model, keep)

    strategies.make_whole = make_whole


def _local(weight: Any) -> int:
    return int((weight.to_local() if hasattr(weight, "to_local") else weight).numel())


def one_rank(rank: int, world_size: int, port: int, folder: Path, keys: dict[str, Any]) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.environ.update({name: str(value) for name, value in ranks.items()})
    train(folder, keys)


def start(world_size: int, folder: Path, keys: dict[str, Any]) -> list[Any]:
    """The ranks as forks of this process, which must have started no process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=one_rank, args=(rank, world_size, port, folder, keys)) for rank in range(world_size)
    ]
    for child in children:
        child.start()
    return children


def train_on(world_size: int, folder: Path, keys: dict[str, Any]) -> Path:
    children = start(world_size, folder, keys)
    for child in children:
        child.join(150)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * world_size
    return folder


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_curve(folder / "logs" / STEPS) if key in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("prefmill.causal.dpo", "prefmill.causal.sft", "deepspeed", "torch.distributed.fsdp"):
        importlib.import_module(name)  # once, before the forks
    folder = tmp_path_factory.mktemp("strategies")
    save_tiny_qwen2(folder / "model")
    # Answers of very different lengths: a rank then runs the head more often than the other.
    rows: list[Any] = pair_rows(8, 2)
    rows[0]["chosen"] = {"from": "gpt", "value": sentence(5, 290)}
    write_jsonl(folder / "pairs.jsonl", rows)
    for row in rows:
        row["messages"] = [
            {"role": "user", "content": row["conversations"][0]["value"]},
            {"role": "assistant", "content": row["chosen"]["value"]},
        ]
    write_jsonl(folder / "chats.jsonl", [{"id": row["id"], "messages": row["messages"]} for row in rows])
    train_on(1, folder / "one", KEYS)
    return folder


STRATEGIES = {
    "zero2": {"deepspeed": str(DEEPSPEED / "zero2.json")},
    "zero3": {"deepspeed": str(DEEPSPEED / "zero3.json")},
    "fsdp": {"fsdp": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_train_what_one_does(folder: Path, name: str) -> None:
    before = digest_path(folder / "model")
    two = train_on(2, folder / name, {**KEYS, **STRATEGIES[name]})
    assert losses(two)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(two) == pytest.approx(losses(folder / "one"), abs=1e-5)
    assert losses(two, "eval_loss") == pytest.approx(losses(folder / "one", "eval_loss"), abs=1e-5)
    weights = [load_file(path / "out" / "model.safetensors") for path in (folder / "one", two)]
    assert {key: value.shape for key, value in weights[0].items()} == {k: v.shape for k, v in weights[1].items()}
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-5
    held = [float(path.read_text()) for path in sorted(two.glob(f"*-{SHARDS}"))]
    assert held == pytest.approx([0.5, 0.5] if name != "zero2" else [1.0, 1.0], abs=0.02)
    assert digest_path(folder / "model") == before
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(two / "out")
    assert torch.equal(model.state_dict()["lm_head.weight"], weights[1]["lm_head.weight"])
