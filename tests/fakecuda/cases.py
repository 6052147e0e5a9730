"""What a training runs on a GPU, forward and backward, on fake CUDA tensors: one function a case, raises at a mix."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.fakecuda.device import fake, fake_cuda, on_cuda
from tests.training_steps import PARTS, Step, causal, groups, masked_diffusion, qwen2, reward, sdxl

CUDA = torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32


def take(make: Callable[[], Step], weights: torch.dtype, mixed: bool, checkpointing: bool = False) -> None:
    """A step's forward and backward pass, its weights in a precision, under autocast where `mixed`."""
    step = make()
    with fake_cuda() as mode:
        model = on_cuda(step.model, weights)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch, constants = fake(mode, step.batch).to(CUDA), [fake(mode, value) for value in step.constants]
        with torch.autocast("cuda", dtype=BF16, enabled=mixed):
            losses = step.losses(model, batch, *constants)
        assert losses.is_cuda
        losses.sum().backward()
        _has_gradients(model)


def trainer_step() -> None:
    """A microbatch through PreferenceTrainer, from the encoded batch to the telemetry and the gradients."""
    from prefmill.families.causal.group_attention import use_group_attention
    from prefmill.families.causal.group_layout import encode_groups
    from prefmill.families.causal.scorer import patch_forward, score_batch
    from prefmill.training.family import Family

    family = Family(lambda groups, parts, epoch: encode_groups(groups, parts), score_batch)
    model = qwen2("tiny")
    use_group_attention(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, family, Path(folder))
        inputs = dict(trainer.train_dataset[0])
        with fake_cuda() as mode:
            inputs = {name: fake(mode, value) for name, value in inputs.items()}
            with torch.autocast("cuda", dtype=BF16):
                loss = trainer.training_step(patch_forward(on_cuda(model)), inputs)
            assert loss.is_cuda
            _has_gradients(model)


def _trainer(model: nn.Module, family: Any, folder: Path) -> Any:
    """A trainer of one microbatch that takes itself to be on the GPU."""
    from transformers import TrainingArguments

    from prefmill.training.batches import Microbatch
    from prefmill.training.family import by_group
    from prefmill.training.objectives import Settings, mix
    from prefmill.training.telemetry import Telemetry
    from prefmill.training.trainer import PreferenceData, PreferenceTrainer

    class OnTheGpu(TrainingArguments):
        place_model_on_device = False

        @property
        def device(self) -> torch.device:
            assert super().device == torch.device("cpu")  # which sets up what the Trainer asks for
            return CUDA

    data = PreferenceData(groups(), by_group([torch.zeros(3), torch.zeros(3)]), [Microbatch(tuple(PARTS), 4, 0, 0)])
    args = OnTheGpu(output_dir=str(folder), use_cpu=True, report_to="none")
    settings = Settings(0.1)
    objective = mix(["sigmoid"], [1.0], settings)
    return PreferenceTrainer(model, args, data, None, family, objective, settings, Telemetry(folder, 0), [])


def items_together(kind: str, weights: torch.dtype) -> None:
    """A checklist's items behind a review that was read once, asked and gone on from."""
    from prefmill.checklist import continued_rows
    from prefmill.checklist.transformers_engine import read

    with fake_cuda(), torch.no_grad():
        model = on_cuda(qwen2("tiny"), weights).eval()
        rows = getattr(continued_rows, kind)(model, read(model, tuple(range(9)), None))
        assert rows.extend([(3, 4, 5), (6, 7)], 2).is_cuda
        assert rows.extend([(8,), (9,)]).is_cuda


def _has_gradients(model: nn.Module) -> None:
    trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert [name for name, gradient in trained.items() if gradient is not None and not gradient.is_cuda] == []
    assert any(gradient is not None for gradient in trained.values())


def _name(*parts: object) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in parts if part)


_CAUSAL = product(("group", "pairwise"), ((BF16, False), (FP32, True), (FP32, False)), (False, True))
_SDXL = ((None, BF16, "dpo"), (None, FP32, "dspo"), ("lora", BF16, "dspo"), ("lora", FP32, "dpo"),
         ("dora", BF16, "dspo"))  # fmt: skip
_ROWS = ("PackedRows", "PaddedRows")
CASES: Mapping[str, Callable[[], None]] = {
    **{
        _name("causal", layout, weights, mixed and "autocast", again and "checkpointing"): partial(
            take, partial(causal, layout), weights, mixed, again
        )
        for layout, (weights, mixed), again in _CAUSAL
    },
    "trainer step": trainer_step,
    **{_name(kind, weights): partial(items_together, kind, weights) for kind in _ROWS for weights in (BF16, FP32)},
    "masked diffusion": partial(take, masked_diffusion, FP32, True),
    "reward": partial(take, reward, FP32, True),
    **{
        _name("sdxl", adapter or "whole", weights, objective): partial(
            take, partial(sdxl, adapter=adapter, objective=objective), weights, weights == BF16
        )
        for adapter, weights, objective in _SDXL
    },
}
