"""A real vLLM with a tiny model; one for all tests, as it takes its time to start."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.engine import VllmConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import load_checklist
from prefmill.reviews.generated import generate
from tests.conftest import left_out
from tests.unit.checklist.conftest import make_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Review texts of the generated corpus."""
    return [row["review_text"] for row in generate(7, 12)]


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A random Qwen2 with heads of a size that vLLM's CPU kernels know, whose answers are far from 0.5."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer([*texts, *["Yes No"] * 50, *["No Yes"] * 50], 600)
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with yes and no by far its likeliest tokens: a chat server tells no others."""
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("judge")
    tokenizer, model = AutoTokenizer.from_pretrained(qwen), Qwen2ForCausalLM.from_pretrained(qwen)
    with torch.no_grad():
        # By a direction that every position has.
        model.model.embed_tokens.weight[:, 0] = 2.0
        for index in tokenizer.convert_tokens_to_ids(["Yes", "No"]):
            model.lm_head.weight[index] *= 2
            model.lm_head.weight[index, 0] = 5.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm() -> None:
    """That it is installed."""
    if importlib.util.find_spec("vllm") is None:
        left_out("vllm", "vllm (make vllm)")


@pytest.fixture(scope="session")
def engine(judge: Path, vllm: None) -> Any:
    """vLLM in float32 with a cache of an eighth of a gigabyte."""
    config = VllmConfig(
        model_name_or_path=str(judge), precision="fp32", kv_cache_gb=0.125, enforce_eager=True, max_length=1500,
        truncate_reviews=False, reviews_in_flight=8,
    )  # fmt: skip
    return open_engine(config, load_checklist())
