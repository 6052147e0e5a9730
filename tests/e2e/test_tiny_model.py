"""tiny_model: learns from the train split alone, is a plain model folder, resumes, and refuses what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from review_artifacts import make_corpus, make_rows
from training_artifacts import content, executed_steps, kill_after, make_task

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.training.checkpoints import STEPS, read_curve
from stages.tiny_model import TinyModelConfig, run

SETTINGS: dict[str, Any] = {
    "shape": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}, "vocab_size": 512,
    "max_length": 1024, "num_train_epochs": 1, "learning_rate": 2e-2,
    "per_device_train_batch_size": 4, "effective_batch_size": 4, "logging_steps": 1, "save_steps": 5, "report_to": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_corpus(tmp_path_factory.mktemp("corpus"), *make_rows(30))


def train(folder: Path, corpus: Artifact, **keys: Any) -> dict[str, Any]:
    return run(validate(TinyModelConfig, {**SETTINGS, **keys}), make_task("tiny_model", folder, corpus=corpus))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Artifact) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder, corpus)


def test_it_learns_and_is_a_plain_folder(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = trained
    losses = [row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    model, tokenizer = load_model(str(folder / "out"), precision="fp32"), load_tokenizer(str(folder / "out"))
    assert model.num_parameters() == metrics["parameters"]
    assert model.config.vocab_size == len(tokenizer) == metrics["vocab_size"] <= 512


def test_only_the_train_split_counts(trained: tuple[Path, dict[str, Any]], corpus: Artifact, tmp_path: Path) -> None:
    papers, reviews = make_rows(30)
    train_ids = {paper["paper_id"] for paper in papers if paper["split"] == "train"}
    assert trained[1]["train_rows"] == sum(review["paper_id"] in train_ids for review in reviews)
    changed = [review if review["paper_id"] in train_ids else {**review, "text": "zebra " * 50} for review in reviews]
    train(tmp_path / "t", make_corpus(tmp_path / "corpus", papers, changed))
    weights = "model.safetensors"
    assert content(tmp_path / "t")[weights] == content(trained[0])[weights]


@pytest.mark.timing
@pytest.mark.slow
def test_killed_and_rerun_it_ends_with_the_same_bytes(
    trained: tuple[Path, dict[str, Any]], corpus: Artifact, tmp_path: Path
) -> None:
    kill_after(7, tmp_path, lambda: train(tmp_path, corpus))
    train(tmp_path, corpus)
    assert content(tmp_path) == content(trained[0])
    steps = executed_steps(tmp_path)
    total = trained[1]["steps"]
    assert sorted(set(steps)) == list(range(1, total + 1))
    assert len(steps) - total <= SETTINGS["save_steps"]


def test_without_the_prompt_the_loss_is_the_reviews_alone(corpus: Artifact, tmp_path: Path) -> None:
    """With a learning rate of almost nothing the first loss is that of fresh weights on the answers' tokens."""
    train(tmp_path, corpus, train_on_prompt=False, learning_rate=1e-12, effective_batch_size=4)
    first = next(row["loss"] for row in read_curve(tmp_path / "logs" / STEPS) if "loss" in row)
    vocabulary = len(load_tokenizer(str(tmp_path / "out")))
    assert first == pytest.approx(float(torch.log(torch.tensor(vocabulary))), rel=0.05)


def test_what_it_refuses(corpus: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="builds its own model"):
        validate(TinyModelConfig, {**SETTINGS, "model_name_or_path": "somewhere"})
    with pytest.raises(ConfigError, match="longer than max_length"):
        train(tmp_path / "a", corpus, max_length=16)
    papers, reviews = make_rows(10)
    nobody = make_corpus(tmp_path / "none", [{**paper, "split": "test"} for paper in papers], reviews)
    with pytest.raises(InputError, match="no reviews to train on"):
        train(tmp_path / "b", nobody)
