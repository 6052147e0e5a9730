"""evaluate with vLLM, for real: draws that follow from the row, each kept as it is finished, scored when vLLM is gone.

Its name puts it before the engine's tests: those run vLLM in this process, which should not be forked afterwards.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.core.artifact import Artifact
from prefmill.core.errors import AttemptError, ConfigError, InputError
from prefmill.evaluation import model_reviews
from prefmill.evaluation.generators import GenerationEngine, TransformersGeneration, VllmGeneration
from prefmill.evaluation.held_out import read_held_out
from prefmill.evaluation.model_reviews import WRITTEN, ModelSource, Writing, write_reviews
from prefmill.families.causal.generation import Sampling, encode_prompts, keep_top_p
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.reviews.prompt import review_messages, split_completion
from prefmill.reviews.scale import COMMON_SCALE
from prefmill.store.jsonl import read_jsonl
from prefmill.store.missing import silent
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
def writer(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model, with many tokens that end an answer: reviews of all lengths take turns in the batch."""
    folder = tmp_path_factory.mktemp("writer") / "model"
    shutil.copytree(qwen, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(5, 600, 40)), "top_k": 1}))
    return folder


def written(
    corpus: Artifact, writer: Path, folder: Path, engine: GenerationEngine = VLLM, *, temperature: float = 1.0,
    seed: int = 1, batch_size: int = 3, backwards: bool = False, progress: Any = silent,
) -> list[Any]:  # fmt: skip
    """Two reviews per paper; more than there are places in a batch, so that they move between them."""
    sampling = Sampling(max_new_tokens=48, temperature=temperature, top_p=0.9, seed=seed)
    writing = Writing("clean", corpus.path, ImageLimits(), 2, None, batch_size, sampling, engine)
    papers = read_held_out(corpus, None, 0).papers
    ordered = dict(reversed(papers.items())) if backwards else papers
    folder.mkdir(parents=True, exist_ok=True)
    return write_reviews(ModelSource(str(writer), "fp32"), ordered, writing, folder, progress)


