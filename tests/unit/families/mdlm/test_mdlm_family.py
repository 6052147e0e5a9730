"""The family: pairs over shared draws, the live variance, and how many draws follow from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefmill.core.config import validate
from prefmill.families.mdlm import dpo
from prefmill.families.mdlm.config import DiffusionPreferenceConfig, DiffusionSftConfig
from prefmill.families.mdlm.family import (
    DiffusionFamily,
    Drawing,
    LiveVariance,
    encode_pairs,
    fill_groups,
    margin_variance,
)
from prefmill.training.batches import GroupPart
from prefmill.training.data import Group, Pair

GROUP = Group([5, 6], [[7, 8], [9], [10, 11, 12]], [Pair("a", 0, 1), Pair("b", 2, 0)])
MODEL = torch.nn.Module()  # only asked whether it is in training


def test_a_response_in_two_pairs_is_a_sample_once_and_draws_follow_the_epoch() -> None:
    drawing = Drawing(4, "balanced", 0)
    batches = [encode_pairs([GROUP], [GroupPart(0, (0, 1))], epoch, drawing) for epoch in (0, 0, 1)]
    assert batches[0].chosen.tolist() == [0, 2]
    assert batches[0].rejected.tolist() == [1, 0]
    assert batches[0].lengths.tolist() == [2, 1, 3]
    assert (batches[0].masked == batches[1].masked).all()
    assert (batches[0].masked != batches[2].masked).any()
    alone = encode_pairs([GROUP], [GroupPart(0, (1,))], 0, drawing)
    assert (alone.masked[0] == batches[0].masked[0]).all(), "a row's draws do not depend on its batch"


def test_fine_tuning_fills_answers_with_end_tokens_by_the_row_alone() -> None:
    config = validate(DiffusionSftConfig, {"answer_block_tokens": 4, "max_length": 8})
    end: Any = SimpleNamespace(eos_token_id=2)
    pair = [Pair("a", 0, 1)]
    (found,) = fill_groups([Group([5, 6], [[7, 8], [7] * 4, [7] * 5], pair)], config, end)
    assert found.responses == [[7, 8, 2, 2], [7] * 4, [7] * 5 + [2]], "max_length leaves room for one"
    group = Group([5], found.responses[:1], [Pair("a", 0, 0)])
    batch = encode_pairs([group], [GroupPart(0, (0,))], 0, Drawing(16, "balanced", 0))
    assert batch.lengths.tolist() == [4]
    assert batch.masked[0].any(0).tolist() == [False, True, True, True, True], "the fill is learnt too"


def test_the_fill_ends_a_block_where_blocks_count_from_the_texts_start() -> None:
    config = validate(DiffusionSftConfig, {"answer_block_tokens": 4, "block_length": 4, "max_length": 12})
    end: Any = SimpleNamespace(eos_token_id=2)
    (found,) = fill_groups([Group([5, 6], [[7], [7, 8, 9]], [Pair("a", 0, 1)])], config, end)
    assert found.responses == [[7, 2], [7, 8, 9, 2, 2, 2]]


def test_references_are_kept_apart_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(dpo, "start_weights", lambda *_: "weights")
    monkeypatch.setattr(dpo, "kept_reference", lambda _task, _weights, settings, _device: said.append(settings))
    monkeypatch.setattr(dpo, "reference_scores", lambda *_: [])
    task: Any = None
    for keys in ({}, {"block_length": 4}, {"block_length": 8}):
        config = validate(DiffusionPreferenceConfig, {**keys, "effective_batch_size": 1})
        dpo.reference_values(MODEL, torch.device("cpu"), task, [], 1, config)
    plain, four, eight = said
    assert (four, eight) == ({**plain, "block_length": 4}, {**plain, "block_length": 8})
    assert "block_length" not in plain, "those kept before this key are still found"


def test_scores_are_means_over_the_same_draws_for_policy_and_reference() -> None:
    values = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    family = DiffusionFamily(None, lambda model, batch: values, LiveVariance(2, 1.0, 0.05))  # type: ignore[arg-type]
    group = Group([5], [[7], [8]], [Pair("a", 0, 1)])
    batch = encode_pairs([group], [GroupPart(0, (0,))], 0, Drawing(2, "balanced", 0))
    scores = family.pair_scores(MODEL.train(), batch, torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]))
    assert scores.margin.tolist() == [pytest.approx((2 - 1) - (2 - 1))]
    assert family.live is not None
    # The chosen side's differences are 0 and 2 (variance 2), the rejected side's 2 and 0 (variance 2).
    assert family.live.report()["draw_variance"] == pytest.approx(4.0)


def test_margin_variance_without_a_reference() -> None:
    sides = [torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 1.0]])]
    assert margin_variance(sides, [None, None]).tolist() == [2.0]


def test_draws_follow_the_recommendation_within_bounds() -> None:
    live = LiveVariance(16, beta=1.0, tolerance=0.05, adaptive=True)
    assert live.in_use == 4
    for variance, expected in ((0.0, 4), (0.35, 8), (0.01, 2), (100.0, 16)):
        live.add(torch.tensor([variance]))
        live.follow(live.report())
        assert live.in_use == expected
    fixed = LiveVariance(20, beta=1.0, tolerance=0.05)
    fixed.follow({"recommended_draws": 4})
    assert fixed.in_use == 20
    assert fixed.report() == {}
