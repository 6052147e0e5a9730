"""Point 4: torch's own alarm at whatever makes the CPU wait for the GPU, around forward and backward of every family.

On a CPU the same steps run without the alarm; that nothing is read back is there held by tests/fakecuda.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.training_steps import FAMILIES, Step


@contextmanager
def alarm(device: torch.device) -> Iterator[None]:
    """An error at every wait, on a GPU."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def take(step: Step, device: torch.device) -> torch.Tensor:
    """The losses of a step whose batch is on the device; their gradients are in the model."""
    with torch.autocast(device.type, dtype=torch.bfloat16):
        losses = step.losses(step.model, step.batch, *step.constants)
    losses.sum().backward()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_for_nothing(device: torch.device, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers asks once a forward pass whether a mask says anything, unless it is traced: known, and not ours.
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    made = FAMILIES[family]("tiny")
    step = Step(made.model.to(device).train(), made.batch.to(device), made.losses, made.constants)
    take(step, device)  # kernels are loaded and workspaces made in the first
    with alarm(device):
        losses = take(step, device)
    assert losses.isfinite().all()
    assert any(value.grad is not None and value.grad.isfinite().all() for value in step.model.parameters())


@pytest.mark.gpu
def test_the_alarm_rings() -> None:
    """No CPU form: the alarm is CUDA's."""
    with pytest.raises(RuntimeError, match="synchroniz"), alarm(torch.device("cuda")):
        torch.ones(3, device="cuda").sum().item()
