"""Point 8: one step of SDXL's UNet at 1024 x 1024, of LLaDA-8B's width in four layers, of a reward model on ViT-L."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_nothing_read_back import take
from tests.training_steps import FAMILIES, Step

GB = 2.0**30


@pytest.mark.slow
@pytest.mark.parametrize("family", ["masked diffusion", "reward", "sdxl"])
def test_a_step_at_true_size(device: torch.device, family: str) -> None:
    with device:  # random weights are drawn where they are used
        made = FAMILIES[family]("tiny" if device.type == "cpu" else "true")
    model = made.model.to(torch.bfloat16) if family == "sdxl" else made.model
    if family == "sdxl" and device.type == "cuda":
        model.enable_gradient_checkpointing()
    step = Step(model.train(), made.batch.to(device), made.losses, made.constants)
    assert take(step, device).isfinite().all()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)
    if device.type == "cuda":
        print(f"{family}: {torch.cuda.max_memory_allocated() / GB:.1f} GB at the peak")
