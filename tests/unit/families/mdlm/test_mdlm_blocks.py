"""Blocks: scored, drawn and written so that no token sees a later one; one block is the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.exact_joints import Joint, moments_by_count, random_joint
from prefmill.core.errors import ConfigError, InputError
from prefmill.families.mdlm.blocks import block_spans
from prefmill.families.mdlm.evaluated_model import bounds, chain
from prefmill.families.mdlm.family import Drawing
from prefmill.families.mdlm.generation import Unmasking, generate
from prefmill.families.mdlm.load_check import check_diffusion_model
from prefmill.families.mdlm.loading import block_length_of, load_diffusion_model
from prefmill.families.mdlm.native import Llada2Config
from prefmill.families.mdlm.scorer import encode_samples, patch_forward, restore_forward, score_batch

MASK = 2
SAMPLES = [([5, 9, 14, 20, 31], [8, 40, 41, 12, 13, 44, 9]), ([7, 30], [6, 22, 19])]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    loaded = load_diffusion_model(str(tiny_folder), precision="fp32").double()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(4.0)
    return loaded


def causal_twin(model: Any) -> Any:
    causal = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "model_type": "llama", "is_causal": True}))
    causal.double().load_state_dict(model.state_dict())
    return causal


def values(model: Any, drawing: Drawing, shifted: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Every draw's value of SAMPLES, [2, n], and the gradient of their sum."""
    batch = encode_samples(SAMPLES, [drawing.of(*row, 0) for row in SAMPLES])
    model.zero_grad()
    patch_forward(
        model, mask_token_id=MASK, shifted=shifted, forward_batch_size=3, block_length=drawing.block_length
    )  # fmt: skip
    found = score_batch(model, batch)
    restore_forward(model)
    found.sum().backward()
    return found.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}


