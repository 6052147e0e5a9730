"""The load check: likelihoods of the scorer against the model's own forward, architectures of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefmill.core.errors import InputError
from prefmill.families.causal.group_attention import use_group_attention
from prefmill.families.causal.load_check import check_rows, check_scorer, own_likelihoods
from prefmill.families.causal.scorer import encode_sequences, patch_forward, score_batch

SIZE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SCALED = {
    "gemma2": {
        "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": None,
    },
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}  # fmt: skip


def build(model_type: str, **keys: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZE, **keys})
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def checked(model: Any, layout: str = "pairwise") -> Any:
    expected = own_likelihoods(model)
    if layout == "group":
        use_group_attention(model)
    patch_forward(model)
    check_scorer(model, expected, layout, "model")
    return model


@pytest.mark.parametrize("layout", ["pairwise", "group"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "granite"])
def test_plain_models_pass_in_both_layouts(model_type: str, layout: str) -> None:
    keys = {"sliding_window": None} if model_type in ("mistral", "phi3") else {}
    assert not checked(build(model_type, **keys), layout).own_head


def test_rows_of_sft_are_held_against_the_models_own_forward() -> None:
    model = build("llama")
    expected = own_likelihoods(model)
    check_rows(model, "model", expected, model.dtype)
    assert model.training
    own = model.forward

    def leaks(input_ids: torch.Tensor, **given: Any) -> Any:
        output = own(input_ids=input_ids, **given)
        return output if len(input_ids) == 1 else type(output)(logits=output.logits + output.logits.flip(0))

    model.forward = leaks
    with pytest.raises(InputError, match="not what each is alone"):
        check_rows(model, "model", expected, model.dtype)


@pytest.mark.parametrize("model_type", SCALED)
def test_scaled_and_capped_logits_are_the_models_own(model_type: str) -> None:
    """Values and gradients equal a full-logits computation in float64."""
    model = build(model_type, **SCALED[model_type]).double()
    plain = build(model_type, **SCALED[model_type]).double().eval()
    assert checked(model).own_head
    rows = [([5, 6, 7], [8, 9, 10, 11]), ([5, 6, 7], [12, 13])]
    score_batch(model.train(), encode_sequences(rows, 0)).sum().backward()
    total = torch.zeros((), dtype=torch.float64)
    for prompt, answer in rows:
        logits = plain(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double()
        total = total + logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
    total.backward()
    with torch.no_grad():
        assert score_batch(model, encode_sequences(rows, 0)).sum().item() == pytest.approx(total.item(), abs=1e-5)
    for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-5, atol=1e-6), name


def test_a_planted_functional_dropout_is_caught() -> None:
    model = build("llama")
    layer = model.model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda states: torch.nn.functional.dropout(own(states), 0.3, training=layer.training)
    with pytest.raises(InputError, match="own likelihoods"):
        checked(model)


def test_a_planted_mask_that_is_ignored_is_caught() -> None:
    """An attention that looks at every token of a packed row, other responses among them."""
    model = build("llama")
    expected = own_likelihoods(model)
    use_group_attention(model)
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation = "eager"
    patch_forward(model)
    with pytest.raises(InputError, match="layout group"):
        check_scorer(model, expected, "group", "model")


def test_a_planted_multiplier_behind_the_forward_is_the_models_own() -> None:
    """As Falcon-H1 has one: no configuration key needs to be known."""
    model = build("llama")
    kind = type(model)

    class Multiplied(kind):  # type: ignore[valid-type,misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = found.logits * 0.1
            return found

    model.__class__ = Multiplied
    assert checked(model).own_head


def test_the_check_comes_with_loading_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefmill.core.config import validate
    from prefmill.families.causal import dpo, load_check
    from prefmill.training.preference_config import PreferenceConfig

    build("llama").save_pretrained(tmp_path)
    config = validate(PreferenceConfig, {"precision": "fp32", "learning_rate": 1e-3, "num_train_epochs": 1})
    config = config.model_copy(update={"layout": "pairwise"})
    assert dpo.load_policy(str(tmp_path), config, None)
    monkeypatch.setattr(load_check, "score_batch", lambda *_: torch.zeros(2, dtype=torch.float64))
    with pytest.raises(InputError, match="own likelihoods"):
        dpo.load_policy(str(tmp_path), config, None)


def test_weights_that_are_no_numbers_are_said_to_be_so() -> None:
    model = build("llama")
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, float("nan"))
    with pytest.raises(InputError, match="own likelihoods are no numbers"):
        own_likelihoods(model)


def test_a_model_that_writes_blocks_behind_its_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DiffusionGemma: its logits are those of a canvas, which was a traceback of shapes."""
    model = build("llama")
    forward = model.forward

    def of_a_canvas(**given: Any) -> Any:
        output = forward(**given)
        output.logits = output.logits[:, :1].expand(-1, 64, -1)
        return output

    monkeypatch.setattr(model, "forward", of_a_canvas)
    with pytest.raises(InputError, match=r"how likely each token[\s\S]*64 tokens for"):
        own_likelihoods(model)
