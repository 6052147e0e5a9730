"""The memory of a training's nodes, against what a job or this machine gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.cli.main import main
from prefmill.slurm import estimate
from prefmill.slurm.cluster import Resources
from prefmill.slurm.host_memory import Given, given_by_job, host_need
from prefmill.slurm.memory import GpuMemory
from prefmill.slurm.partitions import Partition

PARTITION = Partition("gpu", nodes=4, max_minutes=None, max_nodes=None, cpus=96, memory_gb=1000, gpus=8)
PIPELINE = """
name: host
stages:
  sft:
    array: { modality: { clean: {}, vision: { set: { model_name_or_path: MODEL-2 } } } }
    processes: 2
    set: { model_name_or_path: MODEL-1, learning_rate: 1.0e-5, num_train_epochs: 1, max_length: 64, precision: fp32,
           dataset: rows.jsonl, per_device_train_batch_size: 1, effective_batch_size: 2 }
"""


def write_pipeline(folder: Path) -> Path:
    """A training on two small models of different depth, whose shape alone is there."""
    from transformers import Qwen2Config

    for layers in (1, 2):
        shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 4096, "vocab_size": 1000}
        Qwen2Config(hidden_size=1024, num_hidden_layers=layers, **shape).save_pretrained(folder / f"m-{layers}")
    (folder / "rows.jsonl").touch()
    path = folder / "host.yaml"
    path.write_text(PIPELINE.replace("MODEL", f"{folder}/m").replace("rows.jsonl", str(folder / "rows.jsonl")))
    return path


@pytest.mark.parametrize(
    ("resources", "gb"),
    [
        ({"memory_gb": 64}, 64), ({}, 1000), ({"options": {"mem": 0}}, 1000), ({"options": {"mem": "2G"}}, 2),
        ({"options": {"mem": 4096}}, 4), ({"cpus": 8, "options": {"mem-per-cpu": "2G"}}, 16),
        ({"gpus": 4, "options": {"mem-per-gpu": "100G"}}, 400),
    ],
)  # fmt: skip
def test_a_job_gives_what_it_asks_for_else_what_nodes_have(resources: dict[str, object], gb: float) -> None:
    given = given_by_job(Resources.model_validate({"partition": "gpu", **resources}), {"gpu": PARTITION})
    assert given is not None
    assert given.gb == gb
    assert given_by_job(Resources(), {}) is None


def test_on_cpus_ranks_hold_all_and_beside_gpus_the_weights_they_load() -> None:
    memory = GpuMemory(weights=4, gradients=4, optimizer=8, activations=3, logits=1)
    assert host_need(memory, 4, 2, on_gpus=False).total == pytest.approx(2 * (20 + 0.6) * 1.05)
    assert host_need(memory, 4, 8, on_gpus=True).total == pytest.approx(8 * (4 + 2.5) * 1.05)


def test_a_training_that_this_machine_cannot_hold_is_refused_with_the_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["estimate", str(write_pipeline(tmp_path)), f"workspace={tmp_path}"]
    for gb, code in ((1.5, 2), (100.0, 0)):
        monkeypatch.setattr(estimate, "given_here", lambda gb=gb: Given(gb, "the test gives"))
        assert main(words) == code
        printed = capsys.readouterr()
        # 17.8M and 34.6M numbers of 4 bytes, and of 16 with gradients and Adam's moments.
        assert "2 x (process 0.6, weights 0.1, gradients 0.1, optimizer 0.1" in printed.out
        assert "2 x (process 0.6, weights 0.1, gradients 0.3, optimizer 0.3" in printed.out
        assert ("sft:vision: 3 GB of memory needed, the test gives 2: more memory, fewer ranks" in printed.err) == bool(
            code
        )
