"""ZeRO and FSDP2 on two processes train what one process does: same losses, same finished folder, really sharded."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefmill.artifacts import digest_path
from prefmill.config import validate
from prefmill.errors import ConfigError
from prefmill.preference.config import PreferenceConfig
from prefmill.records import read_jsonl, write_jsonl
from prefmill.stage import Task
from prefmill.strategies import sharding_arguments
from prefmill.training import EXECUTED, STEPS, TrainingConfig, read_curve
from tests.conftest import REPOSITORY
from tests.tiny import pair_rows, save_tiny_qwen2, sentence

DEEPSPEED = REPOSITORY / "configs" / "deepspeed"
KEYS: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 2, "precision": "fp32", "per_device_train_batch_size": 2,
    "effective_batch_size": 8, "logging_steps": 1, "save_steps": 2, "max_length": 400, "report_to": [],
    "lr_scheduler_type": "constant", "layout": "group",
}  # fmt: skip
SHARDS, KILL, ALONE = "shards.txt", "kill", "alone"


def train(folder: Path, keys: dict[str, Any]) -> None:
    """Preference training, or supervised training without a layout; says how much of the model this rank held."""
    from prefmill.causal.dpo import train_dpo
    from prefmill.causal.sft import train_sft

    (folder / "out").mkdir(parents=True, exist_ok=True)
    task = Task("r", "train", "clean", {}, {}, {}, folder / "out", folder / "logs")
    model, rows = folder.parent / "model", folder.parent / ("pairs.jsonl" if "layout" in keys else "chats.jsonl")
    note_shards(folder)
    if keys.pop(KILL, False):
        kill_at(3 * microbatches(keys) + 2)
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
        (folder / f"{os.environ.get('RANK', 0)}-{SHARDS}").write_text(str(held / total))
        original(model, keep)

    strategies.make_whole = make_whole


def microbatches(keys: dict[str, Any]) -> int:
    """Of each rank, in a step."""
    return int(keys["effective_batch_size"]) // keys["per_device_train_batch_size"] // int(os.environ["WORLD_SIZE"])


def kill_at(call: int) -> None:
    """Have this process killed as it comes to its n-th microbatch."""
    from prefmill.preference.trainer import PreferenceTrainer

    original, calls = PreferenceTrainer.training_step, []

    def training_step(self: Any, *given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *given, **more)

    PreferenceTrainer.training_step = training_step  # type: ignore[method-assign]


def _local(weight: Any) -> int:
    return int((weight.to_local() if hasattr(weight, "to_local") else weight).numel())


def one_rank(rank: int, world_size: int, port: int, folder: Path, keys: dict[str, Any]) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.environ.update({name: str(value) for name, value in ranks.items()})
    if keys.pop(ALONE, False):
        for name in (*ranks, "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_bf16_begins_at_the_reference(folder: Path, name: str) -> None:
    two = train_on(2, folder / f"bf16-{name}", {**KEYS, **STRATEGIES[name], "precision": "bf16"})
    assert losses(two)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(two, "margin")[0] == 0.0
    assert losses(two, "eval_loss")[-1] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_supervised_training_is_the_same_too(folder: Path, name: str) -> None:
    keys = {key: value for key, value in KEYS.items() if key != "layout"}
    one = train_on(1, folder / f"sft-{name}-one", keys)
    two = train_on(2, folder / f"sft-{name}", {**keys, **STRATEGIES[name]})
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    weights = [load_file(path / "out" / "model.safetensors") for path in (one, two)]
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_an_adapter_is_merged_into_whole_weights(folder: Path, name: str) -> None:
    keys = {**KEYS, "lora": {"r": 4, "alpha": 8, "use_dora": True}}
    one = train_on(1, folder / f"lora-{name}-one", keys)
    two = train_on(2, folder / f"lora-{name}", {**keys, **STRATEGIES[name]})
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    weights = [load_file(path / "out" / "model.safetensors") for path in (one, two)]
    assert set(weights[0]) == set(weights[1])
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("zero3", 2), ("fsdp", 2), ("plain", 1)])
def test_killed_in_the_middle_of_an_accumulation_it_ends_the_same(folder: Path, name: str, ranks: int) -> None:
    """SIGKILL of every rank in the second epoch, between the microbatches of step 4."""
    keys = {**KEYS, **STRATEGIES.get(name, {}), "save_steps": 1}
    calm = train_on(ranks, folder / f"calm-{name}", keys)
    killed = folder / f"killed-{name}"
    children = start(ranks, killed, {**keys, KILL: True})
    for child in children:
        child.join(150)
    assert [child.exitcode for child in children] == [-signal.SIGKILL] * ranks
    executed = [row["step"] for row in read_jsonl(killed / "logs" / EXECUTED)]
    assert executed == [1, 2, 3]
    train_on(ranks, killed, keys)
    assert [row["step"] for row in read_jsonl(killed / "logs" / EXECUTED)] == [1, 2, 3, 4]
    finished = [(path / "out" / "model.safetensors").read_bytes() for path in (calm, killed)]
    assert finished[0] == finished[1]
    assert losses(killed) == losses(calm)


def test_a_strategy_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of them"):
        validate(TrainingConfig, {"learning_rate": 1, "num_train_epochs": 1, "deepspeed": "a.json", "fsdp": True})
    absent = validate(TrainingConfig, {"learning_rate": 1, "num_train_epochs": 1, "deepspeed": str(tmp_path / "no")})
    with pytest.raises(ConfigError, match="cannot read the DeepSpeed file"):
        sharding_arguments(absent)


def test_a_shipped_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"learning_rate": 1, "num_train_epochs": 1, "deepspeed": "configs/deepspeed/zero3.json"}
    assert validate(TrainingConfig, keys).deepspeed == DEEPSPEED / "zero3.json"
    own = tmp_path / "configs" / "deepspeed" / "zero3.json"  # the folder the command is given in comes first
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert validate(TrainingConfig, keys).deepspeed == own


@pytest.mark.slow
def test_one_process_alone_needs_no_launcher(folder: Path) -> None:
    for name in ("zero3", "fsdp"):
        alone = train_on(1, folder / f"alone-{name}", {**KEYS, **STRATEGIES[name], ALONE: True})
        assert losses(alone) == pytest.approx(losses(folder / "one"), abs=1e-5)
