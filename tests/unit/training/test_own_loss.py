"""sft of models whose logits are more than their head's weights times the last layer: their own loss, not TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.store.jsonl import write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.config import TrainingConfig
from tests.tiny import make_tokenizer, sentence

SIZES: dict[str, Any] = {
    "vocab_size": 340, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip


def with_a_layer_before_its_head() -> Any:
    from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**SIZES, **tokens))


def with_a_cap() -> Any:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    more = {"lru_width": 32, "num_key_value_heads": 1, "head_dim": 8, "logits_soft_cap": 2.0}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SIZES, **more))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "adapter"])
@pytest.mark.parametrize("make", [with_a_layer_before_its_head, with_a_cap])
def test_its_first_loss_is_that_of_plain_transformers(
    make: Any, lora: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from prefmill.families.causal.sft import train_sft

    torch.manual_seed(0)
    model, tokenizer, folder = make().eval(), make_tokenizer(), tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chats = [
        [{"role": "user", "content": sentence(n, 5)}, {"role": "assistant", "content": sentence(50 + n, 4 + n)}]
        for n in range(4)
    ]
    write_jsonl(tmp_path / "rows" / "data.jsonl", [{"id": str(n), "messages": chat} for n, chat in enumerate(chats)])
    keys = {"learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 4,
            "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 1, "report_to": [], "lora": lora,
            "max_length": 64}  # fmt: skip
    (tmp_path / "out").mkdir()
    task = Task("r", "sft", "clean", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    rows = tmp_path / "rows" / "data.jsonl"
    metrics = train_sft(validate(TrainingConfig, keys), task, str(folder), rows, rows)
    total, count = 0.0, 0
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        asked = tokenizer(prompt)["input_ids"]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = range(len(asked), len(ids))
        total, count = total - sum(float(logps[n - 1, ids[n]]) for n in places), count + len(places)
    first = next(row["loss"] for row in read_curve(tmp_path / "logs" / STEPS) if "loss" in row)
    assert first == pytest.approx(total / count, abs=1e-4)
    assert metrics["val_loss"] < first
    assert "by its own forward" in caplog.text
