"""Which devices a process has; one that sees several and is no rank does not train."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import STAGES, MakeConfig

from prefmill.core.errors import ConfigError
from prefmill.core.stage import Task
from prefmill.distributed import devices
from prefmill.distributed.devices import claim_device, visible_gpus
from prefmill.pipeline.worker import import_and_run


@pytest.fixture
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("_two_gpus")
def test_a_training_that_sees_two_gpus_without_ranks_is_refused_before_it_begins(tmp_path: Path) -> None:
    begun: list[str] = []
    stage = dataclasses.replace(STAGES["make"], trains=True, run=lambda _config, _task: begun.append("run") or {})
    task = Task("r", "make", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        import_and_run(stage, MakeConfig(), task)
    assert begun == []


@pytest.mark.usefixtures("_two_gpus")
def test_a_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    claim_device()
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="local rank 2, 2 GPUs"):  # it would train on the GPU of rank 0
        claim_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a launcher that shows each rank its own
    claim_device()
    assert taken == [1, 0]


@pytest.mark.parametrize(
    "visible",
    [
        "", "-1", "NoDevFiles", "1, 3", "GPU-5a", "0,-1,1", "0,,1", "1,0,1", "GPU-5a,GPU-6b", "GPU-5a,1", "0,GPU-5a",
        "GPU-5a,GPU-5a", "MIG-7c,MIG-8d", "MIG-7c,GPU-5a",
    ],
)  # fmt: skip
def test_the_gpus_are_those_made_visible(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    """As torch reads the variable: CUDA stops at the first that is none, and of twice the same takes nothing."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == [str(name) for name in torch.cuda._parse_visible_devices()]


def test_gpus_that_a_jobs_control_group_forbids_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = [tmp_path / "nvidia0", tmp_path / "nvidia1"]
    files[0].touch()
    files[1].mkdir()  # a folder cannot be opened to write either, not even by root
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path)
    assert visible_gpus() == ["0"]


def test_asking_imports_no_torch() -> None:
    asks = "import sys; from prefmill.distributed.devices import *; visible_gpus(), rank(), world_size(), is_launched()"
    subprocess.run([sys.executable, "-c", f"{asks}; assert 'torch' not in sys.modules"], check=True, env=os.environ)
