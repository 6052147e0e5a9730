"""evaluate with vLLM, for real: the reviews of transformers, each kept as it is finished, scored when vLLM is gone.

Its name puts it before the engine's tests: those run vLLM in this process, which should not be forked afterwards.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.artifact import Artifact
from prefmill.core.errors import ConfigError, InputError
from prefmill.evaluation.generators import GenerationEngine, TransformersGeneration, VllmGeneration
from prefmill.evaluation.held_out import read_held_out
from prefmill.evaluation.model_reviews import WRITTEN, ModelSource, Writing, write_reviews
from prefmill.families.causal.generation import Sampling
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.store.jsonl import read_jsonl
from stages.evaluate import EvaluateConfig, run
from tests.conftest import left_out
from tests.e2e.evaluation_artifacts import make_corpus, make_task

pytestmark = pytest.mark.slow

VLLM = VllmGeneration(kv_cache_gb=0.125, enforce_eager=True)


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        left_out("vllm", "vllm (make vllm)")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_corpus(tmp_path_factory.mktemp("workspace"), 24)


@pytest.fixture(scope="module")
def writer(judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The judge, with many tokens that end an answer: reviews of all lengths take turns in the batch."""
    folder = tmp_path_factory.mktemp("writer") / "model"
    shutil.copytree(judge, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(5, 600, 40)), "top_k": 1}))
    return folder


def written(
    corpus: Artifact, writer: Path, folder: Path, engine: GenerationEngine, temperature: float, top_p: float = 1.0
) -> list[Any]:
    sampling = Sampling(max_new_tokens=48, temperature=temperature, top_p=top_p, seed=1)
    writing = Writing(
        "clean", corpus.path, ImageLimits(), 2, None, 3, sampling, engine
    )  # more reviews than places: they move between them
    folder.mkdir(parents=True, exist_ok=True)
    return write_reviews(ModelSource(str(writer), "fp32"), read_held_out(corpus, None, 0).papers, writing, folder)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.8, 0.7)])
def test_its_reviews_are_those_of_transformers(
    corpus: Artifact, writer: Path, tmp_path: Path, temperature: float, top_p: float
) -> None:
    first = written(corpus, writer, tmp_path / "vllm", VLLM, temperature, top_p)
    expected = written(corpus, writer, tmp_path / "transformers", TransformersGeneration(), temperature, top_p)
    same = sum(one == other for one, other in zip(first, expected, strict=True))
    print(f"temperature {temperature}, top_p {top_p}: {same} of {len(expected)} reviews the same")
    assert first == expected
    assert len(expected) == 16
    if temperature == 1.0:  # else equality would say little
        assert len({row["text"] for row in expected}) == 16
        assert {row["truncated"] for row in expected} == {True, False}
    if temperature == 0.0:
        assert all(one["text"] == two["text"] for one, two in zip(expected[::2], expected[1::2], strict=True))


def test_finished_reviews_are_kept_one_by_one(corpus: Artifact, writer: Path, tmp_path: Path) -> None:
    whole = written(corpus, writer, tmp_path / "whole", VLLM, 1.0)
    lines = (tmp_path / "whole" / "written.journal").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(whole)
    kept = [*lines[:4], lines[4].replace(b'"text":"', b'"text":"KEPT ')]
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "written.journal").write_bytes(b"".join(kept) + lines[5][:20])  # as a kill leaves it
    again = written(corpus, writer, torn, VLLM, 1.0)
    assert (torn / "written.journal").read_bytes().startswith(b"".join(kept))
    differ = [(one, other) for one, other in zip(again, whole, strict=True) if one != other]
    assert [one["text"] for one, _ in differ] == [f"KEPT {other['text']}" for _, other in differ]
    assert len(differ) == 1


def test_the_stage_scores_them_where_no_vllm_has_run(corpus: Artifact, writer: Path, tmp_path: Path) -> None:
    output = tmp_path / "data" / "run" / "evaluate" / "base-clean"
    config = EvaluateConfig(
        model="base", model_name_or_path=str(writer), precision="fp32", temperature=1.0, max_new_tokens=48,
        generation=VLLM,
    )  # fmt: skip
    before = "vllm.engine" in sys.modules
    metrics = run(config, make_task("evaluate", output, {"corpus": [corpus]}))
    assert ("vllm.engine" in sys.modules) == before
    assert metrics["num_reviews"] == 8
    assert json.loads((output / "metrics.json").read_text())["generated_with"] == "vllm"
    assert list(read_jsonl(output / "work" / WRITTEN)) == list(read_jsonl(output / "generations.jsonl"))


def test_a_prompt_that_does_not_fit_is_refused_before_vllm_starts(
    corpus: Artifact, writer: Path, tmp_path: Path
) -> None:
    sampling = Sampling(max_new_tokens=2000, temperature=0.0, top_p=1.0, seed=1)
    papers = read_held_out(corpus, None, 0).papers
    writing = Writing("clean", corpus.path, ImageLimits(), 1, None, 4, sampling, VLLM)
    with pytest.raises(InputError, match="do not fit the model's context"):
        write_reviews(ModelSource(str(writer), "fp32"), papers, writing, tmp_path)


def test_without_vllm_the_error_says_how_to_get_it(
    corpus: Artifact, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vLLM is not installed(.|\n)*make vllm"):
        written(corpus, writer, tmp_path, VLLM, 0.0)
