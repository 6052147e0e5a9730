"""Rows padded on the right: the same scores without a mask, which plain causal models are no longer given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from prefmill.families.causal.scorer import encode_sequences, patch_forward, score_batch

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "Qwen2": SMALL, "Qwen3": SMALL, "Llama": SMALL, "Gemma": SMALL | {"head_dim": 8}, "Olmo2": SMALL, "Phi": SMALL,
    "Mistral": SMALL | {"sliding_window": 128}, "GPTNeoX": SMALL,
    "GPT2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}  # fmt: skip
MASKED: dict[str, Any] = {
    "Mistral": SMALL | {"sliding_window": 4},
    "Gemma3Text": SMALL | {"head_dim": 8, "sliding_window": 4},
    "Mamba": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2},
    "Bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}
BATCH = encode_sequences([([5, 6, 7, 8, 9, 10], [11, 12]), ([13, 14], [15]), ([16] * 9, [17, 18, 19])], pad=0)


def model_of(kind: str, keys: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**keys)
    return patch_forward(transformers.AutoModelForCausalLM.from_config(config).double().eval())


def masks_given(model: Any) -> list[Any]:
    """The masks that the decoder is given while it scores the batch."""
    seen: list[Any] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    score_batch(model, BATCH)
    hook.remove()
    return seen


@pytest.mark.parametrize("kind", PLAIN)
def test_scores_and_gradients_are_those_of_the_masked_rows(kind: str) -> None:
    model, results = model_of(kind, PLAIN[kind]), []
    assert masks_given(model) == [None]
    for masks in (False, True):
        model.masks_padding = masks
        scores = score_batch(model, BATCH)
        gradients = torch.autograd.grad(scores.sum(), [weight for weight in model.parameters() if weight.requires_grad])
        results.append((scores, *gradients))
    for left, right in zip(*results, strict=True):
        assert (left - right).abs().max() <= 1e-9 * right.abs().max()


def test_attention_is_asked_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """What flash attention needs: no mask, and causal by a flag."""
    asked, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*states: Any, **settings: Any) -> Any:
        asked.append((settings["attn_mask"], settings["is_causal"]))
        return attend(*states, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    score_batch(model_of("Qwen2", SMALL), BATCH)
    assert asked == [(None, True)] * 2


@pytest.mark.parametrize("kind", MASKED)
def test_windows_states_and_own_attention_keep_the_mask(kind: str) -> None:
    (mask,) = masks_given(model_of(kind, MASKED[kind]))
    assert torch.equal(mask, BATCH.attention_mask)
