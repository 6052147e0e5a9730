"""Sample pairs, a tiny CLIP and the stages of the reward model run by hand, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training_artifacts import make_task, publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.stage import load_stage
from prefmill.demo.tiny_models import build

SMALL: dict[str, Any] = {
    "precision": "fp32", "learning_rate": 3e-3, "num_train_epochs": 2, "per_device_train_batch_size": 8,
    "effective_batch_size": 16, "warmup_steps": 0.1, "logging_steps": 1, "save_steps": 2, "report_to": [],
    "num_resamples": 1000,
}  # fmt: skip


def run_stage(name: str, folder: Path, values: dict[str, Any], **inputs: Artifact) -> dict[str, Any]:
    """Run a stage with the configuration `values`; its output and logs are below `folder`."""
    stage = load_stage(name)
    told = dict(stage.run(validate(stage.config, values), make_task(name, folder, **inputs)))
    # Ranks but the first tell nothing.
    assert not told or {*(stage.metrics or ())} <= told.keys(), "a sweep refuses metrics that a stage does not name"
    return told


def make_clip(folder: Path) -> Artifact:
    """A tiny CLIP with random weights as a checkpoint."""
    return publish_as(build("clip", folder / "clip"), "checkpoint")


def make_samples(folder: Path, **keys: Any) -> Artifact:
    """Sample pairs as an image_pairs artifact."""
    run_stage("toy_image_pairs", folder, {"num_prompts": 20, "pairs_per_prompt": 2, **keys})
    return publish_as(folder / "out", "image_pairs")


def make_reward(folder: Path, pairs: Artifact, clip: Artifact, **keys: Any) -> Artifact:
    """A reward model that has learnt a little."""
    run_stage("train_reward", folder, {**SMALL, "num_train_epochs": 1, **keys}, pairs=pairs, clip=clip)
    return publish_as(folder / "out", "reward_model")
