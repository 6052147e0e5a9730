"""GroupDPOTrainer beside TRL's DPOTrainer: the same losses, metrics, gradients and weights, from fewer tokens."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.loading import load_model, load_tokenizer
from tests.models.tiny_configs import tiny_config
from tests.threads import same_bits
from tests.tiny import make_tokenizer, sentence

pytestmark = pytest.mark.slow


def rows(groups: int = 4, pairs: int = 3, conversational: bool = True) -> list[dict[str, Any]]:
    found = []
    for group in range(groups):
        for index in range(pairs):
            texts = {"prompt": sentence(group, 9 + group), "chosen": sentence(90 + group, 4 + group),
                     "rejected": sentence(500 + 10 * group + index, 3 + index)}  # fmt: skip
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            chats = {key: [{"role": roles[key], "content": text}] for key, text in texts.items()}
            found.append(chats if conversational else texts)
    return found


def moved(folder: Path) -> Any:
    """A policy away from its reference, so that no loss is ln 2 by itself."""
    model = load_model(str(folder), precision="fp32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def make(kind: str, folder: Path, out: Path, data: list[dict[str, Any]], **keys: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from prefmill.integrations.group_dpo_trainer import GroupDPOTrainer

    settings: dict[str, Any] = {
        "output_dir": str(out / kind), "beta": 0.3, "use_cpu": True, "bf16": False, "report_to": "none",
        "max_length": None, "per_device_train_batch_size": len(data), "save_strategy": "no",
    }  # fmt: skip
    extra = {key: keys.pop(key) for key in ("peft_config", "eval_dataset") if key in keys}
    model = keys.pop("model", None) or moved(folder)
    return {"trl": DPOTrainer, "group": GroupDPOTrainer}[kind](
        model=model, ref_model=None if extra.get("peft_config") else load_model(str(folder), precision="fp32"),
        args=DPOConfig(**{**settings, **keys}), train_dataset=Dataset.from_list(data),
        processing_class=load_tokenizer(str(folder)), **extra,
    )  # fmt: skip


def loss_and_gradients(trainer: Any) -> tuple[float, dict[str, Any], dict[str, Any]]:
    data = trainer.train_dataset
    batch = trainer.data_collator([data[index] for index in range(len(data))])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


TRUNCATED = 27  # tokens: every prompt fits, no prompt with its whole answer does
OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {}, "strings": {"conversational": False}, "ipo": {"loss_type": ["ipo"]},
    "mix": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1}, "apo": {"loss_type": ["apo_zero"]},
    "ld": {"ld_alpha": 0.3}, "wpo": {"use_weighting": True}, "js": {"f_divergence_type": "js_divergence"},
    "precomputed": {"precompute_ref_log_probs": True}, "truncated": {"max_length": TRUNCATED},
    "from_the_end": {"max_length": TRUNCATED, "truncation_mode": "keep_end"},
    "checkpointed": {"gradient_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_metrics_and_gradients_equal_trl(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    options = dict(OPTIONS[name])
    data = rows(conversational=options.pop("conversational", True))
    expected = loss_and_gradients(make("trl", tiny_qwen2, tmp_path, data, **options))
    found = loss_and_gradients(make("group", tiny_qwen2, tmp_path, data, **options))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert abs(found[0] - 0.6931) > 0.001
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        assert (found[1][key] - gradient).abs().max() < 1e-5, key
    assert found[2] == pytest.approx(expected[2], abs=1e-4)


@pytest.mark.parametrize("model_type", ["gemma3_text", "lfm2", "qwen3_next", "mixtral", "gpt_oss"])
def test_windows_states_and_the_balancing_loss_are_trls(model_type: str, tmp_path: Path) -> None:
    """Windows shorter than the prompts, convolutions and the delta rule, routers, sinks."""
    from transformers import AutoModelForCausalLM

    config, tokenizer = tiny_config(model_type), make_tokenizer()
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    routed = hasattr(config, "output_router_logits")
    if routed:
        config.router_aux_loss_coef = 0.5
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    expected, found = (
        loss_and_gradients(make(kind, tmp_path / "model", tmp_path, rows())) for kind in ("trl", "group")
    )
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        assert (found[1][key] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, key
    assert found[2] == pytest.approx(expected[2], abs=1e-4)
    assert ("aux_loss" in found[2]) == routed


def test_an_adapter_trains_alike(tiny_qwen2: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=True)
    results = []
    for kind in ("trl", "group"):
        trainer = make(kind, tiny_qwen2, tmp_path, rows(), peft_config=adapter)
        with torch.no_grad():
            for number, value in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
                value.copy_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
        results.append(loss_and_gradients(trainer))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-5)
    assert abs(results[0][0] - 0.6931) > 1e-4
    assert results[0][1]
    for key, gradient in results[0][1].items():
        assert (results[1][1][key] - gradient).abs().max() < 1e-5, key


def test_training_gives_the_same_curve_and_weights(tiny_qwen2: Path, tmp_path: Path) -> None:
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 4,
            "logging_steps": 1, "train_sampling_strategy": "sequential", "max_grad_norm": 1.0}  # fmt: skip
    trainers = {kind: make(kind, tiny_qwen2, tmp_path, rows(6, 3), **keys) for kind in ("trl", "group")}
    curves = {}
    for kind, trainer in trainers.items():
        trainer.train()
        curves[kind] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(curves["trl"]) == 4
    assert curves["group"] == pytest.approx(curves["trl"], abs=1e-4)
    others = dict(trainers["trl"].model.named_parameters())
    for name, value in trainers["group"].model.named_parameters():
        assert (value - others[name]).abs().max() < 1e-4, name


def test_gradients_are_the_same_bits_every_time_on_several_threads(tiny_qwen2: Path, tmp_path: Path) -> None:
    """600 answers read their prompt's last token, and the one that is better in all rows takes a gradient from each."""
    prompt, good = sentence(1, 9), sentence(90, 80)
    data = [{"prompt": prompt, "chosen": good, "rejected": sentence(500 + row, 2)} for row in range(600)]
    trainer = make("group", tiny_qwen2, tmp_path, data)

    def gradient() -> torch.Tensor:
        trainer.model.zero_grad()
        return loss_and_gradients(trainer)[1]["model.layers.0.mlp.down_proj.weight"]

    assert same_bits(gradient, times=4)