def block_by_block(model: Any, drawing: Drawing, shifted: bool) -> Tensor:
    """The same by equation 8: a pass for each block, no later token in it, every layer's attention masked by hand."""
    rows = []
    for prompt, response in SAMPLES:
        drawn, ids = drawing.of(prompt, response, 0), prompt + response
        row = torch.zeros(drawing.num_draws, dtype=torch.float64)
        for start, end in block_spans(len(prompt), len(ids), drawing.block_length):
            block = [place // (drawing.block_length or end) for place in range(end)]
            seen = torch.tensor([[0.0 if key <= query else -1e9 for key in block] for query in block])
            for draw, masked in enumerate(drawn.masked[:, start - len(prompt) : end - len(prompt)]):
                hidden = [start + place for place in masked.nonzero()[0]]
                noisy = torch.tensor([[MASK if place in hidden else ids[place] for place in range(end)]])
                logits = model(input_ids=noisy, attention_mask=seen.double()[None, None]).logits[0]
                for place in hidden:
                    weight = float(np.float32(drawn.weights[draw, place - len(prompt)]))
                    row[draw] = row[draw] + weight * logits[place - shifted].log_softmax(-1)[ids[place]]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("block_length", [1, 4, 6])
def test_values_and_gradients_are_those_of_a_pass_for_each_block(model: Any, block_length: int, shifted: bool) -> None:
    drawing = Drawing(4, "balanced", 0, block_length=block_length)
    found, gradients = values(model, drawing, shifted)
    model.zero_grad()
    expected = block_by_block(model, drawing, shifted)
    expected.sum().backward()
    assert (found - expected).abs().max() < 1e-9
    for name, value in model.named_parameters():
        assert value.grad is not None
        assert torch.allclose(gradients[name], value.grad, rtol=1e-5, atol=1e-5 * float(value.grad.abs().max())), name


def test_one_block_is_the_whole_text_to_the_bit(model: Any) -> None:
    whole, gradients = values(model, Drawing(16, "balanced", 0))
    for block_length in (12, 64):
        found, own = values(model, Drawing(16, "balanced", 0, block_length=block_length))
        assert torch.equal(found, whole)
        assert all(torch.equal(own[name], gradients[name]) for name in gradients)


def test_blocks_of_one_token_are_a_causal_model_shown_a_mask(model: Any) -> None:
    """Each token from what precedes it and its own mask, by transformers' causal Llama with the same weights."""
    causal = causal_twin(model)
    patch_forward(model, mask_token_id=MASK, block_length=1)
    scored = list(bounds(model, SAMPLES, Drawing(4, "iid", 0, block_length=1)))
    restore_forward(model)
    for (prompt, response), found in zip(SAMPLES, scored, strict=True):
        total = 0.0
        for place, token in enumerate(response):
            ids = torch.tensor([prompt + response[:place] + [MASK]])
            with torch.no_grad():
                total += float(causal(input_ids=ids).logits[0, -1].log_softmax(-1)[token])
        assert found.values == pytest.approx([total] * 4, abs=1e-5)
        assert found.standard_error == pytest.approx(0, abs=1e-9)
        assert chain(model, prompt, response, MASK, False, 8, 1) == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("block_length", [1, 2, 3, 5])
def test_the_bound_by_blocks_of_a_known_joint_is_its_log_probability(block_length: int) -> None:
    """Its conditionals agree, so that every order has the same product: the mean of the draws is log p."""
    joint, sequence = random_joint(3, 5, seed=1), (0, 2, 1, 1, 0)
    drawing = Drawing(20_000, "iid", 0, block_length=block_length)
    drawn, exact, estimates = drawing.of([], list(sequence), 0), 0.0, np.zeros(drawing.num_draws)
    for start, end in block_spans(0, 5, block_length):
        table = joint.table[sequence[:start]].sum(axis=tuple(range(end - start, 5 - start)))
        sums = Joint(table / table.sum()).masked_sums(sequence[start:end])
        exact += moments_by_count(sums, end - start)[0].mean()
        estimates += drawn.weights[:, start] * sums[drawn.masked[:, start:end] @ (1 << np.arange(end - start))]
    assert exact == pytest.approx(joint.log_probability(sequence), abs=1e-12)
    assert estimates.mean() == pytest.approx(exact, abs=4 * estimates.std() / 20_000**0.5 + 1e-9)


@pytest.mark.parametrize("block_length", [1, 2, 3, 5])
def test_the_bound_by_blocks_is_below_the_likelihood_over_orders(block_length: int) -> None:
    """Of conditionals that agree with no joint, all orders within the blocks enumerated; single tokens have but one."""
    given = -np.random.default_rng(0).exponential(size=(5, 2**5))  # log p(token | the tokens that are seen, by bits)
    exact = bound = 0.0
    for start, end in block_spans(0, 5, block_length):
        size, orders = end - start, list(permutations(range(start, end)))
        chains = [sum(given[n, _seen(start, order[:k])] for k, n in enumerate(order)) for order in orders]
        exact += float(np.log(np.mean(np.exp(chains))))
        sums = np.array([
            sum(given[n, _seen(start, [m for m in range(start, end) if not bits >> (m - start) & 1])]
                for n in range(start, end) if bits >> (n - start) & 1)
            for bits in range(2**size)
        ])  # fmt: skip
        bound += float(moments_by_count(sums, size)[0].mean())
    assert bound == pytest.approx(exact, abs=1e-12) if block_length == 1 else bound < exact - 0.01


def _seen(start: int, places: Sequence[int]) -> int:
    return sum(1 << place for place in [*range(start), *places])


def test_blocks_count_from_the_texts_start_and_are_drawn_apart() -> None:
    assert block_spans(5, 12, 4) == [(5, 8), (8, 12)]
    assert block_spans(4, 6, 4) == [(4, 6)]
    prompt, response = SAMPLES[0]
    drawing = Drawing(8, "balanced", 0, block_length=4)
    whole, short = drawing.of(prompt, response, 0), drawing.of(prompt, response[:3], 0)
    assert (whole.masked[:, :3] == short.masked).all()
    assert not (drawing.of(prompt, [*response[:-1], 9], 0).masked[:, :3] != short.masked).any(), "whatever comes later"
    assert whole.masked[:, :3].any(1).all()
    assert whole.masked[:, 3:].any(1).all()


def test_a_model_that_ignores_the_mask_of_blocks_is_refused(model: Any) -> None:
    for shifted in (False, True):
        patch_forward(model, mask_token_id=MASK, shifted=shifted, block_length=4)
        check_diffusion_model(model, "tiny", MASK, shifted, torch.float64, 4)
        restore_forward(model)
    handle = model.model.register_forward_pre_hook(
        lambda _, inputs, keys: (inputs, {**keys, "attention_mask": None}), with_kwargs=True
    )
    patch_forward(model, mask_token_id=MASK, block_length=4)
    with pytest.raises(InputError, match="own likelihoods"):
        check_diffusion_model(model, "tiny", MASK, False, torch.float64, 4)
    restore_forward(model)
    handle.remove()


HOW = Unmasking(12, 12, 12, 0.0, "low_confidence", 0)
PROMPTS = [[5, 9, 14, 20, 31], [50, 7, 30, 11, 3]]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_writing_never_looks_at_later_blocks(model: Any, cached: bool, guidance: float) -> None:
    """A longer answer begins as the shorter one, and a cache changes nothing: what is settled sees nothing later."""
    how = replace(HOW, block_length=4, guidance=guidance, prefix_cache=cached)
    for shifted in (False, True):
        whole = generate(model, PROMPTS, how, MASK, shifted)
        short = generate(model, PROMPTS, replace(how, num_tokens=7, block_tokens=7, num_steps=7), MASK, shifted)
        assert [row[:7] for row in whole] == short
        assert whole == generate(model, PROMPTS, replace(how, prefix_cache=False), MASK, shifted)
        assert len({*whole[0], *whole[1]}) > 4, "and is no constant"
        unlike = generate(model, PROMPTS, replace(how, block_length=None), MASK, shifted)
        assert unlike != whole, "as a model that sees the whole text would"


def test_blocks_of_one_token_are_written_as_a_causal_model_would(model: Any) -> None:
    causal = causal_twin(model)
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                logits = causal(input_ids=torch.tensor([[*ids, MASK]])).logits[0, -1]
            logits[MASK] = -torch.inf
            ids.append(int(logits.argmax()))
        assert generate(model, [prompt], replace(HOW, block_length=1), MASK) == [ids[len(prompt) :]]


def test_a_block_as_long_as_the_text_is_written_as_the_whole(model: Any) -> None:
    assert generate(model, PROMPTS, replace(HOW, block_length=64), MASK) == generate(model, PROMPTS, HOW, MASK)
    with pytest.raises(ValueError, match="one length"):
        generate(model, [[5], [6, 7]], replace(HOW, block_length=4), MASK)


def test_whose_blocks() -> None:
    assert block_length_of(Llada2Config(), None, None) == 32
    assert block_length_of(Llada2Config(), 4, "sdpa") == 4
    assert block_length_of(LlamaConfig(), None, "flash_attention_2") is None
    for attention in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ConfigError, match="cannot see block by block"):
            block_length_of(Llada2Config(), None, attention)
