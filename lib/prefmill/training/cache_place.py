"""Where a training keeps what it computes once: for all runs of its workspace, or for itself."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from prefmill.core.stage import Task
from prefmill.distributed.devices import rank

_log = logging.getLogger(__name__)


def cache_place(task: Task, part: str = "") -> Path:
    """`part` of `data/cache` of the workspace where we may write there, else of the task's scratch, which is told."""
    own = task.work / "cache" / part
    # <workspace>/checkpoints/<run>/<stage>/<task>
    parents = task.output.parents
    if len(parents) <= 3 or parents[2].name != "checkpoints":
        return own
    shared = parents[3] / "data" / "cache" / part
    made = next(folder for folder in (shared, *shared.parents) if os.path.isdir(folder))
    # Of a group's cache any of the folders that a TensorCache spreads over may be closed, by its maker's umask.
    folders = [made, *shared.glob("??")] if made == shared else [made]
    closed = next((folder for folder in folders if not os.access(folder, os.R_OK | os.W_OK | os.X_OK)), None)
    if closed is None:
        return shared
    if rank() == 0:
        _log.warning(
            "%s is another user's: what is computed before the first step is neither read from there nor kept there; "
            "its owner shares it with `chmod -R g+rwX %s`",
            closed, shared if closed.parent == shared else closed,
        )  # fmt: skip
    return own
