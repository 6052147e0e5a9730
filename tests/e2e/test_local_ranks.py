"""`prefmill run` and torchrun with two ranks on this machine: one process's losses; tasks side by side; loaders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_runs import environment, run

from prefmill.store.artifacts import read
from prefmill.store.jsonl import read_jsonl, write_jsonl
from tests.conftest import REPOSITORY
from tests.tiny import pair_rows, save_tiny_qwen2

pytestmark = pytest.mark.slow
TRAININGS = ("sft", "dpo", "mdlm_dpo", "sdxl_dpo")
COMMON = {
    "precision": "fp32", "num_train_epochs": 1, "per_device_train_batch_size": 2, "effective_batch_size": 4,
    "logging_steps": 1, "save_steps": 50, "report_to": [],
}  # fmt: skip
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 128,
}  # fmt: skip


def pipeline(folder: Path) -> Path:
    """Every family's training on toys: the toys and the start of mdlm_dpo are made by one process each."""
    model = str(save_tiny_qwen2(folder / "model"))
    pairs = pair_rows(8)
    write_jsonl(folder / "pairs.jsonl", [{**row, "group": None} for row in pairs])
    chats = [
        {"prompt": row["conversations"][0]["value"], "completion": row["chosen"]["value"]}  # type: ignore[index]
        for row in pairs
    ]
    write_jsonl(folder / "chats.jsonl", chats)
    text = {**COMMON, "max_length": 128, "learning_rate": 1e-3}
    toy = {"num_sft": 8, "num_pairs": 8, "num_prompts_held_out": 2}
    small = {**COMMON, "max_length": 64, "learning_rate": 1e-3}
    where = {"stage": "tiny_image_model", "where": {"architecture": "sdxl"}}
    stages: dict[str, Any] = {
        "toy_preferences": {"set": toy},
        "tiny_image_model": {"array": {"architecture": ["sdxl"]}},
        "toy_image_pairs": {"set": {"num_prompts": 10, "pairs_per_prompt": 2}},
        "sft": {"set": {**text, "model_name_or_path": model, "dataset": str(folder / "chats.jsonl")}},
        "dpo": {"set": {**text, "dataset": str(folder / "pairs.jsonl"), "val_fraction": 0.3}},
        "mdlm_sft": {"set": {**small, "new_model": SHAPE}, "needs": {"datasets": "toy_preferences"}},
        "mdlm_dpo": {
            "set": {**small, "diffusion_steps": 2},
            "needs": {"datasets": "toy_preferences", "policy": "mdlm_sft"},
        },
        "sdxl_dpo": {
            "set": {**COMMON, "resolution": 32, "learning_rate": 1e-3, "lora": {"r": 2}},
            "needs": {"pairs": "toy_image_pairs", "model": where},
        },
    }
    path = folder / "ranks.yaml"
    path.write_text(yaml.safe_dump({"name": "ranks", "stages": stages}))
    return path


def losses(workspace: Path, run_name: str, stage: str) -> list[float]:
    rows = read_jsonl(workspace / "logs" / run_name / stage / "all" / "steps.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def test_two_ranks_train_as_one_process_does_and_tasks_run_side_by_side(tmp_path: Path) -> None:
    path = pipeline(tmp_path)
    loaded_by_another = [f"{stage}.dataloader_num_workers=1" for stage in (*TRAININGS, "mdlm_sft")]
    run(tmp_path, "run=one", *loaded_by_another, pipeline=path)
    processes = [f"stages.{stage}.processes=2" for stage in TRAININGS]
    printed = run(tmp_path, "run=two", "share=false", "--jobs", "2", *processes, pipeline=path)
    for stage in TRAININGS:
        assert f"> {stage}:all (2 ranks)" in printed
        one, two = losses(tmp_path, "one", stage), losses(tmp_path, "two", stage)
        assert len(one) > 1
        assert two == pytest.approx(one, rel=2e-5)
    for stage in ("data/{}/toy_preferences", "data/{}/toy_image_pairs", "checkpoints/{}/mdlm_sft"):
        one, two = (read(tmp_path / stage.format(name) / "all").manifest.content_digest for name in ("one", "two"))
        assert one == two, "side by side the same content is made"
    torchrun(tmp_path)


def torchrun(workspace: Path) -> None:
    """A stage started by torchrun itself: rank 0 holds the task, the other joins."""
    entry = yaml.safe_load((workspace / "ranks.yaml").read_text())["stages"]["mdlm_dpo"]
    (workspace / "mdlm_dpo.yaml").write_text(yaml.safe_dump(entry["set"]))
    made = {"datasets": "data/one/toy_preferences/all", "policy": "checkpoints/one/mdlm_sft/all"}
    inputs = [f"inputs.{name}={workspace / folder}" for name, folder in made.items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "stages.mdlm_dpo",
        str(workspace / "mdlm_dpo.yaml"), "run=three", f"workspace={workspace}", *inputs,
    ]  # fmt: skip
    for _ in range(2):  # the second time there is nothing to do, which both ranks have to know
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(workspace, "three", "mdlm_dpo") == losses(workspace, "two", "mdlm_dpo")
