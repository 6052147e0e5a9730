"""Training on processes that this one forks, by any strategy, and what each rank held when it ended."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.families.mdlm.config import DiffusionPreferenceConfig, DiffusionTrainingConfig
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.config import TrainingConfig
from prefmill.training.preference_config import PreferenceConfig
from tests.conftest import REPOSITORY
from tests.forked_ranks import forget_ranks, run_ranks, start_ranks

DEEPSPEED = REPOSITORY / "configs" / "deepspeed"
KEYS: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 2, "precision": "fp32", "per_device_train_batch_size": 2,
    "effective_batch_size": 8, "logging_steps": 1, "save_steps": 2, "max_length": 400, "report_to": [],
    "lr_scheduler_type": "constant", "layout": "group",
}  # fmt: skip
STRATEGIES = {
    "zero1": {"deepspeed": str(DEEPSPEED / "zero1.json")},
    "zero2": {"deepspeed": str(DEEPSPEED / "zero2.json")},
    "zero3": {"deepspeed": str(DEEPSPEED / "zero3.json")},
    "zero3_offload": {"deepspeed": str(DEEPSPEED / "zero3_offload.json")},
    "fsdp": {"fsdp": True},
}
SHARDS, KILL, ALONE = "shards.json", "kill", "alone"
SLOW_IMPORTS = (
    "prefmill.families.causal.dpo", "prefmill.families.causal.sft", "prefmill.families.mdlm.dpo",
    "prefmill.families.mdlm.sft", "torch.distributed.fsdp",
)  # fmt: skip


def train(folder: Path, keys: dict[str, Any]) -> None:
    """The training that the keys are of: masked diffusion has draws, preferences a layout or a beta."""
    from prefmill.families.causal.dpo import train_dpo
    from prefmill.families.causal.sft import train_sft
    from prefmill.families.mdlm.dpo import train_diffusion_dpo
    from prefmill.families.mdlm.sft import train_diffusion_sft

    (folder / "out").mkdir(parents=True, exist_ok=True)
    task = Task("r", "train", "clean", {}, {}, {}, folder / "out", folder / "logs")
    note_shards(folder)
    if keys.pop(KILL, False):
        kill_at(3 * microbatches(keys) + 2)
    preferences = "layout" in keys or "beta" in keys
    rows = folder.parent / ("pairs.jsonl" if preferences else "chats.jsonl")
    given = (task, str(folder.parent / "model"), rows, rows)
    if "diffusion_steps" not in keys and preferences:
        train_dpo(validate(PreferenceConfig, keys), *given)
    elif "diffusion_steps" not in keys:
        train_sft(validate(TrainingConfig, keys), *given)
    elif preferences:
        train_diffusion_dpo(validate(DiffusionPreferenceConfig, keys), *given)
    else:
        train_diffusion_sft(validate(DiffusionTrainingConfig, keys), *given)


def note_shards(folder: Path) -> None:
    """Write down the shares of the weights and of Adam's first moments that this process holds when training ends."""
    from transformers import Trainer

    from prefmill.training import loop

    original, original_model, scoring = Trainer.train, loop.scoring_model, []

    @contextmanager
    def scoring_model(*given: Any) -> Iterator[Any]:
        with original_model(*given) as model:
            scoring.append(_held(model))
            yield model

    loop.scoring_model = scoring_model

    def train(self: Any, *given: Any, **more: Any) -> Any:
        done = original(self, *given, **more)
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's hold the one that is asked for
            optimizer = optimizer.optimizer
        moments = sum(_local(state["exp_avg"]) for state in optimizer.state.values())
        total = sum(getattr(weight, "ds_numel", weight.numel()) for weight in self.model.parameters())
        shares = {"weights": _held(self.model), "moments": moments / total, "scoring": scoring[-1:]}
        (folder / f"{os.environ.get('RANK', 0)}-{SHARDS}").write_text(json.dumps(shares))
        return done

    Trainer.train = train


def shares(folder: Path, what: str) -> list[Any]:
    """Of each rank, what `note_shards` noted."""
    return [json.loads(path.read_text())[what] for path in sorted(folder.glob(f"*-{SHARDS}"))]


def microbatches(keys: dict[str, Any]) -> int:
    """Of each rank, in a step."""
    return int(keys["effective_batch_size"]) // keys["per_device_train_batch_size"] // int(os.environ["WORLD_SIZE"])


def kill_at(call: int) -> None:
    """Have this process killed as it comes to its n-th microbatch."""
    from prefmill.training.trainer import PreferenceTrainer

    original, calls = PreferenceTrainer.training_step, []

    def training_step(self: Any, *given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *given, **more)

    PreferenceTrainer.training_step = training_step  # type: ignore[method-assign]


def _held(model: Any) -> float:
    """The share of a model's weights that this process holds."""
    weights = list(model.parameters())
    held = sum(weight.ds_tensor.numel() if hasattr(weight, "ds_tensor") else _local(weight) for weight in weights)
    return float(held / sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights))


def _local(weight: Any) -> int:
    return int((weight.to_local() if hasattr(weight, "to_local") else weight).numel())


def one_rank(folder: Path, keys: dict[str, Any]) -> None:
    if keys.pop(ALONE, False):
        forget_ranks()
    train(folder, keys)


def start(world_size: int, folder: Path, keys: dict[str, Any]) -> list[Any]:
    return start_ranks(world_size, one_rank, folder, keys)


def train_on(world_size: int, folder: Path, keys: dict[str, Any]) -> Path:
    run_ranks(world_size, one_rank, folder, keys)
    return folder


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_curve(folder / "logs" / STEPS) if key in row]


def largest_difference(one: Path, other: Path) -> float:
    """Of any weight of two finished folders, which must have the same ones."""
    weights = [load_file(path / "out" / "model.safetensors") for path in (one, other)]
    assert {key: value.shape for key, value in weights[0].items()} == {k: v.shape for k, v in weights[1].items()}
    return max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0])
