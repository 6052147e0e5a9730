"""Two ranks on this machine train as one process does, whether prefmill or torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefmill.store.artifacts import read_manifest
from prefmill.store.jsonl import write_jsonl
from tests.tiny import pair_rows, save_tiny_qwen2

KEYS = ["precision=fp32", "per_device_train_batch_size=2", "effective_batch_size=4", "num_train_epochs=1"]
KEYS += ["logging_steps=1", "max_length=64", "report_to=[]"]


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("dpo")
    save_tiny_qwen2(folder / "model")
    write_jsonl(folder / "pairs.jsonl", pair_rows(6, pairs=2))
    keys = [f"workspace={folder}", f"model_name_or_path={folder / 'model'}", f"dataset={folder / 'pairs.jsonl'}"]
    return [*keys, *KEYS, "learning_rate=1e-3"]


def train(launcher: list[str], keys: list[str], run: str) -> list[tuple[int, float]]:
    """The loss of every step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "-m", "stages.dpo", *keys, f"run={run}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(keys[0].removeprefix("workspace="))
    assert read_manifest(folder / "checkpoints" / run / "dpo" / "all") is not None
    assert json.loads((folder / "logs" / run / "dpo" / "all" / "status.json").read_text())["state"] == "complete"
    rows = map(json.loads, (folder / "logs" / run / "dpo" / "all" / "steps.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(dpo: list[str]) -> None:
    alone = train([], dpo, "alone")
    assert len(alone) >= 3
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    for run, launcher, more in [("own", [], ["processes=2"]), ("torchrun", torchrun, [])]:
        assert train(launcher, [*dpo, *more], run) == [(step, pytest.approx(loss, abs=2e-4)) for step, loss in alone]
