"""What a run leaves for other commands: the plan it follows, and the links that name the newest run."""

from __future__ import annotations

import json
import os

from prefmill.core.files import write_atomic
from prefmill.pipeline.plan import Plan


def point_latest(plan: Plan) -> None:
    """Point `data/latest`, `checkpoints/latest` and `logs/latest` at this run."""
    for root in ("data", "checkpoints", "logs"):
        folder = plan.workspace / root
        (folder / plan.run).mkdir(parents=True, exist_ok=True)
        link = folder / f".latest.{os.getpid()}"
        link.unlink(missing_ok=True)
        # Relative, so that it is still right in a workspace that was moved or copied.
        link.symlink_to(plan.run)
        # By rename: at no moment is there no `latest`.
        os.replace(link, folder / "latest")


def write_plan(plan: Plan) -> None:
    """Record the tasks of this run for `prefmill status`, which reads no configuration."""
    tasks = [
        {
            "key": task.key,
            "output": str(task.output),
            "logs": str(task.logs),
            "needs": [other.key for other in plan.upstream(task)],
        }
        for task in plan.tasks
    ]
    path = plan.workspace / "logs" / plan.run / "plan.json"
    # A line per task. `indent` would have it written by Python's own encoder, ten times as slowly.
    lines = ",\n".join(json.dumps(task) for task in tasks)
    write_atomic(path, f'{{"run": {json.dumps(plan.run)}, "tasks": [\n{lines}\n]}}\n')
