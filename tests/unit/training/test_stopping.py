"""A training asked to stop saves, stops, and goes on to the same end; ranks agree on the step."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from test_training import curve, make_task, train, weights

from prefmill.core.errors import InputError
from prefmill.core.graceful_stop import STOP, Stopped, StopWatch, clear_request, request_stop
from prefmill.core.places import STARTED
from prefmill.pipeline.attempts import EXECUTED
from prefmill.store.jsonl import read_jsonl
from tests.forked_ranks import run_ranks

pytestmark = pytest.mark.usefixtures("_import_once")


@pytest.fixture(scope="module")
def _import_once() -> None:
    import prefmill.training.callbacks  # noqa: F401


def steps(folder: Path) -> list[int]:
    """The optimizer steps taken, in order."""
    return [row["step"] for row in read_jsonl(folder / "logs" / EXECUTED)]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a request in the logs as soon as `step` has been taken."""
    from prefmill.training.callbacks import StageCallback

    original = StageCallback.on_step_end

    def asks(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            request_stop(self.task.logs, 100.0)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StageCallback, "on_step_end", asks)


@pytest.mark.slow
def test_it_saves_stops_and_ends_as_if_undisturbed(
    tmp_path: Path, tiny_qwen2: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "calm", tiny_qwen2, pairs_file, pairs_file, save_steps=100)
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        with pytest.raises(Stopped, match="step 3 of 8"):
            train(tmp_path / "asked", tiny_qwen2, pairs_file, pairs_file, save_steps=100)
    out = tmp_path / "asked" / "out"
    assert not (out / "model.safetensors").exists()  # half-trained weights are no finished model
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    clear_request(make_task(tmp_path / "asked").logs)
    train(tmp_path / "asked", tiny_qwen2, pairs_file, pairs_file, save_steps=100)
    assert steps(tmp_path / "asked") == list(range(1, 9))  # none repeated
    assert weights(tmp_path / "asked") == weights(tmp_path / "calm")
    assert curve(tmp_path / "asked") == curve(tmp_path / "calm")


def test_asked_at_the_last_step_it_finishes(
    tmp_path: Path, tiny_qwen2: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(8, monkeypatch)
    assert train(tmp_path, tiny_qwen2, pairs_file)["steps"] == 8


def test_a_model_downloaded_by_the_attempt_that_was_stopped_is_noted(
    tmp_path: Path, tiny_qwen2: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its branch may move before the next one, whose loading then has the new weights: checkpoints are of the old."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    record = make_task(tmp_path).work / STARTED
    record.write_text(json.dumps({"fingerprint": "f"}))  # as the worker leaves it: nothing is downloaded yet
    keys = {"model_name_or_path": "org/model", "save_steps": 100}
    link = tmp_path / "hub" / "models--org--model" / "snapshots" / "main" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to("first")
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        with pytest.raises(Stopped):
            train(tmp_path, tiny_qwen2, pairs_file, **keys)
    assert json.loads(record.read_text()) == {"fingerprint": "f", "models": {"org/model/model.safetensors": "first"}}
    clear_request(make_task(tmp_path).logs)
    link.unlink()
    link.symlink_to("second")
    with pytest.raises(InputError, match=r"changed since this training began(.|\n)*org/model/model.safetensors"):
        train(tmp_path, tiny_qwen2, pairs_file, **keys)
    link.unlink()
    link.symlink_to("first")
    assert train(tmp_path, tiny_qwen2, pairs_file, **keys)["steps"] == 8
    assert steps(tmp_path) == list(range(1, 9))


def test_supervised_training_stops_too_and_does_not_evaluate_a_broken_epoch(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_training import SMALL

    from prefmill.core.config import validate
    from prefmill.families.causal.sft import train_sft
    from prefmill.store.jsonl import write_jsonl
    from prefmill.training.checkpoints import STEPS
    from prefmill.training.config import TrainingConfig
    from tests.tiny import sentence

    rows = [
        {
            "id": str(n),
            "messages": [{"role": "user", "content": sentence(n, 6)}, {"role": "assistant", "content": "yes"}],
        }
        for n in range(16)
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    stop_at(2, monkeypatch)
    task = make_task(tmp_path)
    with pytest.raises(Stopped):
        train_sft(
            validate(TrainingConfig, SMALL), task, str(tiny_qwen2), tmp_path / "data.jsonl", tmp_path / "data.jsonl"
        )
    assert steps(tmp_path) == [1, 2]
    assert [row for row in read_jsonl(task.logs / STEPS) if "eval_loss" in row] == []


@pytest.mark.timing
def test_a_watch_waits_for_a_logged_step_while_there_is_time(tmp_path: Path) -> None:
    watch = StopWatch(tmp_path)
    assert not watch.due(7, 5)
    request_stop(tmp_path, 60.0)
    assert not watch.due(8, 5)
    assert watch.due(10, 5)
    assert watch.due(11, 1)
    now = time.time()
    (tmp_path / STOP).write_text(json.dumps({"asked": now - 100, "deadline": now + 20}))  # a third is for saving
    assert watch.due(12, 5)
    clear_request(tmp_path)
    assert not watch.due(15, 5)


def until_stopped(*given: Any) -> None:
    """A rank that ends well only if it was stopped."""
    from test_ranks import train

    if os.environ["RANK"] == "0":
        stop_at(1, pytest.MonkeyPatch())
    with pytest.raises(Stopped, match="step 1 of"):
        train(*given)


@pytest.mark.slow
def test_all_ranks_stop_at_the_step_that_rank_zero_names(tmp_path: Path, tiny_qwen2: Path, pairs_file: Path) -> None:
    from prefmill.training.checkpoints import newest_checkpoint

    run_ranks(2, until_stopped, tmp_path, tiny_qwen2, pairs_file, "pairwise")
    assert steps(tmp_path) == [1]
    assert newest_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")
