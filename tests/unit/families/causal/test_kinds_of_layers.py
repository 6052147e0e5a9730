"""One model of each kind in both layouts: its first loss, scores and gradients beside one sequence at a time.

The truth is the model's own forward on whole sequences, full logits, all of it in float64.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prefmill.families.causal import group_attention
from prefmill.families.causal.group_layout import pack
from prefmill.families.causal.load_check import as_scorer
from prefmill.families.causal.scorer import encode_sequences, score_batch
from prefmill.training.objectives import PairScores, Settings, sigmoid
from tests.models.matrix import GROUPS, build

DENSE = ("qwen2", "mixtral", "gpt_oss", "granite", "gemma2", "mistral", "gemma3_text", "cohere2", "olmo3", "phi3",
         "llama4_text", "qwen3_vl", "gemma3")  # fmt: skip
HYBRIDS = ("lfm2", "qwen3_next", "qwen3_5_text", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "kimi_linear",
           "olmo_hybrid", "zamba2", "mamba2")  # fmt: skip
PAIRS = [(0, 1), (2, 1), (3, 4)]  # of the answers in GROUPS


class InFloat64(TorchFunctionMode):
    """Models cast to fp32 inside, which would hide what is compared: here those casts are to float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        if function is Tensor.float:
            return args[0].double()
        if function in (Tensor.to, Tensor.type):
            args = [torch.float64 if value is torch.float32 else value for value in args]
        return function(*args, **wide)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are cut into several blocks of queries."""
    monkeypatch.setattr(group_attention, "_QUERIES_AT_ONCE", 4)


def model_of(model_type: str) -> Any:
    """A tiny model in float64, caps and scales strong enough to be seen."""
    model = build(model_type).double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the kernel for all experts at once has no float64
    for buffer in model.buffers():  # rotary frequencies too
        if buffer.is_floating_point():
            buffer.data = buffer.data.double()
    return model


def plain_scores(model: Any) -> Tensor:
    scores = []
    for prompt, answers in GROUPS:
        for answer in answers:
            logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
            logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(logps.gather(-1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(scores)


def dpo_loss(scores: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = (torch.tensor([pair[side] for pair in PAIRS]) for side in (0, 1))
    lengths = torch.ones(len(PAIRS))
    sides = (scores[chosen], scores[rejected], lengths, lengths, reference[chosen], reference[rejected])
    return sigmoid(PairScores(*sides), Settings(0.1)).sum()


def in_layout(model: Any, layout: str) -> Tensor:
    rows = [(prompt, answer) for prompt, answers in GROUPS for answer in answers]
    return score_batch(model, pack(GROUPS) if layout == "group" else encode_sequences(rows, pad=0))


def check(model_type: str, layout: str, tolerance: float) -> None:
    plain = model_of(model_type)
    scorer = as_scorer(copy.deepcopy(plain), layout, "tiny").train()
    truth, found = plain_scores(plain.eval()), in_layout(scorer, layout)
    assert (found - truth).abs().max() < tolerance * truth.abs().max()
    losses = [dpo_loss(scores, truth.detach()) for scores in (truth, found)]
    assert losses[1].item() / len(PAIRS) == pytest.approx(math.log(2), rel=max(tolerance, 1e-9))
    for loss in losses:
        loss.backward()
    assert_same_gradients(plain, scorer, tolerance)


def assert_same_gradients(plain: Any, other: Any, tolerance: float) -> None:
    for (name, wanted), weight in zip(plain.named_parameters(), other.parameters(), strict=True):
        if wanted.grad is None:
            assert weight.grad is None or not weight.grad.any(), name
        else:
            assert weight.grad is not None, name
            assert (wanted.grad - weight.grad).abs().max() <= tolerance * wanted.grad.abs().max() + 1e-12, name


@pytest.mark.parametrize("layout", ["group", "pairwise"])
@pytest.mark.parametrize("model_type", DENSE)
def test_first_loss_and_gradients_are_those_of_one_sequence_at_a_time(model_type: str, layout: str) -> None:
    with InFloat64():
        check(model_type, layout, 1e-9)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_responses_start_from_the_prompts_state_and_gradients_meet_in_it(model_type: str) -> None:
    with InFloat64():
        check(model_type, "group", 1e-9)


@pytest.mark.parametrize("model_type", ["lfm2", "bamba", "gpt_oss"])
def test_layers_that_are_computed_anew_share_prompts_too(model_type: str) -> None:
    """In fp32: the backward pass runs outside of the mode above."""
    models = [as_scorer(build(model_type), "group", "tiny").train() for _ in range(2)]
    models[1].gradient_checkpointing_enable({"use_reentrant": False})
    for model in models:
        score_batch(model, pack(GROUPS)).sum().backward()
    assert_same_gradients(*models, 1e-5)
