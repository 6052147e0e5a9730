"""Resuming a model from a trainer's own checkpoint: every weight comes back, or training does not go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefmill.artifacts import CHECKPOINT_PREFIX
from prefmill.errors import PipelineError


def resume_strictly(trainer: Any) -> None:
    """Have `trainer` write checkpoints that it can read back, and refuse one that lacks weights.

    transformers writes models that were renamed since they came to the hub, Qwen2.5-VL among them, under the hub's
    names; its Trainer reads a checkpoint under the model's own, warns that all weights are missing, and trains on
    from where it started.
    """
    model = trainer.model
    write, check = model.save_pretrained, trainer._issue_warnings_after_load

    def save_pretrained(folder: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(folder).name.startswith(CHECKPOINT_PREFIX) and not hasattr(model, "peft_config"):
            kwargs["save_original_format"] = False
        return write(folder, *args, **kwargs)

    def refuse(result: Any) -> None:
        missing = sorted(set(result.missing_keys) - set(getattr(model, "all_tied_weights_keys", None) or ()))
        if missing:
            raise PipelineError(
                "the checkpoint to resume from lacks weights", got=f"{len(missing)}, such as {missing[0]}",
                fix="delete the task's checkpoint-* folders: training starts again from its beginning",
            )  # fmt: skip
        check(result)

    model.save_pretrained = save_pretrained
    trainer._issue_warnings_after_load = refuse
