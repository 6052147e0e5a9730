"""Two processes tune a masked-diffusion model as one does, and agree on how many draws the variance asks for."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.demo.toy_language import write_toy
from prefmill.families.mdlm.config import DiffusionPreferenceConfig
from prefmill.training.checkpoints import STEPS, read_curve
from tests.forked_ranks import run_ranks


def train(folder: Path, model: Path, rows: Path) -> None:
    from prefmill.families.mdlm.dpo import train_diffusion_dpo

    (folder / "out").mkdir(parents=True, exist_ok=True)
    task = Task("r", "mdlm_dpo", "all", {}, {}, {}, folder / "out", folder / "logs")
    keys = {
        "learning_rate": 2e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 4,
        "logging_steps": 1, "save_steps": 2, "max_length": 64, "report_to": [],
        "diffusion_steps": "auto", "max_diffusion_steps": 8, "beta": 1.0,
    }  # fmt: skip
    train_diffusion_dpo(validate(DiffusionPreferenceConfig, keys), task, str(model), rows, None)


@pytest.mark.slow
def test_two_ranks_tune_as_one_does(tmp_path: Path, tiny_folder: Path) -> None:
    importlib.import_module("prefmill.families.mdlm.dpo")  # once, before the forks
    write_toy(tmp_path, 2, 22, 5, seed=0)
    rows = tmp_path / "dpo_clean_train" / "data.jsonl"
    curves = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        run_ranks(world_size, train, folder, tiny_folder, rows)
        curves[world_size] = [row for row in read_curve(folder / "logs" / STEPS) if "loss" in row]
    one, two = curves[1], curves[2]
    assert [row["draws"] for row in one] == [row["draws"] for row in two]
    for key in ("loss", "draw_variance"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], abs=1e-5), key