def test_it_runs_fewer_tokens_and_generates_as_before(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = make("group", tiny_qwen2, tmp_path, rows(2, 4), per_device_train_batch_size=8)
    seen: list[int] = []
    layer = trainer.model.base_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    loss_and_gradients(trainer)
    hook.remove()
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert seen[0] < batch["attention_mask"].sum() / 2
    prompt = torch.tensor([trainer.train_dataset[0]["prompt_ids"]])
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(trainer.model.generate(prompt, **options), moved(tiny_qwen2).generate(prompt, **options))


def test_a_saved_model_is_a_plain_one(tiny_qwen2: Path, tmp_path: Path) -> None:
    trainer = make("group", tiny_qwen2, tmp_path, rows(2, 2))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_model(str(tmp_path / "saved"), precision="fp32")
    assert loaded.config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))


def test_prompts_stay_together_in_every_epoch() -> None:
    from prefmill.integrations.group_dpo_trainer import PromptSampler

    sizes = random.Random(0).choices([1, 2, 3, 5, 11], k=60)
    prompts = [number for number, size in enumerate(sizes) for _ in range(size)]
    sampler = PromptSampler(prompts, 8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(len(prompts)))
    assert first == list(PromptSampler(prompts, 8, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    batches = [first[start : start + 8] for start in range(0, len(first), 8)]
    split = Counter(prompt for batch in batches for prompt in {prompts[row] for row in batch})
    assert sum(split[number] > -(-size // 8) for number, size in enumerate(sizes)) <= 3


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_rows_that_are_all_beyond_the_length_are_no_training(order: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    """TRL's trainer ends in an error of torch (num_samples=0); with max_steps this one trained nothing."""
    keys = {"max_length": 3, "max_steps": 1, "train_sampling_strategy": order}
    with pytest.raises(InputError, match="raise max_length"):
        make("group", tiny_qwen2, tmp_path, rows(), **keys).train()


def test_images_are_sent_to_the_stage(tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("group", tiny_qwen2, tmp_path, rows(1, 2))
    trainer._is_vision_dataset = True
    with pytest.raises(ConfigError, match="stage dpo"):
        trainer._require_shareable()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused_in_words(kind: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="does not train prompts or prefixes"):
        make("group", tiny_qwen2, tmp_path, rows(1, 2), peft_config=config)


def test_the_model_is_left_as_it_was_found(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A second trainer on the same model, and one on a copy, give what they give on a fresh model."""
    expected = loss_and_gradients(make("group", tiny_qwen2, tmp_path, rows()))
    first = make("group", tiny_qwen2, tmp_path, rows(), max_steps=1, learning_rate=0.0)
    first.train()
    model = first.model
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in model.base_model.__dict__
    copied = copy.deepcopy(model)
    for given in (model, copied):
        given.zero_grad()
        given.gradient_checkpointing_disable()  # `loss_and_gradients` goes backward outside of a step
        second = make("group", tiny_qwen2, tmp_path, rows(), model=given)
        assert second.model is given
        found = loss_and_gradients(second)
        assert found[0] == pytest.approx(expected[0], abs=1e-6)
        for key, gradient in expected[1].items():
            assert (found[1][key] - gradient).abs().max() < 1e-6, key
    ids = torch.tensor([first.train_dataset[0]["prompt_ids"]])
    plain = moved(tiny_qwen2)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-6)
