"""ZeRO and FSDP2 on two processes train what one process does: same losses, same finished folder, really sharded."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from strategy_runs import (
    ALONE,
    DEEPSPEED,
    KEYS,
    KILL,
    SLOW_IMPORTS,
    STRATEGIES,
    largest_difference,
    losses,
    shares,
    start,
    train_on,
)

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.files import digest_path
from prefmill.distributed.sharding import sharding_arguments
from prefmill.pipeline.attempts import EXECUTED
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import require_its_ranks
from prefmill.training.config import TrainingConfig
from prefmill.training.preference_config import PreferenceConfig
from tests.forked_ranks import end_codes, import_before_the_forks
from tests.tiny import pair_rows, save_tiny_qwen2, sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import_before_the_forks(*SLOW_IMPORTS)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp"])
def test_two_processes_train_what_one_does(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_path(folder / "model")
    # An operator that is compiled leaves a lock when it is killed meanwhile, and all later trainings wait for it.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiled := folder / f"compiled-{name}"))
    two = train_on(2, folder / name, {**KEYS, **STRATEGIES[name]})
    assert losses(two)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(two) == pytest.approx(losses(folder / "one"), abs=1e-5)
    assert losses(two, "eval_loss") == pytest.approx(losses(folder / "one", "eval_loss"), abs=1e-5)
    assert largest_difference(folder / "one", two) < 1e-5
    assert shares(two, "weights") == pytest.approx([0.5, 0.5] if name != "zero2" else [1.0, 1.0], abs=0.02)
    assert shares(two, "scoring") == [pytest.approx([0.5 if name != "zero2" else 1.0], abs=0.02)] * 2
    assert shares(two, "moments") == pytest.approx([0.5, 0.5], abs=0.02)
    assert shares(folder / "one", "moments") == [1.0]
    assert digest_path(folder / "model") == before
    assert not compiled.exists()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(two / "out")
    saved = load_file(two / "out" / "model.safetensors")
    assert torch.equal(model.state_dict()["lm_head.weight"], saved["lm_head.weight"])


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
    assert largest_difference(one, two) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_an_adapter_is_merged_into_whole_weights(folder: Path, name: str) -> None:
    keys = {**KEYS, "lora": {"r": 4, "alpha": 8, "use_dora": True}}
    one = train_on(1, folder / f"lora-{name}-one", keys)
    two = train_on(2, folder / f"lora-{name}", {**keys, **STRATEGIES[name]})
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert largest_difference(one, two) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("zero3", 2), ("fsdp", 2), ("plain", 1)])
def test_killed_in_the_middle_of_an_accumulation_it_ends_the_same(
    folder: Path, name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of every rank in the second epoch, between the microbatches of step 4."""
    keys = {**KEYS, **STRATEGIES.get(name, {}), "save_steps": 1}
    calm = train_on(ranks, folder / f"calm-{name}", keys)
    killed = folder / f"killed-{name}"
    children = start(ranks, killed, {**keys, KILL: True})
    assert end_codes(children) == [-signal.SIGKILL] * ranks
    executed = [row["step"] for row in read_jsonl(killed / "logs" / EXECUTED)]
    assert executed == [1, 2, 3]
    if ranks == 2:
        config = validate(PreferenceConfig, {**KEYS, **STRATEGIES[name]})
        monkeypatch.setenv("WORLD_SIZE", "1")
        with pytest.raises(PipelineError, match="processes: 2"):
            require_its_ranks(killed / "out", config)
        monkeypatch.undo()
    train_on(ranks, killed, keys)
    assert [row["step"] for row in read_jsonl(killed / "logs" / EXECUTED)] == [1, 2, 3, 4]
    finished = [(path / "out" / "model.safetensors").read_bytes() for path in (calm, killed)]
    assert finished[0] == finished[1]
    assert losses(killed) == losses(calm)


def test_a_strategy_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of them"):
        validate(TrainingConfig, {"learning_rate": 1, "num_train_epochs": 1, "deepspeed": "a.json", "fsdp": True})
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}')
    config = validate(TrainingConfig, {"learning_rate": 1, "num_train_epochs": 1, "deepspeed": str(wrong)})
    before = dict(os.environ)
    with pytest.raises(ConfigError, match="DeepSpeed refuses the file"):
        sharding_arguments(config)
    assert dict(os.environ) == before  # or whatever this process trains next would open a group of ranks


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
    # As people have it: fixed numbers, a comment, an optimizer, and no word of precision.
    (folder / "mine.json").write_text(
        """{"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": false}, // all of it
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": "auto", "weight_decay": 0}}}"""
    )
    for name, keys in {"mine": {"deepspeed": str(folder / "mine.json")}, "fsdp": STRATEGIES["fsdp"]}.items():
        alone = train_on(1, folder / f"alone-{name}", {**KEYS, **keys, ALONE: True})
        assert losses(alone) == pytest.approx(losses(folder / "one"), abs=1e-5)
