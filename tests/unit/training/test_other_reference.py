"""A reference that is another checkpoint than the policy's start: whose scores they are, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import identity, validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.preference_config import PreferenceConfig
from tests.tiny import save_tiny_qwen2

SMALL: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 16, "layout": "group",
    "logging_steps": 1, "save_steps": 2, "max_length": 64, "report_to": [],
}  # fmt: skip
# Full logits of one sequence at a time, by transformers alone.
FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, rows = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
for row in map(json.loads, open(rows)):
    asked = [{"role": "user", "content": row["conversations"][0]["value"]}]
    prompt = tokenizer(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))["input_ids"]
    scores = []
    for side in ("chosen", "rejected"):
        answer = tokenizer(row[side]["value"] + "<|im_end|>\\n")["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        scores.append(logps.gather(1, torch.tensor(answer)[:, None]).sum().item())
    print(json.dumps([row["id"], *scores]))
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights, the same tokenizer."""
    return save_tiny_qwen2(tmp_path_factory.mktemp("other") / "model", seed=7)


def train(workspace: Path, run: str, policy: Path, pairs: Path, **keys: Any) -> Path:
    """A run whose reference cache is the workspace's; returns its logs."""
    from prefmill.families.causal.dpo import train_dpo

    folder, logs = workspace / "checkpoints" / run / "dpo" / "clean", workspace / "logs" / run
    folder.mkdir(parents=True)
    config = validate(PreferenceConfig, {**SMALL, "model_name_or_path": str(policy), **keys})
    train_dpo(config, Task(run, "dpo", "clean", {}, {}, {}, folder, logs), str(policy), pairs, None)
    return logs


def margins(logs: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(logs / "margins" / "margins_log.jsonl"))


def cached(workspace: Path) -> list[Path]:
    return sorted((workspace / "data" / "cache" / "reference").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["whole", "adapter"])
def test_its_scores_are_those_of_a_fresh_process(
    tmp_path: Path, tiny_qwen2: Path, other: Path, pairs_file: Path, lora: Any
) -> None:
    logs = train(tmp_path, "mine", tiny_qwen2, pairs_file, ref_name=str(other), lora=lora)
    command = [sys.executable, "-c", FRESH, str(other), str(pairs_file)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    expected = {pair: scores for pair, *scores in map(json.loads, said.splitlines())}
    rows = margins(logs)
    assert {row["pair_id"] for row in rows} == set(expected)
    for row in rows:
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == pytest.approx(expected[row["pair_id"]], abs=1e-4)
    moved = [row["chosen_logps"] - row["ref_chosen_logps"] for row in rows]
    assert max(map(abs, moved)) > 1, "the policy does not start at this reference"
    loss = next(row["loss"] for row in read_curve(logs / STEPS) if "loss" in row)
    assert abs(loss - math.log(2)) > 0.01


@pytest.mark.slow
def test_runs_share_scores_by_what_the_reference_is(
    tmp_path: Path, tiny_qwen2: Path, other: Path, pairs_file: Path
) -> None:
    train(tmp_path, "plain", tiny_qwen2, pairs_file)
    of_the_policy = cached(tmp_path)
    assert len(of_the_policy) == 1
    copy = shutil.copytree(tiny_qwen2, tmp_path / "copy")
    logs = train(tmp_path, "copy", tiny_qwen2, pairs_file, ref_folder=str(copy))
    assert cached(tmp_path) == of_the_policy, "the same content under another path"
    loss = next(row["loss"] for row in read_curve(logs / STEPS) if "loss" in row)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    train(tmp_path, "other", tiny_qwen2, pairs_file, ref_name=str(other))
    assert len(cached(tmp_path)) == 2
    turned = shutil.copytree(tiny_qwen2, tmp_path / "turned")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    (turned / "config.json").write_text(json.dumps({**json.loads((turned / "config.json").read_text()), **rope}))
    train(tmp_path, "turned", turned, pairs_file)
    assert len(cached(tmp_path)) == 3, "the same weights under another config.json"


def test_its_content_is_part_of_the_identity(tmp_path: Path, other: Path) -> None:
    changed = shutil.copytree(other, tmp_path / "changed")
    same = shutil.copytree(other, tmp_path / "same")
    (changed / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[::-1])
    keys = [identity(PreferenceConfig(ref_name=str(path))) for path in (other, same, changed)]
    assert keys[0] == keys[1] != keys[2]
    names = [identity(PreferenceConfig(ref_name=name)) for name in (None, "some/model")]
    assert names[0] != names[1] != keys[0]


def test_what_cannot_be_a_reference(tmp_path: Path, tiny_qwen2: Path, other: Path, pairs_file: Path) -> None:
    foreign = shutil.copytree(other, tmp_path / "foreign")
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[50:52]
    words[first], words[second] = words[second], words[first]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="reads other tokens than the policy"):
        train(tmp_path, "foreign", tiny_qwen2, pairs_file, ref_name=str(foreign))
    small = shutil.copytree(other, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(InputError, match="the reference has no embedding for a token"):
        train(tmp_path, "small", tiny_qwen2, pairs_file, ref_name=str(small))
    with pytest.raises(InputError, match="no such model folder"):
        train(tmp_path, "nowhere", tiny_qwen2, pairs_file, ref_name=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no objective here has a reference"):
        train(tmp_path, "simpo", tiny_qwen2, pairs_file, ref_name=str(other), loss_type=["simpo"])
    with pytest.raises(ConfigError, match="not both"):
        validate(PreferenceConfig, {"ref_name": "some/model", "ref_folder": str(other)})
