"""The folder that a training publishes: the weights that were trained, finite, and loaded again as anyone would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_artifacts import make_checkpoint, make_datasets, make_task

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import PipelineError
from stages import dpo, sft

SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-3, "num_train_epochs": 1, "precision": "fp32", "per_device_train_batch_size": 1,
    "effective_batch_size": 4, "max_length": 64, "logging_steps": 100, "save_steps": 100, "report_to": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_datasets(tmp_path_factory.mktemp("datasets"))


def train_dpo(folder: Path, start: Artifact, datasets: Artifact, **keys: Any) -> dict[str, Any]:
    config = validate(dpo.DpoConfig, {**SETTINGS, **keys})
    return dpo.run(config, make_task("dpo", folder, policy=start, datasets=datasets))


def train_sft(folder: Path, start: Artifact, datasets: Artifact, **keys: Any) -> dict[str, Any]:
    config = validate(sft.SftConfig, {**SETTINGS, **keys})
    return sft.run(config, make_task("sft", folder, model=start, datasets=datasets))


@pytest.mark.parametrize("train", [train_dpo, train_sft])
def test_a_training_that_is_lost_between_two_log_lines_publishes_nothing(
    train: Any, tmp_path: Path, start: Artifact, datasets: Artifact
) -> None:
    """At this learning rate the second step has no loss; logged are the first step and none of the others."""
    with pytest.raises(PipelineError, match="is no longer a number") as failure:
        train(tmp_path, start, datasets, learning_rate=1e30, max_grad_norm=1e9)
    assert "step 2" in str(failure.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))
