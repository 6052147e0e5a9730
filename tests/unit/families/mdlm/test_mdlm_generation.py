"""Generation by unmasking: which tokens settle when, block after block; draws follow the model's probabilities."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefmill.families.mdlm.generation import Unmasking, generate, settled_at

MASK, VOCABULARY = 0, 6


class Fixed(nn.Module):
    """Logits for every place, whatever it is shown; `seen` keeps what that was."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seen: list[list[int]] = []

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:
        self.seen.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1, -1))


def how(**keys: Any) -> Unmasking:
    return Unmasking(**{"num_tokens": 4, "block_tokens": 4, "num_steps": 4, "temperature": 0.0,
                        "remasking": "low_confidence", "seed": 0, **keys})  # fmt: skip


def peaked(tokens: list[int], sureness: list[float]) -> Fixed:
    logits = torch.zeros(1, len(tokens), VOCABULARY)
    for place, (token, sure) in enumerate(zip(tokens, sureness, strict=True)):
        logits[0, place, token] = sure
    return Fixed(logits)


def test_the_surest_token_settles_first() -> None:
    model = peaked([1, 1, 2, 3, 4, 5], [9, 9, 2.0, 4.0, 3.0, 1.0])
    assert generate(model, [[1, 1]], how(), MASK) == [[2, 3, 4, 5]]
    assert [seen[2:] for seen in model.seen] == [[0, 0, 0, 0], [0, 3, 0, 0], [0, 3, 4, 0], [2, 3, 4, 0]]


def test_blocks_are_finished_one_after_another() -> None:
    model = peaked([1, 1, 2, 3, 4, 5], [9, 9, 1.0, 2.0, 8.0, 9.0])
    assert generate(model, [[1, 1]], how(block_tokens=2, num_steps=2), MASK) == [[2, 3, 4, 5]]
    assert [seen[2:] for seen in model.seen] == [[0, 0, 0, 0], [2, 3, 0, 0]]


def test_shifted_logits_are_read_one_place_before() -> None:
    model = peaked([1, 2, 3, 4, 5, 1], [9, 9, 9, 9, 9, 9])
    assert generate(model, [[1, 1]], how(), MASK, shifted=True) == [[2, 3, 4, 5]]


def test_a_mask_is_never_an_answer() -> None:
    model = peaked([MASK] * 6, [20.0] * 6)
    assert MASK not in generate(model, [[1, 1]], how(temperature=1.0), MASK)[0]


def test_draws_have_the_models_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.0])
    model = Fixed(probabilities.clamp_min(1e-9).log().expand(1, 6, -1).clone())
    answers = generate(model, [[1, 1]] * 2000, how(temperature=1.0, remasking="random"), MASK)
    found = torch.tensor(answers).flatten().bincount(minlength=VOCABULARY) / 8000
    assert (found - probabilities).abs().max() < 0.02


def test_steps_are_spread_evenly_and_must_divide() -> None:
    assert settled_at(7, 3) == [3, 2, 2]
    with pytest.raises(ValueError, match="multiple of block_tokens"):
        generate(peaked([1] * 6, [1.0] * 6), [[1, 1]], how(block_tokens=3), MASK)