@pytest.fixture(scope="module")
def drawn(corpus: Artifact, writer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Sixteen reviews, drawn without a disturbance."""
    rows = written(corpus, writer, tmp_path_factory.mktemp("drawn"))
    assert len(rows) == len({row["text"] for row in rows}) == 16  # else equality would say little
    assert {row["truncated"] for row in rows} == {True, False}
    return rows


def test_greedy_reviews_are_those_of_transformers(corpus: Artifact, writer: Path, tmp_path: Path) -> None:
    first = written(corpus, writer, tmp_path / "vllm", temperature=0.0)
    expected = written(corpus, writer, tmp_path / "transformers", TransformersGeneration(), temperature=0.0)
    assert first == expected
    assert all(one["text"] == two["text"] for one, two in zip(expected[::2], expected[1::2], strict=True))


@pytest.mark.parametrize(("batch_size", "backwards"), [(1, False), (16, True)])
def test_draws_follow_from_the_row_not_from_its_place(
    corpus: Artifact, writer: Path, tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch,
    batch_size: int, backwards: bool,
) -> None:  # fmt: skip
    opened = model_reviews.open_vllm

    def crowded(*arguments: Any, **options: Any) -> Any:
        """Two prompts do not fit a step, so that many wait, or would be read in pieces."""
        return opened(*arguments, **options, max_num_batched_tokens=options["max_model_len"])

    monkeypatch.setattr(model_reviews, "open_vllm", crowded)
    again = written(corpus, writer, tmp_path, batch_size=batch_size, backwards=backwards)
    print(f"batches of {batch_size}: {sum(a == b for a, b in zip(again, drawn, strict=True))} of {len(drawn)} the same")
    assert again == drawn


def test_a_kill_costs_nothing_that_was_finished(
    corpus: Artifact, writer: Path, tmp_path: Path, drawn: list[Any]
) -> None:
    def killed(done: int, total: int | None, unit: str) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AttemptError, match="SIGKILL"):
        written(corpus, writer, tmp_path, progress=killed)
    journal = tmp_path / "written.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    kept = [*lines[:4], lines[4].replace(b'"text":"', b'"text":"KEPT ')]
    journal.write_bytes(b"".join(kept) + lines[0][:20])  # and a torn line, as a power cut leaves it
    again = written(corpus, writer, tmp_path)
    assert journal.read_bytes().startswith(b"".join(kept))
    ((found, expected),) = [pair for pair in zip(again, drawn, strict=True) if pair[0] != pair[1]]
    assert found["text"] == f"KEPT {expected['text']}"


def test_draws_are_from_the_models_distribution(
    corpus: Artifact, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token of 2,000 samples, against the softmax that transformers computes; on the way, what V2 takes."""
    opened = model_reviews.open_vllm

    def observed(*arguments: Any, **options: Any) -> Any:
        from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

        llm = opened(*arguments, **options)
        config = llm.llm_engine.vllm_config
        build_custom_logits_processors_params_validator(config.model_config.logits_processors)  # raises on V1's
        (tmp_path / "unsupported").write_text(json.dumps(config._get_v2_model_runner_unsupported_features()))
        return llm

    monkeypatch.setattr(model_reviews, "open_vllm", observed)
    count, sampling = 2000, Sampling(max_new_tokens=1, temperature=0.7, top_p=0.8, seed=3)
    key, paper = next(iter(read_held_out(corpus, None, 0).papers.items()))
    writing = Writing("clean", corpus.path, ImageLimits(), count, None, 64, sampling, VLLM)
    rows = write_reviews(ModelSource(str(writer), "fp32"), {key: paper}, writing, tmp_path)
    assert json.loads((tmp_path / "unsupported").read_text()) == []

    tokenizer, model = load_tokenizer(str(writer)), load_model(str(writer), precision="fp32")
    (request,) = encode_prompts(tokenizer, {key: review_messages(paper, "clean")}, 1)
    with torch.inference_mode():
        logits = model(torch.tensor([request.prompt_ids])).logits[0, -1].double()
    probabilities = keep_top_p((logits / sampling.temperature).softmax(-1)[None], sampling.top_p)[0]
    expected: Counter[str] = Counter()
    for token in probabilities.nonzero().flatten().tolist():
        ends = token in range(5, 600, 40)
        text = "" if ends else tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        expected[split_completion(text, COMMON_SCALE)[0]] += float(probabilities[token] / probabilities.sum())
    found = Counter(row["text"] for row in rows)
    print(f"{len(expected)} texts, the likeliest {max(expected.values()):.3f}")
    assert set(found) <= set(expected)
    assert len(expected) >= 5
    for text, share in expected.items():
        assert abs(found[text] / count - share) < 4 * (share * (1 - share) / count) ** 0.5 + 1 / count


def test_the_stage_scores_them_where_no_vllm_has_run(
    corpus: Artifact, writer: Path, tmp_path: Path, drawn: list[Any]
) -> None:
    output = tmp_path / "data" / "run" / "evaluate" / "base-clean"
    config = EvaluateConfig(
        model="base", model_name_or_path=str(writer), precision="fp32", temperature=1.0, top_p=0.9, seed=2,
        max_new_tokens=48, generation=VLLM,
    )  # fmt: skip
    before = "vllm.engine" in sys.modules
    metrics = run(config, make_task("evaluate", output, {"corpus": [corpus]}))
    assert ("vllm.engine" in sys.modules) == before
    assert metrics["num_reviews"] == 8
    assert json.loads((output / "metrics.json").read_text())["generated_with"] == "vllm"
    rows = list(read_jsonl(output / "generations.jsonl"))
    assert list(read_jsonl(output / "work" / WRITTEN)) == rows
    assert not {row["text"] for row in rows} & {row["text"] for row in drawn}  # another seed draws others


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
        written(corpus, writer, tmp_path)
