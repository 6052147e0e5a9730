"""Preference training of a tiny model, on the GPU where there is one; also as one of torchrun's ranks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prefmill.core.config import validate
from prefmill.core.files import digest_path
from prefmill.core.stage import Task
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.preference_config import PreferenceConfig

SMALL: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "per_device_train_batch_size": 2,
    "effective_batch_size": 4, "logging_steps": 1, "save_steps": 100, "max_length": 64, "report_to": [],
}  # fmt: skip


def task_in(folder: Path) -> Task:
    """A task whose output and logs lie in `folder`."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return Task("r", "dpo", "all", {}, {}, {}, folder / "out", folder / "logs")


def train(folder: Path, model: Path, pairs: Path, **keys: Any) -> None:
    """Train `model` on `pairs`; what is made lies in `folder`."""
    from prefmill.families.causal.dpo import train_dpo

    train_dpo(validate(PreferenceConfig, {**SMALL, **keys}), task_in(folder), str(model), pairs, None)


def train_with(folder: Path, model: Path, pairs: Path, keys: dict[str, Any]) -> None:
    """`train` for processes of their own, whose arguments have no names."""
    train(folder, model, pairs, **keys)


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


def weights(folder: Path) -> str:
    """The digest of the finished weights."""
    return digest_path(folder / "out" / "model.safetensors")


if __name__ == "__main__":
    from prefmill.distributed.devices import claim_device

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=3, type=Path, help="the arguments of `train`")
    parser.add_argument("settings", type=json.loads, help="more of them, as JSON")
    arguments = parser.parse_args()
    claim_device()
    train(*arguments.folders, **arguments.settings)
