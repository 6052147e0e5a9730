"""Point 3: scores of both layouts, a trainer beside TRL, step 0, and the same training twice to the bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from prefmill.distributed.isolation import in_own_process
from prefmill.families.causal.group_attention import use_group_attention
from prefmill.families.causal.group_layout import encode_groups
from prefmill.families.causal.scorer import encode_pairwise, patch_forward, score_batch
from tests.gpu.training import losses, train, train_with, weights
from tests.training_steps import PARTS, groups, qwen2

pytestmark = pytest.mark.slow
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1.0}  # nats, of sums over up to 55 tokens


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_both_layouts_score_alike(device: torch.device, dtype: torch.dtype) -> None:
    with device:
        model = qwen2("tiny" if device.type == "cpu" else "true").to(dtype).eval()
    pairs = encode_pairwise(groups(), PARTS, 0).to(device)
    packed = encode_groups(groups(), PARTS).to(device)
    with torch.no_grad():
        patch_forward(model)
        expected = score_batch(model, pairs)
        use_group_attention(model)
        found = score_batch(model, packed)
    for side in ("chosen", "rejected"):
        difference = found[getattr(packed, side)] - expected[getattr(pairs, side)]
        assert difference.abs().max() < TOLERANCE[dtype]


def test_its_loss_and_gradients_are_trls(device: torch.device, tiny_model: Path, tmp_path: Path) -> None:
    from tests.unit.integrations.test_group_dpo_trainer import loss_and_gradients, make, rows

    on = {"use_cpu": device.type == "cpu"}
    expected = loss_and_gradients(make("trl", tiny_model, tmp_path, rows(), **on))
    found = loss_and_gradients(make("group", tiny_model, tmp_path, rows(), **on))
    assert found[0] == pytest.approx(expected[0], abs=1e-4)
    assert all((found[1][name] - gradient).abs().max() < 1e-4 for name, gradient in expected[1].items())


def test_the_first_loss_is_ln_2(device: torch.device, tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    train(tmp_path, tiny_model, pairs_file)
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_deterministic_training_repeats_to_the_bit(
    device: torch.device, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Each in a process of its own: what makes it deterministic is set for all of a process."""
    keys = {"deterministic": True, "precision": "bf16" if device.type == "cuda" else "fp32"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        in_own_process(tmp_path, train_with, tmp_path / name, tiny_model, pairs_file, keys)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
