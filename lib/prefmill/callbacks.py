"""What prefmill hangs into transformers' Trainer: step records, progress, and checkpoints marked when complete."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefmill.errors import PipelineError
from prefmill.stage import Task
from prefmill.training import EXECUTED, STEPS, append_row, mark_complete


class StageCallback(TrainerCallback):
    """Records every step in the task's logs, publishes progress, marks checkpoints, and stops on a lost loss."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record that this optimizer step was taken."""
        if state.is_world_process_zero:
            append_row(self.task.logs / EXECUTED, {"step": state.global_step})
            self.task.progress(state.global_step, state.max_steps, "steps")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append to the curve; raises PipelineError when the loss is NaN or infinite."""
        values = {key: value for key, value in (logs or {}).items() if key in _CURVE_KEYS or key.startswith("eval_")}
        curve = {key: value for key, value in values.items() if not key.endswith(_TIMING_SUFFIXES)}
        if not curve or not state.is_world_process_zero:
            return
        append_row(self.task.logs / STEPS, {"step": state.global_step, "epoch": state.epoch, **curve})
        if not math.isfinite(curve.get("loss", 0.0)):
            raise PipelineError(
                "the loss is no longer a number", where=f"step {state.global_step}", got=curve["loss"],
                fix="lower learning_rate, check the data, or use precision=fp32; the last checkpoint is kept",
            )  # fmt: skip

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint just written as complete, once every rank has written its part."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


_CURVE_KEYS = {
    "loss", "learning_rate", "grad_norm", "margin", "accuracy", "length_accuracy", "chosen_logps", "rejected_logps",
    "mean_token_accuracy",
}  # fmt: skip
_TIMING_SUFFIXES = ("runtime", "per_second")
