"""Block-wise likelihoods: one block is the whole bound, blocks of one token are a causal model's likelihood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefmill.families.mdlm.block_likelihood import block_bounds, block_spans
from prefmill.families.mdlm.family import Drawing
from prefmill.families.mdlm.likelihood import bounds
from prefmill.families.mdlm.loading import load_diffusion_model
from prefmill.families.mdlm.scorer import patch_forward, restore_forward

MASK = 2
SAMPLES = [([5, 9, 14, 20, 31], [8, 40, 41, 12, 13, 44, 9]), ([7, 30], [6, 22, 19])]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    loaded = load_diffusion_model(str(tiny_folder), precision="fp32").double()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(4.0)
    return loaded


def test_one_block_is_the_whole_bound(model: Any) -> None:
    drawing = Drawing(16, "balanced", 0)
    found = list(block_bounds(model, SAMPLES, drawing, 64, MASK))
    patch_forward(model, mask_token_id=MASK)
    whole = list(bounds(model, SAMPLES, drawing))
    restore_forward(model)
    for one, two in zip(found, whole, strict=True):
        assert one.values == pytest.approx(two.values, abs=1e-5)
        assert one.standard_error == pytest.approx(two.standard_error, abs=1e-5)


def test_blocks_of_one_token_are_a_causal_model_shown_a_mask(model: Any) -> None:
    """Each token from what precedes it and its own mask, by transformers' causal Llama with the same weights."""
    config = LlamaConfig(**{**model.config.to_dict(), "model_type": "llama", "is_causal": True})
    causal = LlamaForCausalLM(config).double()
    causal.load_state_dict(model.state_dict())
    for (prompt, response), found in zip(
        SAMPLES, block_bounds(model, SAMPLES, Drawing(4, "iid", 0), 1, MASK), strict=True
    ):
        total = 0.0
        for place, token in enumerate(response):
            ids = torch.tensor([prompt + response[:place] + [MASK]])
            with torch.no_grad():
                total += float(causal(input_ids=ids).logits[0, -1].log_softmax(-1)[token])
        assert found.values == pytest.approx([total] * 4, abs=1e-9)
        assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_later_blocks_change_nothing_and_blocks_count_from_the_texts_start(model: Any) -> None:
    assert block_spans(5, 12, 4) == [(5, 8), (8, 12)]
    assert block_spans(4, 6, 4) == [(4, 6)]
    drawing = Drawing(8, "balanced", 0)
    prompt, response = SAMPLES[0]
    (short,) = block_bounds(model, [(prompt, response[:3])], drawing, 4, MASK)
    (whole,) = block_bounds(model, [(prompt, response)], drawing, 4, MASK)
    (rest,) = block_bounds(model, [(prompt + response[:3], response[3:])], drawing, 4, MASK)
    assert whole.bound == pytest.approx(short.bound + rest.bound, abs=1e-9)
