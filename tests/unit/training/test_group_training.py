"""Training in the group layout is training in the pairwise layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.core.files import digest_path
from prefmill.core.stage import Task
from prefmill.pipeline.attempts import EXECUTED
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.preference_config import PreferenceConfig
from tests.tiny import pair_rows

SMALL: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "precision": "fp32",
    "per_device_train_batch_size": 1,
    "effective_batch_size": 6,
    "logging_steps": 1,
    "save_steps": 2,
    "max_length": 64,
    "report_to": [],
}


def train(folder: Path, model: Path, pairs: Path, val: Path | None = None, **keys: Any) -> dict[str, Any]:
    from prefmill.families.causal.dpo import train_dpo

    (folder / "out").mkdir(parents=True, exist_ok=True)
    task = Task("r", "dpo", "clean", {}, {}, {}, folder / "out", folder / "logs")
    return train_dpo(validate(PreferenceConfig, {**SMALL, **keys}), task, str(model), pairs, val)


def curve(folder: Path) -> list[float]:
    return [row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of one to four pairs: 20 pairs in 8 groups."""
    path = tmp_path_factory.mktemp("pairs") / "data.jsonl"
    write_jsonl(path, [row for n, row in enumerate(pair_rows(8, 4)) if n % 4 <= n // 4 % 4])
    return path


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path, pairs: Path) -> Path:
    folder = tmp_path_factory.mktemp("grouped")
    train(folder, tiny_qwen2, pairs, pairs, layout="group")
    return folder


def test_same_losses_and_weights_as_pairwise(tmp_path: Path, grouped: Path, tiny_qwen2: Path, pairs: Path) -> None:
    train(tmp_path, tiny_qwen2, pairs, pairs, layout="pairwise")
    assert curve(grouped) == pytest.approx(curve(tmp_path), abs=1e-5)
    left, right = (load_file(folder / "out" / "model.safetensors") for folder in (grouped, tmp_path))
    start = load_file(tiny_qwen2 / "model.safetensors")
    moved = max((left[name] - start[name]).abs().max().item() for name in start)
    apart = max((left[name] - right[name]).abs().max().item() for name in start)
    assert apart < 0.02 * moved


def test_evaluates_at_the_end_of_every_epoch_and_only_there(grouped: Path) -> None:
    rows = list(read_jsonl(grouped / "logs" / STEPS))
    epochs = {row["step"]: row["epoch"] for row in read_jsonl(grouped / "logs" / "margins" / "margins_log.jsonl")}
    ends = [step for step, epoch in sorted(epochs.items()) if epochs.get(step + 1) != epoch]
    assert [row["step"] for row in rows if "eval_accuracy" in row] == ends
    assert len(ends) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_zero_is_ln_2(precision: str, tmp_path: Path, tiny_qwen2: Path, pairs: Path) -> None:
    train(tmp_path, tiny_qwen2, pairs, layout="group", precision=precision, num_train_epochs=1)
    assert curve(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6 if precision == "fp32" else 2e-2)


@pytest.mark.slow
def test_how_groups_share_microbatches_changes_nothing(
    tmp_path: Path, grouped: Path, tiny_qwen2: Path, pairs: Path
) -> None:
    train(tmp_path / "packed", tiny_qwen2, pairs, layout="group", per_device_train_batch_size=6)
    train(tmp_path / "split", tiny_qwen2, pairs, layout="group", max_tokens_per_microbatch=40)
    for name in ("packed", "split"):
        assert curve(tmp_path / name) == pytest.approx(curve(grouped), abs=2e-5), name


@pytest.mark.slow
def test_resume_is_bit_exact(
    tmp_path: Path, grouped: Path, tiny_qwen2: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends inside an accumulation of the second epoch, two microbatches into a step."""
    from prefmill.training.trainer import PreferenceTrainer

    original = PreferenceTrainer.training_step
    seen: list[int] = []

    def dies(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        done = original(self, model, inputs, num_items_in_batch)
        seen.append(0 if inputs["skipped"] else self.state.global_step)
        if seen.count(6) == 2:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(PreferenceTrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tiny_qwen2, pairs, pairs, layout="group")
    monkeypatch.setattr(PreferenceTrainer, "training_step", original)
    train(tmp_path, tiny_qwen2, pairs, pairs, layout="group")
    assert digest_path(tmp_path / "out" / "model.safetensors") == digest_path(grouped / "out" / "model.safetensors")
    assert curve(tmp_path) == curve(grouped)
    executed = [row["step"] for row in read_jsonl(tmp_path / "logs" / EXECUTED)]
    assert len(executed) - len(set(executed)) <= SMALL["save_steps"]


def test_an_attention_of_ones_own_choice_is_refused(tmp_path: Path, tiny_qwen2: Path, pairs: Path) -> None:
    with pytest.raises(ConfigError, match="attn_implementation"):
        train(tmp_path, tiny_qwen2, pairs, layout="group", attn_implementation="eager")


def test_epochs_of_different_lengths_end_where_the_plan_says() -> None:
    from types import SimpleNamespace

    from transformers import TrainerControl

    from prefmill.training.trainer import _StepTelemetry

    callback = _StepTelemetry(SimpleNamespace(step=lambda *_: None), {1: 0, 2: 0, 3: 0, 4: 1, 5: 1})
    asked = []
    for step in range(1, 6):
        control = TrainerControl()
        callback.on_step_end(None, SimpleNamespace(global_step=step), control)
        asked.append(control.should_evaluate)
    assert asked == [False, False, True, False, True]
