"""What every training stage shares: where it starts, training from the newest checkpoint on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefmill.core.errors import ConfigError
from prefmill.core.files import write_atomic
from prefmill.core.stage import Metrics, Task
from prefmill.training.checkpoints import newest_checkpoint
from prefmill.training.config import TrainingConfig
from prefmill.training.publish import publish
from prefmill.training.rescoring import Rescoring


def train_and_save(
    trainer: Any, processor: Any, config: TrainingConfig, task: Task, start: str, rescoring: Rescoring
) -> Metrics:
    """Train `start` from the newest complete checkpoint on, and publish it."""
    with trainer.args.main_process_first(local=False):  # it deletes torn checkpoints before others look
        checkpoint = newest_checkpoint(task.output)
    trainer.train(resume_from_checkpoint=checkpoint)
    return publish(trainer, processor, config, task, start, rescoring)


def report_dropped(task: Task, dropped: Sequence[Mapping[str, Any]], kept: int, config: TrainingConfig) -> None:
    """List over-long rows in the logs; raises ConfigError when `on_overlong` is `fail`, or when nothing is left."""
    path = task.logs / "overlong_rows.json"
    if dropped:
        files = {row.get("file") for row in dropped}
        others = [row for row in json.loads(path.read_text()) if row.get("file") not in files] if path.is_file() else []
        write_atomic(path, json.dumps([*others, *dropped], indent=1))
    if not dropped or (kept and config.on_overlong == "drop"):
        return
    longest = max(row["num_tokens"] for row in dropped)
    raise ConfigError(
        f"{len(dropped)} of {len(dropped) + kept} rows are longer than max_length",
        where=path, got=f"up to {longest} tokens", expected=f"at most {config.max_length}",
        fix=f"raise max_length to {longest}, or set on_overlong=drop to leave them out; nothing is ever truncated",
    )  # fmt: skip
