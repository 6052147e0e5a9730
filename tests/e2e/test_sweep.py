"""sweep: real trials in processes of their own, judged by a stage, resumed after a SIGKILL; independent judges only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from reward_artifacts import make_clip, make_reward, make_samples
from training_artifacts import make_datasets, make_task

from prefmill.core.artifact import Artifact
from prefmill.core.config import load, validate
from prefmill.core.errors import ConfigError
from prefmill.core.stage import load_stage, stage_names
from prefmill.distributed.isolation import end_with_parent
from prefmill.store.artifacts import read
from prefmill.store.jsonl import read_jsonl
from prefmill.sweep.study import read_claim
from stages.sweep import STAGE, SweepConfig
from tests.conftest import REPOSITORY
from tests.tiny import save_tiny_qwen2

REWARD: dict[str, Any] = {
    "precision": "fp32", "num_train_epochs": 2, "per_device_train_batch_size": 8, "effective_batch_size": 8,
    "logging_steps": 1, "save_steps": 1, "report_to": [], "num_resamples": 1000, "trainable": "heads",
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("given")
    return {"pairs": make_samples(folder / "pairs", num_prompts=12), "clip": make_clip(folder)}


def test_the_shipped_sweep_is_the_issues() -> None:
    config = load(SweepConfig, REPOSITORY / "configs" / "sweep" / "dora.yaml")
    assert config.n_trials == 20
    rate, rank = config.space["learning_rate"].model_dump(), config.space["lora.r"].model_dump()
    assert rank == {"choices": [4, 8, 16]}
    assert (rate["low"], rate["high"], rate["log"]) == (2e-5, 2e-4, True)
    assert config.judge is not None
    assert (config.stage, config.judge.stage, config.metric) == ("sdxl_dpo", "evaluate_images", "win_rate")


def test_every_training_stages_inputs_can_be_given() -> None:
    for name in stage_names():
        stage = load_stage(name)
        wanted = {**stage.reads, **load_stage("evaluate_images").reads} if stage.name == "sdxl_dpo" else stage.reads
        for key, reads in wanted.items() if stage.trains else ():
            assert key == "tuned" or STAGE.reads[key].kind == reads.kind, f"{name} reads {key}"


@pytest.mark.timing
@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_best_is_the_best(tmp_path: Path, given: dict[str, Artifact]) -> None:
    """Two trials of train_reward; the worker is killed with its child in the middle of the first."""
    keys = {
        "stage": "train_reward", "metric": "val_tie_aware_accuracy", "n_trials": 2, "set": REWARD,
        "space": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
    }  # fmt: skip
    config = tmp_path / "sweep.yaml"
    config.write_text(yaml.safe_dump(keys))
    inputs = [f"inputs.{name}={item.path}" for name, item in given.items()]
    command = [sys.executable, "-m", "stages.sweep", str(config), "run=r", f"workspace={tmp_path}", *inputs]
    first = subprocess.Popen(command, cwd=REPOSITORY, preexec_fn=end_with_parent)
    study = tmp_path / "checkpoints" / "r" / "sweep" / "study-study"
    steps = study / "trials" / "0000" / "logs" / "trial" / "train_reward" / "all" / "executed_steps.jsonl"
    while not (steps.is_file() and len(list(read_jsonl(steps))) >= 3):
        assert first.poll() is None
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    made = read(tmp_path / "checkpoints" / "r" / "sweep" / "all", "sweep")
    trials = list(read_jsonl(made.file("trials.jsonl")))
    assert [trial["state"] for trial in trials] == ["complete"] * 2
    values = []
    for number in range(2):
        folder = study / "trials" / f"{number:04}"
        trained = read(folder / "checkpoints" / "trial" / "train_reward" / "all", "reward_model")
        values.append(trained.manifest.metrics["val_tie_aware_accuracy"])
        claim = read_claim(folder)
        assert claim is not None
        # The worker that was killed had taken the first trial further, and does not count as an attempt any more.
        assert (len(claim.attempts), claim.reached > 0) == (1, number == 0)
    assert [trial["value"] for trial in trials] == values
    best = yaml.safe_load(made.file("best.yaml").read_text())
    assert best["learning_rate"] == trials[values.index(max(values))]["params"]["learning_rate"]
    assert validate(load_stage("train_reward").config, best)
    taken = [row["step"] for row in read_jsonl(steps)]
    assert taken.count(1) == 1, "the second attempt resumed"


def test_a_judge_that_is_the_reward_is_refused(tmp_path: Path, given: dict[str, Artifact]) -> None:
    reward = make_reward(tmp_path / "reward", given["pairs"], given["clip"])
    keys = {
        "stage": "sdxl_dpo", "metric": "win_rate", "space": {"learning_rate": {"low": 1e-5, "high": 1e-4, "log": True}},
        "judge": {"stage": "evaluate_images", "input": "tuned"},
    }  # fmt: skip
    task = make_task("sweep", tmp_path, pairs=given["pairs"], reward=reward, scorer=reward)
    with pytest.raises(ConfigError, match="the judge is the reward that trials are trained by"):
        STAGE.run(validate(SweepConfig, keys), task)


@pytest.mark.slow
def test_sft_is_swept_by_the_loss_of_held_out_chats(tmp_path: Path) -> None:
    fixed = {
        "model_name_or_path": str(save_tiny_qwen2(tmp_path / "model")), "precision": "fp32", "num_train_epochs": 2,
        "effective_batch_size": 8, "logging_steps": 1, "save_steps": 10, "report_to": [],
    }  # fmt: skip
    keys = {
        "stage": "sft", "metric": "val_loss", "direction": "minimize", "n_trials": 2, "set": fixed,
        "space": {"learning_rate": {"low": 1e-8, "high": 1e-3, "log": True}},
    }  # fmt: skip
    task = make_task("sweep", tmp_path, datasets=make_datasets(tmp_path / "datasets"))
    told = STAGE.run(validate(SweepConfig, keys), task)
    trials = list(read_jsonl(task.output / "trials.jsonl"))
    rates = [trial["params"]["learning_rate"] for trial in trials]
    assert told["best_value"] == min(trial["value"] for trial in trials)
    assert rates[told["best_trial"]] == max(rates), "the other has learnt next to nothing"
