"""sft of models whose logits are more than their head's weights times the last layer: their own loss, not TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.core.stage import Metrics, Task
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.config import TrainingConfig
from tests.conftest import REPOSITORY
from tests.forked_ranks import run_ranks
from tests.tiny import make_tokenizer, sentence

SIZES: dict[str, Any] = {
    "vocab_size": 340, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
STRATEGIES = {"zero3": {"deepspeed": str(REPOSITORY / "configs" / "deepspeed" / "zero3.json")}, "fsdp": {"fsdp": True}}


def with_a_layer_before_its_head() -> Any:
    from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**SIZES, **tokens))


def with_a_cap() -> Any:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    more = {"lru_width": 32, "num_key_value_heads": 1, "head_dim": 8, "logits_soft_cap": 2.0}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SIZES, **more))


def without_a_base() -> Any:
    """Its attribute has another name than `base_model_prefix`: TRL looks for the last layer in the whole model."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    more = {"intermediate_size_mlp": 64, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **more))


@pytest.fixture(params=[with_a_layer_before_its_head, with_a_cap, without_a_base])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model and chats of different lengths."""
    import torch

    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    chats = [
        [{"role": "user", "content": sentence(n, 5)}, {"role": "assistant", "content": sentence(50 + n, 4 + n)}]
        for n in range(4)
    ]
    write_jsonl(tmp_path / "data.jsonl", [{"id": str(n), "messages": chat} for n, chat in enumerate(chats)])
    return tmp_path


def train(folder: Path, more: dict[str, Any], *turns: Any) -> Metrics:
    from prefmill.families.causal.sft import train_sft

    keys = {"learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 4,
            "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 1, "report_to": [],
            "max_length": 64}  # fmt: skip
    (folder / "out").mkdir(exist_ok=True)
    task, rows = Task("r", "sft", "clean", {}, {}, {}, folder / "out", folder / "logs"), folder / "data.jsonl"
    return train_sft(validate(TrainingConfig, {**keys, **more}), task, str(folder / "model"), rows, rows, *turns)


def first_loss(folder: Path) -> float:
    return next(float(row["loss"]) for row in read_curve(folder / "logs" / STEPS) if "loss" in row)


def plain_loss(folder: Path) -> float:
    """The mean over all trained tokens by plain transformers, in float64 from the logits on."""
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model").eval(), make_tokenizer()
    total, count = 0.0, 0
    for row in read_jsonl(folder / "data.jsonl"):
        chat = row["messages"]
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        asked = tokenizer(prompt)["input_ids"]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        places = range(len(asked), len(ids))
        total, count = total - sum(float(logps[n - 1, ids[n]]) for n in places), count + len(places)
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "adapter"])
def test_its_first_loss_is_that_of_plain_transformers(
    folder: Path, lora: Any, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = train(folder, {"lora": lora})
    assert first_loss(folder) == pytest.approx(plain_loss(folder), abs=1e-4)
    assert metrics["val_loss"] < first_loss(folder)
    assert "by its own forward" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("folder", [without_a_base], indirect=True)
def test_its_balancing_loss_has_its_own_weight(folder: Path) -> None:
    from prefmill.families.causal.chat_rows import TrainedTurns

    with pytest.raises(ConfigError, match="leave router_aux_loss_coef out"):
        train(folder, {}, TrainedTurns(router_aux_loss_coef=0.1))
    train(folder, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_two_ranks_that_share_it_learn_that_too(folder: Path, name: str) -> None:
    run_ranks(2, train, folder, STRATEGIES[name])
    assert first_loss(folder) == pytest.approx(plain_loss(folder), abs=1e-4)
