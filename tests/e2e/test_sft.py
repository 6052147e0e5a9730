"""sft: what it learns from, what it writes, resuming after SIGKILL, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training_artifacts import content, executed_steps, kill_after, make_checkpoint, make_datasets, make_task, sft_rows

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.families.causal.chat import encode
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from stages.sft import STAGE, SftConfig, run

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2, "num_train_epochs": 2, "precision": "fp32", "per_device_train_batch_size": 2,
    "effective_batch_size": 4, "max_length": 64, "logging_steps": 1, "save_steps": 3, "report_to": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_datasets(tmp_path_factory.mktemp("datasets"))


def sft(folder: Path, base: Artifact, datasets: Artifact, **keys: Any) -> dict[str, Any]:
    config = validate(SftConfig, {**SETTINGS, **keys})
    return run(config, make_task("sft", folder, model=base, datasets=datasets))


def own_losses(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The losses of each row's completion tokens by the model's own logits, row by row."""
    tokenizer, model, found = load_tokenizer(str(folder)), load_model(str(folder), precision="fp32"), []
    for row in rows:
        *messages, answer = row["messages"]
        prompt, completion = encode(tokenizer, messages, answer["content"])
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none"))
    return found


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, base: Artifact, datasets: Artifact) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    sft(folder, base, datasets)
    return folder


def test_defaults_are_those_of_the_field() -> None:
    config = SftConfig()
    assert (config.learning_rate, config.num_train_epochs, config.precision) == (1e-5, 3, "bf16")
    assert (config.per_device_train_batch_size, config.effective_batch_size) == (1, 16)
    assert config.lr_scheduler_type == "cosine"
    assert STAGE.writes == "checkpoint"


def test_the_loss_is_that_of_the_completions_alone(tmp_path: Path, base: Artifact, datasets: Artifact) -> None:
    """The first step over all rows, in microbatches of two: the mean over all completion tokens, no prompt's."""
    sft(tmp_path, base, datasets, effective_batch_size=24, num_train_epochs=1)
    tokens = torch.cat(own_losses(base.path, sft_rows(24)))
    assert losses(tmp_path)[0] == pytest.approx(tokens.mean().item(), abs=1e-5)


def test_the_validation_loss_is_the_mean_over_rows_in_any_batches(undisturbed: Path, datasets: Artifact) -> None:
    """The Trainer's mean over batches hung on which rows stood in one, and with that on the batch size and ranks."""
    rows = list(read_jsonl(datasets.file("sft_clean_val/data.jsonl")))
    means = torch.stack([row.mean() for row in own_losses(undisturbed / "out", rows)])
    evaluated = [row["eval_loss"] for row in read_curve(undisturbed / "logs" / STEPS) if "eval_loss" in row]
    assert len({len(row) for row in own_losses(undisturbed / "out", rows)}) > 1
    assert evaluated[-1] == pytest.approx(means.mean().item(), abs=1e-5)


def test_it_learns_and_validates_every_epoch(undisturbed: Path) -> None:
    assert losses(undisturbed)[-1] < 0.7 * losses(undisturbed)[0]
    evaluated = [row["step"] for row in read_curve(undisturbed / "logs" / STEPS) if "eval_loss" in row]
    assert evaluated == [6, 12]


def test_the_finished_folder_is_plain_and_names_its_origin(
    undisturbed: Path, base: Artifact, datasets: Artifact
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(undisturbed / "out")
    assert AutoTokenizer.from_pretrained(undisturbed / "out").chat_template
    files = content(undisturbed)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    card = files["README.md"].decode()
    assert datasets.manifest.content_digest in card
    assert base.manifest.content_digest in card
    assert not re.search(r"20\d\d-\d\d|/tmp|/home", card)
    assert all(str(undisturbed.parent).encode() not in data for data in files.values())


@pytest.mark.timing
@pytest.mark.slow
def test_killed_and_rerun_it_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, base: Artifact, datasets: Artifact
) -> None:
    kill_after(8, tmp_path, lambda: sft(tmp_path, base, datasets))
    before = executed_steps(tmp_path)
    assert 8 <= len(before) < 12
    sft(tmp_path, base, datasets)
    assert content(tmp_path) == content(undisturbed)
    assert losses(tmp_path) == losses(undisturbed)
    steps = executed_steps(tmp_path)
    assert sorted(set(steps)) == list(range(1, 13))
    assert len(steps) - len(set(steps)) <= SETTINGS["save_steps"]


@pytest.mark.timing
@pytest.mark.slow
def test_a_checkpoint_torn_by_the_kill_is_passed_over(
    tmp_path: Path, undisturbed: Path, base: Artifact, datasets: Artifact
) -> None:
    kill_after(8, tmp_path, lambda: sft(tmp_path, base, datasets))
    newest = tmp_path / "out" / "checkpoint-6"
    with (newest / "optimizer.pt").open("r+b") as stream:
        stream.truncate(100)
    sft(tmp_path, base, datasets)
    assert content(tmp_path) == content(undisturbed)
    assert executed_steps(tmp_path).count(4) == 2, "it went on from step 3"


def test_overlong_rows_are_refused_or_left_out_and_named(tmp_path: Path, base: Artifact) -> None:
    long = sft_rows(1, start=50)
    long[0]["messages"][1]["content"] = " ".join(["paper"] * 200)
    datasets = make_datasets(
        tmp_path / "data", sft_clean_train=[*sft_rows(8), *long], sft_clean_val=[*sft_rows(2), *long]
    )
    with pytest.raises(ConfigError, match=r"1 of 9 rows are longer than max_length(.|\n)*nothing is ever truncated"):
        sft(tmp_path / "a", base, datasets)
    sft(tmp_path / "b", base, datasets, on_overlong="drop")
    reported = json.loads((tmp_path / "b" / "logs" / "overlong_rows.json").read_text())
    assert [(row["file"], row["id"]) for row in reported] == [("sft_clean_train", "r50"), ("sft_clean_val", "r50")]
    assert reported[0]["num_tokens"] > 64


def test_nothing_is_trained_where_all_rows_are_overlong(tmp_path: Path, base: Artifact, datasets: Artifact) -> None:
    with pytest.raises(ConfigError, match="24 of 24 rows"):
        sft(tmp_path, base, datasets, max_length=4, on_overlong="drop")


def test_what_it_refuses(tmp_path: Path, base: Artifact, datasets: Artifact) -> None:
    with pytest.raises(ConfigError, match="set effective_batch_size to 4"):
        sft(tmp_path, base, datasets, effective_batch_size=5)
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        validate(SftConfig, {"learnin_rate": 1e-5})
    with pytest.raises(PipelineError, match="two models to start from"):
        sft(tmp_path, base, datasets, model_name_or_path=str(base.path))
    with pytest.raises(PipelineError, match="no model to start from"):
        run(validate(SftConfig, SETTINGS), make_task("sft", tmp_path, datasets=datasets))
