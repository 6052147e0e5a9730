"""Point 6: DDP, ZeRO-3 and FSDP2 on the GPUs there are train alike; the peak of memory is what `estimate` says.

ZeRO-3 and FSDP2 on a CPU are tests/unit/training/test_ranks.py: they share its imports, which cost most of a rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefmill.core.config import validate
from prefmill.families.causal.group_attention import use_group_attention
from prefmill.families.causal.group_layout import encode_groups
from prefmill.families.causal.scorer import encode_pairwise, patch_forward, score_batch
from prefmill.slurm.memory import GIGABYTE, gpu_memory, model_size
from prefmill.training.batches import GroupPart
from prefmill.training.data import Group, Pair
from prefmill.training.preference_config import PreferenceConfig
from tests.conftest import REPOSITORY
from tests.gpu.training import losses
from tests.training_steps import SizeName, qwen2

pytestmark = pytest.mark.slow
STRATEGIES = {"ddp": {}, "fsdp": {"fsdp": True}, "zero3": {"deepspeed": "configs/deepspeed/zero3.json"}}


def launch(folder: Path, model: Path, pairs: Path, name: str, ranks: int) -> list[float]:
    """The losses of a training by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m",
               "tests.gpu.training", folder, model, pairs, json.dumps(STRATEGIES[name])]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder)


def test_strategies_train_alike(device: torch.device, tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    ranks = torch.cuda.device_count() if device.type == "cuda" else 1
    names = list(STRATEGIES) if device.type == "cuda" else ["ddp"]
    found = {name: launch(tmp_path / name, tiny_model, pairs_file, name, ranks) for name in names}
    assert len(found["ddp"]) == 4
    for name in names:
        assert found[name] == pytest.approx(found["ddp"], abs=1e-3), name


def peak_gb(device: torch.device, size: SizeName, length: int, layout: str) -> float:
    """A training step's peak in bf16 with checkpointing, a pair of `length` tokens a side; 0 on a CPU."""
    with device:
        model = qwen2(size)
    if layout == "group":
        use_group_attention(model)
    patch_forward(model).train().gradient_checkpointing_enable({"use_reentrant": False})
    group = Group([1] * (length - 600), [[2] * 600, [3] * 600], [Pair("a", 0, 1)])
    parts = [GroupPart(0, (0,))]
    batch = (encode_groups([group], parts) if layout == "group" else encode_pairwise([group], parts, 0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # in the second step the optimizer's state is there from the start
        with torch.autocast(device.type, dtype=torch.bfloat16):
            scores = score_batch(model, batch)
            loss = -torch.nn.functional.logsigmoid(scores[batch.chosen] - scores[batch.rejected]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    return torch.cuda.max_memory_allocated() / GIGABYTE if device.type == "cuda" else 0.0


@pytest.mark.parametrize("length", [8_000, 28_000])
def test_the_peak_is_as_estimated(device: torch.device, length: int, tmp_path: Path) -> None:
    size: SizeName = "tiny" if device.type == "cpu" else "true"
    length = 700 if device.type == "cpu" else length
    found = peak_gb(device, size, length, "pairwise")
    with torch.device("meta"):
        qwen2(size).config.save_pretrained(tmp_path)
    config = validate(PreferenceConfig, {
        "precision": "bf16", "activation_checkpointing": True, "layout": "pairwise", "max_length": length,
        "per_device_train_batch_size": 1,
    })  # fmt: skip
    memory = gpu_memory(model_size(str(tmp_path)), config, world=1, rows=2, logits_at_once=256)
    expected = memory.total / 1.05 - memory.runtime  # the allocator counts neither fragments nor the runtime
    assert expected > 0
    if device.type == "cuda":  # no CPU form: a CPU's allocator keeps no count; tests of estimate count by autograd
        print(f"{length} tokens: {found:.2f} GB, estimated {expected:.2f}")
        assert found == pytest.approx(expected, rel=0.1)
