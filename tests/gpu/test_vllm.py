"""Point 7: vLLM's draws repeat under their seeds, and its answers to the checklist are those of transformers.

No CPU form here: tests/vllm is that, with vLLM's CPU build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.engine import TransformersConfig, VllmConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import load_checklist
from tests.vllm.conftest import judge, texts, vllm  # noqa: F401
from tests.vllm.judging import p_yes, papers

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
TOLERANCE = 0.02  # of a probability, between two libraries' kernels on a GPU


@pytest.fixture(scope="module")
def engine(judge: Path, vllm: None) -> Any:  # noqa: F811
    """vLLM with a model of two layers."""
    given = {"precision": "fp32", "kv_cache_gb": 1.0, "enforce_eager": True, "max_length": 1500}
    return open_engine(VllmConfig(model_name_or_path=str(judge), **given), load_checklist())


def test_its_answers_are_those_of_transformers(engine: Any, judge: Path, texts: list[str]) -> None:  # noqa: F811
    other = open_engine(TransformersConfig(model_name_or_path=str(judge)), load_checklist())
    expected, found = p_yes(list(other.score(papers(texts)))), p_yes(list(engine.score(papers(texts))))
    assert {len(values) for values in found.values()} == {24}
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=TOLERANCE), name


def test_generation_repeats_under_its_seeds(engine: Any, judge: Path, tmp_path: Path) -> None:  # noqa: F811
    from transformers import AutoTokenizer

    from prefmill.families.causal.generation import GenerationRequest, Sampling
    from prefmill.families.causal.vllm_generation import generate_with_vllm

    tokenizer = AutoTokenizer.from_pretrained(judge)
    sampling = Sampling(max_new_tokens=32, temperature=1.0, top_p=1.0, seed=1)
    requests = [GenerationRequest(f"r{number}", 0, tuple(range(10, 20 + number))) for number in range(16)]
    written = []
    for name, order in (("one", requests), ("two", requests[::-1])):
        (tmp_path / name).mkdir()
        written.append(generate_with_vllm(engine._llm, tokenizer, [0], order, sampling, 8, tmp_path / name))
    assert written[0] == written[1]
