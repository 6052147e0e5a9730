"""The arguments of transformers' Trainer, from a training stage's configuration."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from prefmill.core.stage import Task
from prefmill.distributed.devices import claim_device, has_gpu
from prefmill.training.config import TrainingConfig, accumulation

if TYPE_CHECKING:
    pass


def trainer_arguments(config: TrainingConfig, task: Task, world_size: int) -> dict[str, Any]:
    """Keyword arguments for transformers' TrainingArguments or TRL's SFTConfig; the tracker writes below the logs."""
    from prefmill.distributed.sharding import sharding_arguments

    claim_device()
    on_cpu = not has_gpu()
    _point_trackers(task)
    return {
        "output_dir": str(task.output),
        "run_name": f"{task.run}-{task.stage}-{task.name}",
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.num_train_epochs,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation(config, world_size),
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.activation_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.activation_checkpointing else None,
        **sharding_arguments(config),
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "use_cpu": on_cpu,
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "dataloader_num_workers": config.dataloader_num_workers,
        "dataloader_pin_memory": not on_cpu,
        "remove_unused_columns": False,
        "report_to": list(config.report_to) or "none",
        "disable_tqdm": False,
    }


def _point_trackers(task: Task) -> None:
    """Have every tracker write below the task's logs; none of them needs the network."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(task.logs / "tensorboard")
    os.environ.setdefault("TRACKIO_DIR", str(task.logs / "trackio"))
    os.environ.setdefault("WANDB_DIR", str(task.logs))
    os.environ.setdefault("WANDB_MODE", "offline")
