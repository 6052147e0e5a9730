"""The masked-diffusion demo's stages run by hand in one process, and small artifacts for their tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reward_artifacts import run_stage
from training_artifacts import publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.config import read_yaml
from tests.conftest import REPOSITORY

TOY: dict[str, Any] = {"num_sft": 64, "num_pairs": 48, "num_prompts_held_out": 6}
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "precision": "fp32", "max_length": 64, "num_train_epochs": 2, "per_device_train_batch_size": 4,
    "effective_batch_size": 8, "logging_steps": 1, "save_steps": 3, "report_to": [], "forward_batch_size": 32,
}  # fmt: skip


def demo(stage: str, **keys: Any) -> dict[str, Any]:
    """The values of the stage's demo configuration with `keys` laid over them."""
    return {**read_yaml(REPOSITORY / "configs" / stage / "demo.yaml"), **keys}


def make_toy(folder: Path, **keys: Any) -> Artifact:
    """The toy's datasets as an artifact."""
    run_stage("toy_preferences", folder, {**TOY, **keys})
    return publish_as(folder / "out", "preference_datasets")


def make_model(folder: Path, datasets: Artifact, **keys: Any) -> Artifact:
    """A small model, briefly fine-tuned on the toy, as a checkpoint."""
    run_stage("mdlm_sft", folder, {**SMALL, "new_model": SHAPE, "learning_rate": 3e-3, **keys}, datasets=datasets)
    return publish_as(folder / "out", "checkpoint")


def metrics_of(folder: Path) -> dict[str, Any]:
    """What mdlm_evaluate wrote."""
    found: dict[str, Any] = json.loads((folder / "out" / "metrics.json").read_text())
    return found
