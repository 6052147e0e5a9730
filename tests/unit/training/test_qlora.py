"""An adapter on a base of 4 bits: losses and references by transformers' own quantized model, and the whole folder.

bitsandbytes is installed with the GPU builds; where it is, these run on a CPU too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import identity, validate
from prefmill.core.errors import ConfigError
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.preference_config import PreferenceConfig
from stages.sdxl_dpo import STAGE as SDXL
from stages.sft import SftConfig

KEYS: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 16, "max_length": 64,
    "logging_steps": 1, "save_steps": 2, "report_to": [], "lora": {"r": 4, "alpha": 8}, "quantization": "4bit",
}  # fmt: skip


def test_only_a_frozen_base_is_quantized(tmp_path: Path) -> None:
    for change, why in (({"lora": None}, "add a lora section"), ({"fsdp": True}, "whole on every rank")):
        with pytest.raises(ConfigError, match=why):
            validate(PreferenceConfig, {**KEYS, **change})
    with pytest.raises(ConfigError, match="trains on whole weights"):
        validate(SDXL.config, {"lora": {"r": 4}, "quantization": "4bit"})
    assert "quantization" not in identity(PreferenceConfig())
    assert identity(validate(PreferenceConfig, KEYS))["quantization"] == "4bit"


def quantized(folder: Path) -> Any:
    """transformers' own model of 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    said = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=said, dtype=torch.float32).train()


def score(model: Any, tokenizer: Any, asked: str, answer: str) -> tuple[float, int]:
    """Log-likelihood of an answer with its end, and its tokens."""
    import torch

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    prompt, ids = (tokenizer(part)["input_ids"] for part in (text, answer + "<|im_end|>\n"))
    with torch.no_grad():
        logps = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(ids)[:, None]).sum().item(), len(ids)


def moved_by_its_adapter(out: Path, base: Path) -> None:
    """The finished folder must be the whole base with the published adapter on it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(plain, out / "adapter").merge_and_unload().state_dict()
    assert found.keys() == merged.keys()
    assert all(torch.allclose(found[name], merged[name], atol=1e-5) for name in found)
    assert any(not torch.equal(found[name], before[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["group", "pairwise"])
def test_preferences_against_a_quantized_reference(
    layout: str, tmp_path: Path, tiny_qwen2: Path, pairs_file: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoTokenizer

    from prefmill.families.causal.dpo import train_dpo

    config = validate(PreferenceConfig, {**KEYS, "model_name_or_path": str(tiny_qwen2), "layout": layout})
    (tmp_path / "out").mkdir()
    task = Task("r", "dpo", "clean", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    train_dpo(config, task, str(tiny_qwen2), pairs_file, None)
    loss = next(row["loss"] for row in read_curve(tmp_path / "logs" / STEPS) if "loss" in row)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    model, tokenizer = quantized(tiny_qwen2), AutoTokenizer.from_pretrained(tiny_qwen2)
    rows = {row["id"]: row for row in read_jsonl(pairs_file)}
    for line in read_jsonl(tmp_path / "logs" / "margins" / "margins_log.jsonl"):
        row = rows[line["pair_id"]]
        for side in ("chosen", "rejected"):
            expected, _ = score(model, tokenizer, row["conversations"][0]["value"], row[side]["value"])
            assert line[f"ref_{side}_logps"] == pytest.approx(expected, abs=1e-3)
    moved_by_its_adapter(tmp_path / "out", tiny_qwen2)


@pytest.mark.slow
def test_chats_on_a_quantized_base(tmp_path: Path, tiny_qwen2: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoTokenizer

    from prefmill.families.causal.sft import train_sft

    said = [("the paper is", "good"), ("the model was", "not very strong")]
    rows = [{"id": str(n), "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
            for n, (asked, answer) in enumerate(said)]  # fmt: skip
    write_jsonl(tmp_path / "rows" / "data.jsonl", rows)
    config = validate(SftConfig, {**KEYS, "model_name_or_path": str(tiny_qwen2), "effective_batch_size": 2})
    (tmp_path / "out").mkdir()
    task = Task("r", "sft", "clean", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    train_sft(config, task, str(tiny_qwen2), tmp_path / "rows" / "data.jsonl", None)
    loss = next(row["loss"] for row in read_curve(tmp_path / "logs" / STEPS) if "loss" in row)
    model, tokenizer = quantized(tiny_qwen2), AutoTokenizer.from_pretrained(tiny_qwen2)
    scores = [score(model, tokenizer, *pair) for pair in said]
    assert loss == pytest.approx(-sum(total for total, _ in scores) / sum(count for _, count in scores), abs=1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config") is None
    moved_by_its_adapter(tmp_path / "out", tiny_qwen2)
