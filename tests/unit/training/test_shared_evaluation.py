"""Validation is shared among ranks: each pair is scored by one of them, and the numbers are those of one process."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.store.jsonl import write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.preference_config import PreferenceConfig
from tests.forked_ranks import run_ranks
from tests.tiny import pair_rows

KEYS: dict[str, Any] = {
    "learning_rate": 1e-30, "num_train_epochs": 1, "precision": "fp32", "per_device_train_batch_size": 1,
    "effective_batch_size": 4, "logging_steps": 1, "save_steps": 2, "max_length": 64, "report_to": [],
}  # fmt: skip
EVALUATED = ("eval_loss", "eval_margin", "eval_accuracy")


@pytest.fixture(scope="module", autouse=True)
def _import_once_before_the_forks() -> None:
    importlib.import_module("prefmill.families.causal.dpo")


def train(folder: Path, model: Path, other: Path, rows: Path, keys: dict[str, Any]) -> None:
    """A training that leaves the weights as they are: the validation's margins are those against another reference."""
    import os

    from prefmill.families.causal.dpo import train_dpo
    from prefmill.training.trainer import PreferenceTrainer

    scored: list[list[str]] = []
    score = PreferenceTrainer.pair_scores

    def note(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        if not model.training:
            scored.append(inputs["pair_ids"])
        return score(self, model, inputs)

    PreferenceTrainer.pair_scores = note  # type: ignore[method-assign]
    (folder / "out").mkdir(parents=True, exist_ok=True)
    task = Task("r", "dpo", "clean", {}, {}, {}, folder / "out", folder / "logs")
    train_dpo(validate(PreferenceConfig, {**KEYS, **keys, "ref_name": str(other)}), task, str(model), rows, rows)
    (folder / f"scored{os.environ['RANK']}.json").write_text(json.dumps(scored))


def evaluated(folder: Path) -> list[float]:
    (row,) = [row for row in read_curve(folder / "logs" / STEPS) if "eval_loss" in row]
    return [row[key] for key in EVALUATED]


def scored(folder: Path, rank: int) -> list[list[str]]:
    found: list[list[str]] = json.loads((folder / f"scored{rank}.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"layout": "pairwise"}, {"fsdp": True}], ids=["pairwise", "fsdp"])
def test_two_ranks_report_what_one_does(keys: dict[str, Any], tmp_path: Path, tiny_qwen2: Path) -> None:
    """15 pairs or five groups, so that a rank has one microbatch less: it still runs the model as often."""
    from tests.tiny import save_tiny_qwen2

    other = save_tiny_qwen2(tmp_path / "other", seed=1)
    write_jsonl(tmp_path / "data.jsonl", pair_rows(5, 3))
    for ranks in (1, 2):
        run_ranks(ranks, train, tmp_path / str(ranks), tiny_qwen2, other, tmp_path / "data.jsonl", keys)
    one, two = evaluated(tmp_path / "1"), evaluated(tmp_path / "2")
    assert 0 < one[2] < 1
    assert two == (pytest.approx(one, rel=1e-5) if keys.get("fsdp") else one)
    whole = scored(tmp_path / "1", 0)
    first, second = (scored(tmp_path / "2", rank) for rank in (0, 1))
    assert len(first) == len(second) == (len(whole) + 1) // 2
    assert first == whole[::2]
    assert second == [*whole[1::2], whole[-1]]
