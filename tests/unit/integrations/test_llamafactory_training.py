"""Trainings imported from LLaMA-Factory: its losses, and the parts of a model that it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from prefmill.cli.main import main
from prefmill.core.config import load, validate
from prefmill.core.stage import Task
from prefmill.families.causal.loading import load_model
from prefmill.families.causal.vision_parts import part_of_weights
from prefmill.integrations.llamafactory import import_config
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from stages.dpo import DpoConfig, run
from stages.sft import SftConfig
from stages.sft import run as run_sft
from tests.llamafactory_files import LORA, rows, write


@pytest.fixture(scope="module")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prefmill.demo.tiny_models import build

    return build("qwen2_5_vl", tmp_path_factory.mktemp("vl"))


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "trained"), [
    ({}, {"language_model"}),
    ({"freeze_vision_tower": False}, {"language_model", "vision_tower"}),
    ({"freeze_multi_modal_projector": False, "freeze_language_model": True}, {"projector"}),
    ({**LORA, "freeze_vision_tower": False}, {"language_model", "vision_tower"}), (LORA, {"language_model"}),
])  # fmt: skip
def test_the_parts_that_move_are_those_that_llamafactory_trains(
    keys: dict[str, Any], trained: set[str], tmp_path: Path, tiny_vl: Path
) -> None:
    """Full trainings and adapters alike, on pictures; its file is silent on what it freezes by default."""
    given = {"stage": "sft", "dataset": "pictures", "model_name_or_path": str(tiny_vl), "learning_rate": 1e-2, **keys}
    path = write(tmp_path, **{"warmup_ratio": 0.0, "cutoff_len": 1024, **given})
    Image.effect_noise((60, 60), 80).convert("RGB").save(tmp_path / "data" / "a.png")
    turns = [{"who": "H", "text": "<image>Q?"}, {"who": "B", "text": "A"}]
    (tmp_path / "data" / "talks.json").write_text(json.dumps([{"talk": turns, "shown": ["a.png"]}]))
    (tmp_path / "out").mkdir()
    config = validate(SftConfig, import_config(path).config)
    run_sft(config, Task("r", "sft", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs"))
    before, after = (load_model(str(folder), precision="fp32") for folder in (tiny_vl, tmp_path / "out"))
    parts, now = part_of_weights(before), dict(after.named_parameters())
    assert {parts[name] for name, old in before.named_parameters() if not torch.equal(old, now[name])} == trained


def chatml(*turns: tuple[str, str]) -> str:
    """What LLaMA-Factory's template `qwen` makes of a chat."""
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)


def llamafactory_losses(folder: Path, data: list[dict[str, Any]], steps: int, ftx: float, loss: str) -> list[float]:
    """The losses of LLaMA-Factory's DPO, four pairs per step, from its formulas, on full logits, one row at a time."""
    from transformers import get_scheduler

    from prefmill.families.causal.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    policy, reference = (load_model(str(folder), precision="fp32") for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=steps)

    def logps(model: Any, row: dict[str, Any], side: str) -> tuple[torch.Tensor, int]:
        roles = {"S": "system", "H": "user", "B": "assistant"}
        prompt = chatml(*((roles[turn["who"]], turn["text"]) for turn in row["talk"])) + "<|im_start|>assistant\n"
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"]
               for text in (prompt, row[side]["text"] + "<|im_end|>\n")]  # fmt: skip
        logits = model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
        total = logits.float().log_softmax(-1).gather(1, torch.tensor(ids[1])[:, None]).sum()
        return total, len(ids[1])

    losses = []
    for step in range(steps):
        found = []
        for row in data[4 * step : 4 * step + 4]:
            (good, length), (bad, other) = logps(policy, row, "best"), logps(policy, row, "worst")
            with torch.no_grad():
                ref_good, ref_bad = logps(reference, row, "best")[0], logps(reference, row, "worst")[0]
            if loss == "ipo":
                difference = (good - ref_good) / length - (bad - ref_bad) / other
                value = (difference - 1 / (2 * 0.2)) ** 2
            else:
                value = -torch.nn.functional.logsigmoid(0.2 * ((good - bad) - (ref_good - ref_bad)))
            found.append(value - ftx * good / length)
        mean = torch.stack(found).mean()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "ftx"), [("sigmoid", 0.0), ("sigmoid", 0.3), ("ipo", 0.0)])
def test_an_imported_run_has_llamafactorys_losses(loss: str, ftx: float, tmp_path: Path, tiny_qwen2: Path) -> None:
    output = tmp_path / "mine.yaml"
    keys = {"model_name_or_path": str(tiny_qwen2), "pref_loss": loss, "pref_ftx": ftx, "warmup_ratio": 0.33}
    assert main(["import", "llamafactory", str(write(tmp_path, **keys)), "--output", str(output)]) == 0
    (tmp_path / "out").mkdir()
    task = Task("r", "dpo", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    run(load(DpoConfig, output), task)
    found = [row["loss"] for row in read_curve(tmp_path / "logs" / STEPS) if "loss" in row]
    log = read_jsonl(tmp_path / "logs" / "margins" / "margins_log.jsonl")
    order = [int(row["pair_id"].removeprefix("row-")) for row in log]
    assert sorted(order) == list(range(12))
    data = rows()
    expected = llamafactory_losses(tiny_qwen2, [data[place] for place in order], 3, ftx, loss)
    assert found == pytest.approx(expected, abs=2e-5)
    assert len(set(found)) > 1
