"""mdlm_evaluate: before and after in one report, benchmarks from files, the same bytes again, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from mdlm_artifacts import make_model, make_toy, metrics_of, run_stage
from training_artifacts import content

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.places import MANIFEST, RUN_RECORD
from prefmill.demo.toy_language import KIND_PATTERN
from prefmill.families.mdlm import evaluated_model
from prefmill.store.jsonl import read_jsonl, write_jsonl
from stages.mdlm_evaluate import MdlmEvaluateConfig

KEYS: dict[str, Any] = {
    "precision": "fp32", "diffusion_steps": 16, "num_tokens": 8, "block_tokens": 4, "num_steps": 4, "temperature": 1.0,
    "wanted_pattern": KIND_PATTERN, "batch_size": 4,
}  # fmt: skip


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, datasets: Artifact) -> tuple[Artifact, Artifact]:
    short, long = (tmp_path_factory.mktemp(name) for name in ("short", "long"))
    return make_model(short, datasets, num_train_epochs=1), make_model(long, datasets, num_train_epochs=24)


def questions(folder: Path) -> list[dict[str, Any]]:
    choices = ["it is clear and old", "old old it it and"]
    write_jsonl(folder / "choice.jsonl", [{"question": "how is the table", "choices": choices, "answer": "A"}] * 3)
    write_jsonl(folder / "exact.jsonl", [{"q": "how is the table", "answer": "nothing of the kind"}] * 2)
    return [
        {"name": "order", "kind": "multiple_choice", "file": str(folder / "choice.jsonl")},
        {"name": "words", "kind": "exact_match", "file": str(folder / "exact.jsonl"), "columns": {"question": "q"}},
    ]


def as_prompt_and_answers(row: dict[str, Any]) -> dict[str, Any]:
    (turn,) = row["conversations"]
    return {
        "id": row["id"],
        "prompt": turn["value"],
        "chosen": row["chosen"]["value"],
        "rejected": row["rejected"]["value"],
    }


def test_before_and_after(tmp_path: Path, models: tuple[Artifact, Artifact], datasets: Artifact) -> None:
    keys = {**KEYS, "benchmarks": questions(tmp_path)}
    for name in ("a", "b"):
        run_stage("mdlm_evaluate", tmp_path / name, keys, before=models[0], after=models[1], datasets=datasets)
    found = metrics_of(tmp_path / "a")
    before, after = found["models"]["before"], found["models"]["after"]
    assert after["chosen_nats_per_token"] > before["chosen_nats_per_token"] + 0.3
    assert after["chosen_chain_nats_per_token"] == pytest.approx(after["chosen_nats_per_token"], abs=0.5)
    assert (after["order_accuracy"], after["words_accuracy"]) == (1.0, 0.0)
    assert 0 <= found["implicit_accuracy"] <= 1
    report = content(tmp_path / "a")["report.md"].decode()
    assert "| measure | before | after |" in report
    assert content(tmp_path / "a") == content(tmp_path / "b")
    rows = list(read_jsonl(tmp_path / "a" / "out" / "rows.jsonl"))
    assert {row["kind"] for row in rows} == {"likelihood", "generation", "benchmark"}
    assert all(row["standard_error"] >= 0 for row in rows if row["kind"] == "likelihood")
    # A folder that no stage wrote takes the place of one of them, and a file in another form that of the pairs.
    plain = shutil.copytree(models[0].path, tmp_path / "plain", ignore=shutil.ignore_patterns(MANIFEST, RUN_RECORD))
    pairs = list(read_jsonl(datasets.file("dpo_clean_val/data.jsonl")))
    write_jsonl(tmp_path / "pairs.jsonl", map(as_prompt_and_answers, pairs))
    keys = {**KEYS, "model_name_or_path": str(plain), "pairs_path": str(tmp_path / "pairs.jsonl")}
    run_stage("mdlm_evaluate", tmp_path / "c", keys, after=models[1])
    found = metrics_of(tmp_path / "c")["models"]
    assert found["model"]["chosen_nats_per_token"] == before["chosen_nats_per_token"]
    assert found["after"]["chosen_nats_per_token"] == after["chosen_nats_per_token"]


def test_a_killed_evaluation_goes_on_and_writes_the_same(
    tmp_path: Path, models: tuple[Artifact, Artifact], datasets: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**KEYS, "benchmarks": questions(tmp_path), "num_pairs": 12}
    inputs = {"before": models[0], "after": models[1], "datasets": datasets}
    work = Work(monkeypatch)
    run_stage("mdlm_evaluate", tmp_path / "whole", keys, **inputs)
    needed, work.finished = work.finished, 0
    work.dies_at = needed // 2
    with pytest.raises(KilledError):
        run_stage("mdlm_evaluate", tmp_path / "killed", keys, **inputs)
    run_stage("mdlm_evaluate", tmp_path / "killed", keys, **inputs)
    assert work.finished == needed  # nothing that was kept is made again
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


class KilledError(Exception):
    """The process is gone."""


class Work:
    """Counts batches of answers and of likelihoods that came to their end; at number `dies_at` it dies, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.finished, self.dies_at = 0, -1
        for name in ("generate", "bounds"):
            monkeypatch.setattr(evaluated_model, name, self.counted(getattr(evaluated_model, name)))

    def counted(self, make: Callable[..., Iterable[Any]]) -> Callable[..., list[Any]]:
        def counted(*given: Any) -> list[Any]:
            if self.finished == self.dies_at:
                self.dies_at = -1
                raise KilledError
            made = list(make(*given))
            self.finished += 1
            return made

        return counted


def test_answers_to_one_prompt_are_drawn_anew_in_every_batch(
    tmp_path: Path, models: tuple[Artifact, Artifact], datasets: Artifact
) -> None:
    keys = {**KEYS, "samples_per_prompt": 8, "num_pairs": 1, "batch_size": 4, "exact_chain": False}
    run_stage("mdlm_evaluate", tmp_path, keys, before=models[0], datasets=datasets)
    rows = [row for row in read_jsonl(tmp_path / "out" / "rows.jsonl") if row["kind"] == "generation"]
    texts = [row["text"] for row in rows]
    assert len(texts) == 8
    assert texts[:4] != texts[4:]


def test_what_it_refuses(tmp_path: Path, models: tuple[Artifact, Artifact], datasets: Artifact) -> None:
    with pytest.raises(ConfigError, match="no model to evaluate"):
        run_stage("mdlm_evaluate", tmp_path, KEYS, datasets=datasets)
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        run_stage("mdlm_evaluate", tmp_path, KEYS, after=models[1])
    keys = {**KEYS, "pairs_path": str(datasets.file("dpo_clean_val/data.jsonl"))}
    with pytest.raises(ConfigError, match="two sets of pairs"):
        run_stage("mdlm_evaluate", tmp_path, keys, after=models[1], datasets=datasets)
    with pytest.raises(ConfigError, match="multiple of block_tokens"):
        validate(MdlmEvaluateConfig, {"num_tokens": 10, "block_tokens": 4})
    with pytest.raises(ConfigError, match="not a regular expression"):
        validate(MdlmEvaluateConfig, {"wanted_pattern": "("})
    write_jsonl(tmp_path / "bad.jsonl", [{"question": "x", "choices": ["a"], "answer": "C"}])
    keys = {**KEYS, "benchmarks": [{"name": "b", "kind": "multiple_choice", "file": str(tmp_path / "bad.jsonl")}]}
    with pytest.raises(InputError, match=r"bad\.jsonl:1"):
        run_stage("mdlm_evaluate", tmp_path / "c", keys, after=models[1])
