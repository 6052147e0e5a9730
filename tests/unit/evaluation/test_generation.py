"""Generation: the sampler's distribution, and that a sample is a function of its own key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.generation import (
    GenerationRequest,
    KeyedSampler,
    Sampling,
    generate_reviews,
    inverse_cdf,
    keep_top_p,
    max_prompt_tokens,
    plan_batches,
    require_fitting,
    uniforms,
)

VOCABULARY = 40
SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0, seed=3)


def test_inverse_cdf_of_known_uniforms() -> None:
    masses = torch.tensor([[0.2, 0.0, 0.5, 0.3, 0.0]] * 6, dtype=torch.float64)
    uniform = torch.tensor([[0.0], [0.1999], [0.2], [0.6999], [0.71], [1.0]], dtype=torch.float64)
    assert inverse_cdf(masses, uniform).flatten().tolist() == [0, 0, 2, 2, 3, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.25, 0.15]], dtype=torch.float64)
    assert keep_top_p(probabilities, 0.7).tolist() == [[0.0, 0.5, 0.25, 0.0]]
    assert keep_top_p(probabilities, 0.01).tolist() == [[0.0, 0.5, 0.0, 0.0]]
    assert keep_top_p(probabilities, 1.0) is probabilities


def test_sampler_draws_from_the_softmax_at_its_temperature() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5])
    count = 20_000
    sampler = KeyedSampler(np.random.default_rng(0).random((count, 1)), 1, Sampling(1, 0.7, 1.0, 0))
    drawn = sampler(torch.zeros(count, 1, dtype=torch.long), scores.repeat(count, 1)).argmax(-1)
    expected = torch.softmax(scores / 0.7, 0)
    observed = torch.bincount(drawn, minlength=4) / count
    assert (observed - expected).abs().max() < 4 * 0.5 / count**0.5


def test_every_step_has_a_number_of_its_own() -> None:
    numbers = np.array([[0.05, 0.45, 0.95], [0.99, 0.15, 0.55]])
    sampler = KeyedSampler(numbers, 4, Sampling(3, 1.0, 1.0, 0))
    flat = torch.zeros(2, 10)
    drawn = [sampler(torch.zeros(2, 4 + step, dtype=torch.long), flat).argmax(-1).tolist() for step in range(3)]
    assert drawn == [[0, 9], [4, 1], [9, 5]]


def test_uniforms_follow_from_the_key_alone() -> None:
    assert uniforms(1, "p", 0, 3).tolist() == uniforms(1, "p", 0, 5)[:3].tolist()
    others = [uniforms(2, "p", 0, 3), uniforms(1, "q", 0, 3), uniforms(1, "p", 1, 3)]
    assert all(other.tolist() != uniforms(1, "p", 0, 3).tolist() for other in others)
    # The stream is part of every published evaluation's identity: this number must never change.
    assert uniforms(0, "paper", 0, 1)[0] == pytest.approx(0.7938013448486163, abs=1e-15)


class WordTokenizer:
    """As much of a tokenizer as generation needs."""

    pad_token_id, eos_token_id, chat_template = 0, 1, None

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def tiny(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        initializer_range=0.5, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def requests() -> list[GenerationRequest]:
    draw = np.random.default_rng(5)
    return [
        GenerationRequest(
            f"paper{index}", sample, tuple(int(token) for token in draw.integers(3, VOCABULARY, 3 + index))
        )
        for index in range(7)
        for sample in range(2)
    ]


def completed(
    model: Any, requests: list[GenerationRequest], folder: Path, batch_size: int, sampling: Sampling = SAMPLING
) -> Any:
    return generate_reviews(model, WordTokenizer(), requests, sampling, batch_size, folder)  # type: ignore[arg-type]


def test_a_sample_does_not_depend_on_its_batch(model: Any, requests: list[GenerationRequest], tmp_path: Path) -> None:
    alone = completed(model, requests, tmp_path / "one", 1)
    assert completed(model, requests, tmp_path / "five", 5) == alone
    assert completed(model, requests[::-1][3:], tmp_path / "fewer", 4).items() <= alone.items()
    assert len({row["text"] for row in alone.values()}) > len(requests) // 2  # the control: it does sample


def test_a_sample_does_not_depend_on_its_batch_with_two_sets_of_positions(
    requests: list[GenerationRequest], tmp_path: Path
) -> None:
    """LongRoPE: transformers takes the long factors for all rows of a batch, or for none."""
    border = 7 + SAMPLING.max_new_tokens  # prompts of 3 to 9 tokens: some stay below it, some pass it while they go on
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": border,
            "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}  # fmt: skip
    model = tiny(rope_parameters=rope)
    alone = completed(model, requests, tmp_path / "one", 1)
    assert completed(model, requests, tmp_path / "all", 14) == alone


def test_the_models_own_generation_defaults_are_set_aside(
    model: Any, requests: list[GenerationRequest], tmp_path: Path
) -> None:
    plain = completed(model, requests, tmp_path / "plain", 4)
    own = model.generation_config
    model.generation_config = type(own)(repetition_penalty=5.0, top_k=1, temperature=9.0, do_sample=True)
    try:
        assert completed(model, requests, tmp_path / "shipped", 4) == plain
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = own


def test_greedy_takes_the_likeliest_token(model: Any, requests: list[GenerationRequest], tmp_path: Path) -> None:
    rows = completed(model, requests[:1], tmp_path, 1, Sampling(1, 0.0, 1.0, 0))
    with torch.inference_mode():
        logits = model(torch.tensor([requests[0].prompt_ids])).logits[0, -1]
    assert rows["paper0", 0]["text"] == str(int(logits.argmax()))


def test_a_model_without_keys_and_values_writes_too(requests: list[GenerationRequest], tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    model = MambaForCausalLM(config).eval()
    rows = completed(model, requests[:1], tmp_path, 1, Sampling(3, 0.0, 1.0, 0))
    ids = list(requests[0].prompt_ids)
    with torch.inference_mode():
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert rows["paper0", 0]["text"] == " ".join(map(str, ids[-3:]))


def test_an_end_token_ends_the_text_and_the_limit_truncates_it(model: Any, tmp_path: Path) -> None:
    class EndsSoon(WordTokenizer):
        eos_token_id = 7

    many = [GenerationRequest(f"p{index}", 0, (5, 6)) for index in range(60)]
    rows = generate_reviews(model, EndsSoon(), many, SAMPLING, 30, tmp_path).values()  # type: ignore[arg-type]
    assert {row["truncated"] for row in rows} == {True, False}
    for row in rows:
        assert not {"7", "1"} & set(row["text"].split())
        assert row["truncated"] == (row["num_tokens"] == SAMPLING.max_new_tokens)


def test_an_interrupted_run_resumes_at_the_first_missing_batch(
    model: Any, requests: list[GenerationRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = completed(model, requests, tmp_path / "whole", 4)
    generate, calls = model.generate, []

    def failing(**inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        completed(model, requests, tmp_path / "killed", 4)
    assert completed(model, requests, tmp_path / "killed", 4) == whole
    assert len(calls) == 3 + len(plan_batches(requests, 4)) - 2
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_prompts_that_do_not_fit_are_refused_by_name(model: Any, requests: list[GenerationRequest]) -> None:
    assert max_prompt_tokens(model.config, 60) == 4
    with pytest.raises(InputError, match=r"5 prompts do not fit(.|\n)*paper6(.|\n)*9 tokens(.|\n)*max_prompt_tokens=4"):
        require_fitting(requests, 4)
    require_fitting(requests, 9)
    require_fitting(requests, None)
    with pytest.raises(ConfigError, match="leaves no room"):
        max_prompt_tokens(model.config, 64)
