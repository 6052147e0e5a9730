"""The experts' balancing loss beside the objective: transformers' own value, and its gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from prefmill.core.errors import ConfigError
from prefmill.families.causal.group_layout import pack
from prefmill.families.causal.load_check import as_scorer
from prefmill.families.causal.router_loss import RoutedFamily, require_routing
from prefmill.families.causal.scorer import encode_sequences, score_batch
from tests.models.matrix import GROUPS, build
from tests.unit.families.causal.test_kinds_of_layers import assert_same_gradients, dpo_loss

ROWS = [(prompt, answer) for prompt, answers in GROUPS for answer in answers]


def routed(model: Any, layout: str) -> Any:
    require_routing(model, "tiny")
    model.counts_routing = True
    return as_scorer(model, layout, "tiny").train()


def family() -> RoutedFamily:
    return RoutedFamily(lambda *_: None, score_batch, coefficient=0.5)


def own_loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    return loss


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])
def test_value_and_gradients_are_transformers_own(model_type: str) -> None:
    plain = build(model_type)
    scorer = routed(copy.deepcopy(plain), "pairwise")
    batch, reference = encode_sequences(ROWS, pad=0), torch.zeros(len(ROWS))
    found = dpo_loss(score_batch(scorer, batch), reference) + family().beside(scorer)
    other = as_scorer(copy.deepcopy(plain), "pairwise", "tiny")
    expected = dpo_loss(score_batch(other, batch), reference)
    aux = own_loss(plain, batch.input_ids, batch.attention_mask)
    assert found.item() == pytest.approx((expected + 0.5 * aux).item(), rel=1e-5)
    found.backward()
    expected.backward()
    (0.5 * aux).backward()
    for left, right in zip(other.parameters(), plain.parameters(), strict=True):
        right.grad = sum(grad for grad in (left.grad, right.grad) if grad is not None)
    assert_same_gradients(plain, scorer, 1e-4)


def test_a_shared_prompt_counts_once() -> None:
    plain = build("mixtral")
    prompt, (answer, *_) = GROUPS[0]
    scorer = routed(copy.deepcopy(plain), "group")
    score_batch(scorer, pack([(prompt, [answer])]))
    ids = torch.tensor([[*prompt, *answer]])
    assert family().beside(scorer).item() == pytest.approx(
        0.5 * own_loss(plain, ids, torch.ones_like(ids)).item(), rel=1e-5
    )


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not report what its experts"):
        require_routing(build("llama"), "tiny")
