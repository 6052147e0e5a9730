"""The arguments of transformers' Trainer, from a training stage's configuration."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, TypeVar

from prefmill.core.errors import ConfigError
from prefmill.core.stage import Task
from prefmill.distributed.devices import claim_device, has_gpu
from prefmill.training.config import TrainingConfig, accumulation

if TYPE_CHECKING:
    from transformers import TrainingArguments

ArgumentsT = TypeVar("ArgumentsT", bound="TrainingArguments")
PROJECT = "prefmill"  # in every tracker
_SAME_NAME = (
    "learning_rate", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "weight_decay", "max_grad_norm", "seed", "logging_steps", "save_steps", "save_total_limit",
    "dataloader_num_workers", "ddp_timeout",
)  # fmt: skip


def trainer_arguments(config: TrainingConfig, task: Task, world_size: int) -> dict[str, Any]:
    """Keyword arguments for transformers' TrainingArguments or TRL's SFTConfig; the tracker writes below the logs."""
    from prefmill.distributed.sharding import sharding_arguments

    claim_device()
    on_cpu = not has_gpu()
    if on_cpu and config.precision == "fp16":  # transformers would compute in fp32
        raise ConfigError(
            "fp16 needs a GPU", where="precision", got="no GPU that torch sees", fix="set precision: bf16 or fp32"
        )
    _point_trackers(task)
    return {
        **{name: getattr(config, name) for name in _SAME_NAME},
        "output_dir": str(task.output),
        "project": PROJECT,
        "run_name": f"{task.run}-{task.stage}-{task.name}",
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation(config, world_size),
        "gradient_checkpointing": config.activation_checkpointing,
        # The reentrant kind gives no gradient where no input asks for one, as under an adapter on a frozen base.
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.activation_checkpointing else None,
        **sharding_arguments(config),
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "use_cpu": on_cpu,
        "data_seed": config.seed,
        "logging_first_step": True,
        # By default the Trainer puts the running mean in place of a NaN loss, and hides it.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        # Without a GPU torch warns at every loader.
        "dataloader_pin_memory": not on_cpu,
        # The Trainer would drop every key that the model's forward does not name.
        "remove_unused_columns": False,
        "report_to": list(config.report_to) or "none",
        "disable_tqdm": False,
        "torch_compile": config.torch_compile and not config.compiles_itself,
        "full_determinism": config.deterministic,
        **({} if config.optim is None else {"optim": config.optim}),
        **_liger(config.use_liger_kernel),
    }


def made(kind: type[ArgumentsT], given: dict[str, Any]) -> ArgumentsT:
    """Arguments of a trainer; raises ConfigError for values that transformers refuses."""
    try:
        arguments: ArgumentsT = kind(**given)
    except ValueError as error:
        raise _refused(error) from None
    return arguments


def check_optimizer(trainer: Any) -> None:
    """Raise ConfigError for an optimizer or a schedule that cannot be made: a Trainer does so when training starts."""
    import torch
    from transformers import get_scheduler

    args, warmup = trainer.args, 9 * bool(trainer.args.warmup_steps)  # one step may be all of a warm-up that ends at 1
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        get_scheduler(args.lr_scheduler_type, probe, warmup, 99, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
        if warmup and probe.param_groups[0]["lr"] == 1:
            raise ValueError(f"{args.lr_scheduler_type} begins at the full rate whatever warmup_steps says")
        if args.lr_scheduler_kwargs and "constant" in args.lr_scheduler_type:  # it is handed none
            raise ValueError(f"{args.lr_scheduler_type} reads no lr_scheduler_kwargs")
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise _refused(error) from None


def _refused(error: Exception) -> ConfigError:
    return ConfigError(
        "the training's optimizer, schedule or another argument cannot be used here",
        where="optim, lr_scheduler_type, lr_scheduler_kwargs", got=" ".join(str(error).split())[:300],
        fix="correct lr_scheduler_kwargs, or leave it, lr_scheduler_type and optim out: they then need nothing",
    )  # fmt: skip


def _liger(wanted: bool) -> dict[str, Any]:
    if wanted and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "use_liger_kernel needs a package that is not installed", where="use_liger_kernel", got="no liger_kernel",
            fix="pip install liger-kernel (it needs a GPU), or leave use_liger_kernel out",
        )  # fmt: skip
    return {"use_liger_kernel": wanted}


def _point_trackers(task: Task) -> None:
    """Have every tracker write below the task's logs; none of them needs the network."""
    # Set over the user's own: pictures are written into this folder, beside the curves.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(task.logs / "tensorboard")
    os.environ.setdefault("TRACKIO_DIR", str(task.logs / "trackio"))
    os.environ.setdefault("WANDB_DIR", str(task.logs))
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", PROJECT)  # transformers' own default is "huggingface"
