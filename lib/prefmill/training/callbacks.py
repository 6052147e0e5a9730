"""What prefmill hangs into transformers' Trainer: step records, progress, and checkpoints marked when complete."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefmill.core.errors import DivergedError
from prefmill.core.files import append_row
from prefmill.core.graceful_stop import Stopped, StopWatch
from prefmill.core.stage import Task
from prefmill.distributed.collectives import rank_zero_says
from prefmill.pipeline.attempts import EXECUTED
from prefmill.training.checkpoints import STEPS, mark_complete
from prefmill.training.telemetry import alarm

_GO_ON, _SAVE, _STOP = 0, 1, 2  # what rank 0 has all ranks do after a step


class StageCallback(TrainerCallback):
    """Records steps, publishes progress, marks checkpoints; saves every few minutes, and before it stops when asked."""

    def __init__(self, task: Task, save_minutes: float) -> None:
        self.task = task
        self.stopping = False
        self._watch = StopWatch(task.logs)
        self._save_seconds, self._saved = 60 * save_minutes, time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say where warm-up takes the whole training: the learning rate asked for is never reached."""
        warmup, last = args.get_warmup_steps(state.max_steps), state.max_steps - 1
        if warmup > last and state.is_world_process_zero:
            told = (
                f"warm-up takes {warmup} steps of {state.max_steps}: the rate ends at {last / warmup:.0%} of its peak"
            )
            alarm(self.task.logs, state.global_step, told, "lower warmup_steps, or learning_rate has no meaning")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Raise DivergedError for an evaluation that is no number: every pair with NaN would count as lost."""
        means = {name: value for name, value in given["metrics"].items() if name in ("eval_loss", "eval_margin")}
        wrong = {name: value for name, value in means.items() if not math.isfinite(value)}
        if wrong:
            raise _diverged("an evaluation is not a number", state.global_step, wrong)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record that this optimizer step was taken; save and stop after it where that was asked for."""
        word = _GO_ON
        if state.is_world_process_zero:
            append_row(self.task.logs / EXECUTED, {"step": state.global_step})
            self.task.progress(state.global_step, state.max_steps, "steps")
            word = self._decide(state.global_step, int(args.logging_steps))
        # After the last step there is nothing to break off: training ends by itself.
        if state.global_step < state.max_steps and (said := rank_zero_says(lambda: word)):
            control.should_save = True
            self.stopping = control.should_training_stop = said == _STOP

    def _decide(self, step: int, logging_steps: int) -> int:
        if self._watch.due(step, logging_steps):
            return _STOP
        # A logged loss is the mean since the one before: only where it is logged does resuming leave it as it was.
        is_late = time.monotonic() - self._saved > self._save_seconds
        return _SAVE if is_late and step % logging_steps == 0 else _GO_ON

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch broken off is no occasion to evaluate."""
        if self.stopping and state.epoch is not None and abs(state.epoch - round(state.epoch)) > 1e-6:
            control.should_evaluate = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise Stopped rather than have a half-trained model taken for the finished one."""
        # Not right after the step: the Trainer writes its checkpoint after on_step_end, and would not get to it.
        if self.stopping:
            raise Stopped(f"saved and stopped at step {state.global_step} of {state.max_steps}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Append to the curve."""
        values = {key: value for key, value in given["logs"].items() if key in _CURVE_KEYS or key.startswith("eval_")}
        curve = {key: value for key, value in values.items() if not key.endswith(_TIMING_SUFFIXES)}
        if not curve or not state.is_world_process_zero:
            return
        append_row(self.task.logs / STEPS, {"step": state.global_step, "epoch": state.epoch, **curve})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint just written as complete, once every rank has written its part."""
        self._saved = time.monotonic()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def check_every_step(trainer: Any) -> None:
    """Have `trainer` raise DivergedError before it takes a step whose loss or gradient norm is NaN or infinite.

    Looked at once an optimizer step, whether or not it is logged: the loss since the last log has every microbatch in
    it. In fp16 the norm may be infinite, as its scaler then skips the step by itself; not where nothing is scaled any
    more, or every step to come would be skipped, and not at every step: nothing would be trained.
    """
    grad_norm_of, scaler, num_skipped = trainer._get_grad_norm, trainer.accelerator.scaler, 0

    def checked(model: Any, grad_norm: Any = None) -> Any:
        nonlocal num_skipped
        norm, step = grad_norm_of(model, grad_norm=grad_norm), trainer.state.global_step + 1
        may_skip = trainer.args.fp16 and (scaler is None or scaler.get_scale() > 1)
        _require_numbers(trainer._tr_loss, 0.0 if may_skip else norm, step)
        num_skipped += may_skip and not math.isfinite(float(_whole(norm)))
        if num_skipped == trainer.state.max_steps:
            raise _diverged("fp16 has skipped every step", step, f"{num_skipped} gradients that are not numbers")
        return norm

    trainer._get_grad_norm = checked


def _require_numbers(loss: Tensor, grad_norm: Any, step: int) -> None:
    norm = _whole(grad_norm)
    if math.isfinite(float(loss.detach() * 0 + norm)):  # one wait for the device, not two
        return
    raise _diverged("the loss or its gradient is no longer a number", step, f"{float(loss)} and {float(norm)}")


def _whole(grad_norm: Any) -> Any:
    norm = 0.0 if grad_norm is None else grad_norm
    # FSDP2 gives a DTensor, of which every rank holds a part.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _diverged(what: str, step: int, got: object) -> DivergedError:
    fix = "lower learning_rate, check the data, or use precision=fp32; the last checkpoint is kept"
    return DivergedError(what, where=f"step {step}", got=got, fix=fix)


_CURVE_KEYS = {
    "loss", "learning_rate", "grad_norm", "margin", "accuracy", "length_accuracy", "chosen_logps", "rejected_logps",
    "chosen_change", "length_correlation",
    "mean_token_accuracy", "draw_variance", "recommended_draws", "draws", "winner_error_change", "sft_cosine",
}  # fmt: skip
_TIMING_SUFFIXES = ("runtime", "per_second")
