"""Two processes train what one does: the step is the mean over its pairs, however they fall to ranks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.pipeline.attempts import EXECUTED
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.config import TrainingConfig
from prefmill.training.preference_config import PreferenceConfig
from tests.forked_ranks import run_ranks
from tests.tiny import pair_rows, sentence

SMALL: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 2, "precision": "fp32", "per_device_train_batch_size": 1,
    "effective_batch_size": 6, "logging_steps": 1, "save_steps": 2, "max_length": 64, "report_to": [],
}  # fmt: skip


def train(folder: Path, model: Path, rows: Path, layout: str | None) -> None:
    """Preference training in `layout`, or supervised training without one."""
    from prefmill.families.causal.dpo import train_dpo
    from prefmill.families.causal.sft import train_sft

    (folder / "out").mkdir(parents=True, exist_ok=True)
    task = Task("r", "train", "clean", {}, {}, {}, folder / "out", folder / "logs")
    if layout is None:
        train_sft(validate(TrainingConfig, SMALL), task, str(model), rows, rows)
    else:
        train_dpo(validate(PreferenceConfig, {**SMALL, "layout": layout}), task, str(model), rows, rows)


def train_on(world_size: int, *given: Any) -> None:
    run_ranks(world_size, train, *given)


@pytest.fixture(scope="module", autouse=True)
def _import_once_before_the_forks() -> None:
    importlib.import_module("prefmill.families.causal.dpo")
    importlib.import_module("prefmill.families.causal.sft")


def assert_same_training(one: Path, two: Path) -> None:
    curves = [read_curve(folder / "logs" / STEPS) for folder in (one, two)]
    for key in ("loss", "eval_loss"):
        left, right = ([row[key] for row in curve if key in row] for curve in curves)
        assert left
        assert right == pytest.approx(left, abs=2e-6), key
    weights = [load_file(folder / "out" / "model.safetensors") for folder in (one, two)]
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 2e-5
    executed = [[row["step"] for row in read_jsonl(folder / "logs" / EXECUTED)] for folder in (one, two)]
    assert executed[0] == executed[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pairwise", "group"])
def test_two_ranks_prefer_as_one_does(layout: str, tmp_path: Path, tiny_qwen2: Path) -> None:
    """20 pairs in groups of one to four, so that a step's pairs do not divide evenly among the ranks."""
    rows = tmp_path / "data.jsonl"
    write_jsonl(rows, [row for n, row in enumerate(pair_rows(8, 4)) if n % 4 <= n // 4 % 4])
    for ranks in (1, 2):
        train_on(ranks, tmp_path / str(ranks), tiny_qwen2, rows, layout)
    assert_same_training(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
@pytest.mark.parametrize("count", [12, 9])
def test_two_ranks_fine_tune_as_one_does(count: int, tmp_path: Path, tiny_qwen2: Path) -> None:
    """Of an odd number one rank has a row less: no row is learnt twice for that."""
    rows = tmp_path / "data.jsonl"
    write_jsonl(rows, chats(count))
    for ranks in (1, 2):
        train_on(ranks, tmp_path / str(ranks), tiny_qwen2, rows, None)
    assert_same_training(tmp_path / "1", tmp_path / "2")


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{n}",
            "messages": [
                {"role": "user", "content": sentence(n, 5 + n % 4)},
                {"role": "assistant", "content": sentence(500 + n, 4 + n % 6)},
            ],
        }
        for n in range(count)
    ]
