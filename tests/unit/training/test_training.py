"""Preference training end to end on a tiny model: step 0, accumulation, resuming, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, PipelineError
from prefmill.core.files import digest_path
from prefmill.core.stage import Task
from prefmill.pipeline.attempts import EXECUTED
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import COMPLETE, STEPS, newest_checkpoint, read_curve, require_its_ranks
from prefmill.training.config import TrainingConfig
from prefmill.training.preference_config import PreferenceConfig
from tests.tiny import pair_rows, save_tiny_qwen2

SMALL: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "precision": "fp32",
    "per_device_train_batch_size": 4,
    "effective_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 2,
    "max_length": 64,
    "report_to": [],
}


def make_task(folder: Path) -> Task:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return Task("r", "dpo", "clean", {}, {}, {}, folder / "out", folder / "logs")


def train(folder: Path, model: Path, pairs: Path, val: Path | None = None, **keys: Any) -> dict[str, Any]:
    from prefmill.families.causal.dpo import train_dpo

    config = PreferenceConfig(**{**SMALL, **keys})
    return train_dpo(config, make_task(folder), str(model), pairs, val)


def weights(folder: Path) -> str:
    return digest_path(folder / "out" / "model.safetensors")


def curve(folder: Path) -> list[float]:
    return [row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path, pairs_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, tiny_qwen2, pairs_file, pairs_file)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_zero_is_ln_2(precision: str, tmp_path: Path, tiny_qwen2: Path, pairs_file: Path) -> None:
    train(tmp_path, tiny_qwen2, pairs_file, precision=precision, num_train_epochs=1)
    tolerance = 1e-6 if precision == "fp32" else 2e-2
    assert curve(tmp_path)[0] == pytest.approx(math.log(2), abs=tolerance)


def test_training_prefers_what_it_was_shown(undisturbed: Path) -> None:
    rows = read_curve(undisturbed / "logs" / STEPS)
    losses = [row["loss"] for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_accuracy" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert len(evaluations) == 2
    assert evaluations[-1]["eval_accuracy"] == 1.0


def test_the_finished_folder_is_plain(undisturbed: Path, tiny_qwen2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {path.name for path in (undisturbed / "out").iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "out")
    AutoTokenizer.from_pretrained(undisturbed / "out")
    start = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    assert any(not torch.equal(left, right) for left, right in zip(model.parameters(), start.parameters(), strict=True))
    assert str(tiny_qwen2) not in (undisturbed / "out" / "config.json").read_text()


@pytest.mark.slow
def test_8x1_equals_1x8(tmp_path: Path, tiny_qwen2: Path, pairs_file: Path) -> None:
    for name, at_once in (("a", 8), ("b", 1)):
        train(tmp_path / name, tiny_qwen2, pairs_file, per_device_train_batch_size=at_once, effective_batch_size=8)
    assert curve(tmp_path / "a") == pytest.approx(curve(tmp_path / "b"), abs=2e-5)
    assert len(curve(tmp_path / "a")) == 4


def test_resume_is_bit_exact_from_the_middle_of_an_epoch(
    tmp_path: Path, tiny_qwen2: Path, pairs_file: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefmill.training.callbacks import StageCallback

    original = StageCallback.on_step_end

    def dies(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(StageCallback, "on_step_end", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tiny_qwen2, pairs_file, pairs_file)
    monkeypatch.setattr(StageCallback, "on_step_end", original)
    torch.manual_seed(12345)  # the state must come from the checkpoint, not from this process
    train(tmp_path, tiny_qwen2, pairs_file, pairs_file)
    assert weights(tmp_path) == weights(undisturbed)
    assert curve(tmp_path) == curve(undisturbed)
    executed = [row["step"] for row in read_jsonl(tmp_path / "logs" / EXECUTED)]
    assert executed == [1, 2, 3, 4, 5, 6, 7, 7, 8]


def test_a_torn_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    from prefmill.training.checkpoints import mark_complete

    for step, size in ((2, 5), (4, 5), (6, 5)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * size)
        if step != 6:
            mark_complete(folder)
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"xx")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    (tmp_path / "checkpoint-2" / COMPLETE).write_text("{")
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("keys", "wrote", "now", "goes_on"),
    [
        ({}, 1, 2, True), ({"deepspeed": 0}, 1, 2, True), ({"deepspeed": 2}, 2, 2, True),
        ({"deepspeed": 2}, 1, 2, False), ({"deepspeed": 3}, 4, 2, False), ({"fsdp": True}, 2, 3, True),
        ({"fsdp": True}, 1, 2, False), ({"fsdp": True}, 2, 1, False), ({"fsdp": True}, 0, 2, True),
    ],
)  # fmt: skip
def test_parts_of_other_ranks_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], wrote: int, now: int, goes_on: bool
) -> None:
    if "deepspeed" in keys:
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": keys["deepspeed"]}}))
        keys = {"deepspeed": str(tmp_path / "zero.json")}
    names = ["rng_state.pth"] if wrote == 1 else [f"rng_state_{rank}.pth" for rank in range(wrote)]
    (tmp_path / "checkpoint-1").mkdir()
    for name in names:
        (tmp_path / "checkpoint-1" / name).touch()
    if names:  # without any it is torn
        (tmp_path / "checkpoint-1" / COMPLETE).write_text(json.dumps(dict.fromkeys(names, 0)))
    monkeypatch.setenv("WORLD_SIZE", str(now))
    config = validate(TrainingConfig, {"learning_rate": 1, "num_train_epochs": 1, **keys})
    with nullcontext() if goes_on else pytest.raises(PipelineError, match=f"processes: {wrote}"):
        require_its_ranks(tmp_path, config)
    assert (tmp_path / "checkpoint-1").exists()


def test_every_pair_of_every_step_is_recorded(undisturbed: Path) -> None:
    import numpy as np

    rows = list(read_jsonl(undisturbed / "logs" / "margins" / "margins_log.jsonl"))
    assert len(rows) == 2 * 16
    assert {row["pair_id"] for row in rows if row["epoch"] == 1} == {row["id"] for row in pair_rows(8)}
    first = [row for row in rows if row["step"] == 1]
    assert [row["margin"] for row in first] == pytest.approx([0.0] * 4, abs=1e-5)
    assert [row["gradient_coefficient"] for row in first] == pytest.approx([0.05] * 4, abs=1e-6)
    stored = np.load(undisturbed / "logs" / "margins" / "epoch_001" / "step_00008.npy")
    assert stored.tolist() == pytest.approx([row["margin"] for row in rows if row["step"] == 8])


def test_shuffled_labels_are_a_fair_coin_and_stay_the_same(pairs_file: Path) -> None:
    from prefmill.training.data import read_pairs, swap_by_coin

    pairs = list(read_pairs(pairs_file)) * 30
    renamed = [
        pair.__class__(f"{n}", pair.group, pair.messages, pair.chosen, pair.rejected) for n, pair in enumerate(pairs)
    ]
    swapped = list(swap_by_coin(renamed, seed=3))
    share = sum(left.chosen != right.chosen for left, right in zip(renamed, swapped, strict=True)) / len(renamed)
    assert 0.4 < share < 0.6
    assert swapped == list(swap_by_coin(renamed, seed=3))


def test_overlong_pairs_are_refused_or_reported(tmp_path: Path, tiny_qwen2: Path, pairs_file: Path) -> None:
    with pytest.raises(ConfigError, match="longer than max_length"):
        train(tmp_path / "a", tiny_qwen2, pairs_file, max_length=2)
    lengths = [row["num_tokens"] for row in json.loads((tmp_path / "a" / "logs" / "overlong_rows.json").read_text())]
    limit = max(lengths) - 1
    train(tmp_path / "b", tiny_qwen2, pairs_file, max_length=limit, on_overlong="drop", num_train_epochs=1)
    dropped = json.loads((tmp_path / "b" / "logs" / "overlong_rows.json").read_text())
    assert {row["num_tokens"] for row in dropped} == {limit + 1}
    trained = {row["pair_id"] for row in read_jsonl(tmp_path / "b" / "logs" / "margins" / "margins_log.jsonl")}
    assert trained
    assert trained | {row["id"] for row in dropped} == {row["id"] for row in pair_rows(8)}


def test_accumulation_must_divide(tmp_path: Path, tiny_qwen2: Path, pairs_file: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        train(tmp_path, tiny_qwen2, pairs_file, per_device_train_batch_size=3)


@pytest.mark.slow
def test_a_cache_of_another_reference_is_computed_again(
    tmp_path: Path, tiny_qwen2: Path, pairs_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from prefmill.store.kept_tensors import KeptTensors

    train(tmp_path / "a", tiny_qwen2, pairs_file, num_train_epochs=1)
    (folder,) = (tmp_path / "a" / "out").glob("work/cache/reference/*")
    kept = KeptTensors(folder)
    kept.keep({key: scores + 1 for key, scores in kept.read().items()})
    shutil.rmtree(tmp_path / "a" / "logs")
    shutil.copytree(folder, tmp_path / "b" / folder.relative_to(tmp_path / "a"))
    train(tmp_path / "b", tiny_qwen2, pairs_file, num_train_epochs=1)
    assert "computed again" in caplog.text
    assert curve(tmp_path / "b")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_runs_of_a_workspace_share_reference_scores(
    tmp_path: Path, tiny_qwen2: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another beta computes one group anew, to check; other weights at the same path compute all again."""
    from prefmill.families.causal import dpo

    scored: list[int] = []
    compute = dpo.score_batch

    def counted(model: Any, batch: Any) -> Any:
        if not torch.is_grad_enabled() and not model.training:
            scored.append(1)
        return compute(model, batch)

    def scores(run: str, **keys: Any) -> int:
        scored.clear()
        folder = tmp_path / "checkpoints" / run / "dpo" / "all"
        folder.mkdir(parents=True)
        task = Task(run, "dpo", "all", {}, {}, {}, folder, tmp_path / "logs" / run)
        given = {**SMALL, "num_train_epochs": 1, "model_name_or_path": str(tmp_path / "model"), **keys}
        dpo.train_dpo(PreferenceConfig(**given), task, str(tmp_path / "model"), pairs_file, None)
        return len(scored) - 4 * 8  # publishing scores eight pairs four times

    monkeypatch.setattr(dpo, "score_batch", counted)
    shutil.copytree(tiny_qwen2, tmp_path / "model")
    everything = scores("first")
    assert everything == 8  # groups, of two responses' rows a batch
    assert scores("second", beta=0.7) == 1
    assert scores("third", layout="pairwise") == 8
    shutil.rmtree(tmp_path / "model")
    save_tiny_qwen2(tmp_path / "model", seed=1)
    assert scores("fourth") == everything


def test_equal_sides_are_refused(tmp_path: Path, tiny_qwen2: Path) -> None:
    rows = pair_rows(2)
    rows[1]["rejected"] = rows[1]["chosen"]
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(Exception, match="are the same"):
        train(tmp_path, tiny_qwen2, tmp_path / "data.jsonl")


def test_lora_trains_the_adapter_and_saves_merged_weights(tmp_path: Path, tiny_qwen2: Path, pairs_file: Path) -> None:
    train(tmp_path, tiny_qwen2, pairs_file, lora={"r": 4, "alpha": 16}, num_train_epochs=1, learning_rate=1e-2)
    assert curve(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert curve(tmp_path)[-1] < curve(tmp_path)[0]
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "model.safetensors").is_file()
