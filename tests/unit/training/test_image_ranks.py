"""Two processes train a vision-language model as one does, also where a rank sees no image; adapters train on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.config import TrainingConfig
from tests.conftest import REPOSITORY
from tests.forked_ranks import run_ranks
from tests.tiny import pair_rows, sentence
from tests.unit.training.test_ranks import _import_once_before_the_forks, train, train_on  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prefmill.demo.tiny_models import build

    return build("qwen2_5_vl", tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts of two pairs, every third with an image: most microbatches of one pair have none."""
    folder = tmp_path_factory.mktemp("rows")
    Image.effect_noise((60, 60), 90).convert("RGB").save(folder / "noise.png")
    found = pair_rows(6, pairs=2)
    for row in found[::6] + found[1::6]:
        row["conversations"] = [{"from": "human", "value": "the<image>"}]
        row["images"] = [str(folder / "noise.png")]
    write_jsonl(folder / "dpo" / "data.jsonl", found)
    return folder / "dpo" / "data.jsonl"


def curve(folder: Path) -> list[float]:
    return [row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


@pytest.mark.parametrize("layout", ["group", "pairwise"])
def test_two_ranks_train_what_one_does(layout: str, tmp_path: Path, tiny_vl: Path, rows: Path) -> None:
    train_on(2, tmp_path / "two", tiny_vl, rows, layout)
    train_on(1, tmp_path / "one", tiny_vl, rows, layout)
    one, two = (curve(tmp_path / name) for name in ("one", "two"))
    assert one[0] == pytest.approx(math.log(2), abs=1e-5)
    assert one[-1] != pytest.approx(one[0], abs=1e-4)
    assert two == pytest.approx(one, abs=2e-5)


STRATEGIES = {
    "ddp": {"activation_checkpointing": True}, "fsdp": {"fsdp": True},
    "zero3": {"deepspeed": str(REPOSITORY / "configs" / "deepspeed" / "zero3.json")},
}  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_fine_tune_as_one_does(name: str, tmp_path: Path, tiny_vl: Path) -> None:
    """One row of four has an image: most batches have none, and their rank must run the vision part all the same."""
    Image.effect_noise((60, 60), 90).convert("RGB").save(tmp_path / "noise.png")
    rows = [
        {
            "id": str(number),
            "messages": [
                {"role": "user", "content": sentence(number, 5)},
                {"role": "assistant", "content": sentence(50 + number, 4 + number)},
            ],
        }
        for number in range(8)
    ]
    for row in rows[::4]:
        row |= {"images": [str(tmp_path / "noise.png")]}
        row["messages"][0]["content"] = "the<image>"
    write_jsonl(tmp_path / "chats.jsonl", rows)
    run_ranks(1, fine_tune, tmp_path / "one", tiny_vl, {})
    run_ranks(2, fine_tune, tmp_path / "two", tiny_vl, STRATEGIES[name])
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=2e-5)


def fine_tune(folder: Path, model: Path, strategy: dict[str, Any]) -> None:
    from prefmill.families.causal.sft import train_sft

    keys = {"learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 4,
            "per_device_train_batch_size": 1, "logging_steps": 1, "save_steps": 9, "report_to": [],
            "max_length": 400}  # fmt: skip
    (folder / "out").mkdir(parents=True, exist_ok=True)
    task, rows = Task("r", "sft", "vision", {}, {}, {}, folder / "out", folder / "logs"), folder.parent / "chats.jsonl"
    train_sft(validate(TrainingConfig, {**keys, **strategy}), task, str(model), rows, rows)


def test_an_adapter_trains_and_is_merged(
    tmp_path: Path, tiny_vl: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    from tests.unit.training import test_ranks

    settings = {**test_ranks.SMALL, "lora": {"r": 4, "alpha": 16}, "learning_rate": 1e-2}
    monkeypatch.setattr(test_ranks, "SMALL", settings)
    train(tmp_path, tiny_vl, rows, "group")
    losses = curve(tmp_path)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert len({row["pair_id"] for row in read_jsonl(tmp_path / "logs" / "margins" / "margins_log.jsonl")}) == 12
