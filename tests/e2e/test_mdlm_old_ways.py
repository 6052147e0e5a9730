"""The ways in of an older guide: flags for keys, and folders that another trainer left its state in."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from mdlm_artifacts import SMALL, make_toy, run_stage
from training_artifacts import publish_as

from prefmill.cli.stage import as_keys
from prefmill.cli.stage import run_stage as command
from prefmill.demo.text import build_masked_diffusion
from prefmill.store.jsonl import write_jsonl
from prefmill.training.checkpoints import STEPS

pytestmark = pytest.mark.slow


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle was loaded')",))


def test_a_trainers_folder_is_a_start_and_its_pickles_are_never_read(tmp_path: Path) -> None:
    start = tmp_path / "start"
    build_masked_diffusion(start, ["how is the table it is clear and old"] * 3, seed=0)
    (start / "checkpoint-5").mkdir()
    for name in ("training_args.bin", "checkpoint-5/optimizer.pt", "checkpoint-5/scheduler.pt", "optimizer.pt"):
        (start / name).write_bytes(pickle.dumps(Bomb()))
    datasets = make_toy(tmp_path / "toy")
    keys = {**SMALL, "num_train_epochs": 1, "model_name_or_path": str(start)}
    run_stage("mdlm_sft", tmp_path / "sft", keys, datasets=datasets)
    own = publish_as(tmp_path / "sft" / "out", "checkpoint").path
    for name in ("training_args.bin", "optimizer.pt"):
        (own / name).write_bytes(pickle.dumps(Bomb()))
    again = publish_as(own, "checkpoint")
    assert not {entry.path for entry in again.manifest.files} & {"training_args.bin", "optimizer.pt"}
    run_stage("mdlm_dpo", tmp_path / "dpo", {**SMALL, "num_train_epochs": 1}, policy=again, datasets=datasets)


def test_an_older_guides_command_is_the_same_as_prefmills() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--force", action="store_true")
    old = ["--beta", "0.1", "--config", "config.yaml", "--resume_from_checkpoint", "checkpoint-5", "--bf16", "--force"]
    assert as_keys(old, parser) == [
        "config.yaml", "beta=0.1", "resume_from_checkpoint=checkpoint-5", "bf16=true", "--force"
    ]  # fmt: skip
    assert as_keys(["c.yaml", "beta=0.2", "--learning-rate=1e-5"], parser) == [
        "c.yaml",
        "beta=0.2",
        "learning_rate=1e-5",
    ]


def test_the_old_command_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    build_masked_diffusion(tmp_path / "start", ["how is the table it is clear and old"] * 3, seed=0)
    row = {"prompt": "how is it", "chosen": "it is clear", "rejected": "it is vague"}
    write_jsonl(tmp_path / "pairs.jsonl", [{**row, "prompt": f"how is it {n}"} for n in range(8)])
    lines = ["model_name_or_path: start", "preference_data_path: pairs.jsonl", "use_mixed_precision: false",
             "num_train_epochs: 2", "gradient_accumulation_steps: 4", "max_length: 64", "report_to: []",
             "diffusion_steps: 2", "logging_steps: 1"]  # fmt: skip
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert command("mdlm_dpo", ["--config", "config.yaml", "--beta", "0.3", "--workspace", str(tmp_path)]) == 0
    (manifest,) = (tmp_path / "checkpoints").rglob("manifest.json")
    assert json.loads(manifest.read_text())["config"]["beta"] == 0.3
    (curve,) = {path.resolve() for path in (tmp_path / "logs").rglob(STEPS)}
    epochs = [row["epoch"] for row in map(json.loads, curve.read_text().splitlines()) if "loss" in row]
    assert epochs == [0.5, 1.0, 1.5, 2.0]


def test_help_lists_old_names(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command("mdlm_dpo", ["--help"])
    said = capsys.readouterr().out
    for other in (
        "use_mixed_precision",
        "gradient_checkpointing",
        "preference_data_path",
        "gradient_accumulation_steps",
    ):
        assert other in said
