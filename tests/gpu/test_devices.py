"""Point 1: which GPUs a process takes, and that the children of one that uses a GPU can use it too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefmill.core.errors import ConfigError
from prefmill.distributed import devices
from prefmill.distributed.isolation import in_own_process
from tests.conftest import REPOSITORY


def multiply(device: str, result: Path) -> None:
    """A matrix product on `device`, its sum written down."""
    result.write_text(str((torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)).sum().item()))


def test_several_gpus_in_one_process_are_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="more than one GPU"):
        devices.claim_device()


def test_one_gpu_is_claimed(device: torch.device) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("with several GPUs a process without ranks is refused: see above")
    devices.claim_device()
    assert devices.device_type() == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.slow
def test_a_child_of_a_process_that_uses_the_device_computes_too(device: torch.device, tmp_path: Path) -> None:
    multiply(str(device), tmp_path / "own")
    in_own_process(tmp_path, multiply, str(device), tmp_path / "child")
    assert (tmp_path / "child").read_text() == (tmp_path / "own").read_text() == "262144.0"


@pytest.mark.slow
def test_a_fork_of_a_process_with_the_imports_done_computes(device: torch.device, tmp_path: Path) -> None:
    """Nothing that the fork server imports or asks for may start CUDA."""
    code = (
        "import multiprocessing, sys, pathlib, prefmill.families.causal.dpo, prefmill.pipeline.worker\n"
        "from prefmill.distributed.devices import visible_gpus\n"
        "from tests.gpu.test_devices import multiply\n"
        "visible_gpus()\n"
        f"given = ({str(device)!r}, pathlib.Path({str(tmp_path / 'fork')!r}))\n"
        "child = multiprocessing.get_context('fork').Process(target=multiply, args=given)\n"
        "child.start(); child.join(); sys.exit(child.exitcode)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fork").read_text() == "262144.0"
