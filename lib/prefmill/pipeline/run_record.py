"""What a run leaves for other commands: the plan it follows, and the links that name the newest run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import PipelineError, nearest, select
from prefmill.core.files import lacking, read_record, unique_suffix, write_atomic
from prefmill.core.places import CACHE, LATEST

if TYPE_CHECKING:  # `prefmill status` reads the record, and no configuration
    from prefmill.pipeline.plan import Plan

ROOTS = ("data", "checkpoints", "logs")
_IN_A_TASK = {"key": str, "output": str, "logs": str}


def point_latest(plan: Plan) -> None:
    """Point `data/latest`, `checkpoints/latest` and `logs/latest` at this run."""
    for root in ROOTS:
        folder = plan.workspace / root
        (folder / plan.run).mkdir(parents=True, exist_ok=True)
        link = folder / f".latest{unique_suffix()}"
        # Relative, so that it is still right in a workspace that was moved or copied.
        link.symlink_to(plan.run)
        try:
            os.replace(link, folder / LATEST)  # at no moment is there no `latest`
        except PermissionError:  # a link of another user's, under the sticky bit that scratch disks have
            link.unlink()
            print(f"{folder / LATEST} is another user's and does not follow run {plan.run}: name it", file=sys.stderr)


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


def run_names(workspace: Path) -> list[str]:
    """Every run with a folder under one of the roots, sorted."""
    folders = (path for root in ROOTS if (workspace / root).is_dir() for path in (workspace / root).iterdir())
    # A link is `latest`, which is one of the others.
    names = {path.name for path in folders if path.is_dir() and not path.is_symlink() and path.name[0] != "."}
    # A folder without a plan may be anybody's: it is not listed, and so never deleted.
    plans = {name: workspace / "logs" / name / "plan.json" for name in names if name != CACHE}
    return sorted(name for name, plan in plans.items() if os.access(plan, os.R_OK))


def closed_runs(workspace: Path) -> list[str]:
    """Runs of others that may not be looked into, sorted."""
    folders = (path for path in (workspace / "logs").glob("[!.]*") if path.is_dir() and not path.is_symlink())
    return sorted(path.name for path in folders if not os.access(path, os.R_OK | os.X_OK))


def run_tasks(workspace: Path, run: str) -> list[dict[str, Any]]:
    """The tasks of a run as its plan recorded them; raises PipelineError where there is no such run."""
    path = workspace / "logs" / run / "plan.json"
    if not path.is_file():
        raise no_such_run(workspace, run)
    tasks = read_record(path).get("tasks", "")
    if not isinstance(tasks, list) or any(lacking(task, _IN_A_TASK) for task in tasks):
        raise PipelineError(
            f"the record of run {run} is damaged", where=path, got=f"{path.stat().st_size} bytes that are no plan",
            fix="`prefmill run` or `submit` of its pipeline writes it anew; or delete it: the run is then not listed",
        )  # fmt: skip
    return [_below(workspace, task) for task in tasks]


def _below(workspace: Path, task: dict[str, Any]) -> dict[str, Any]:
    """With its places in this workspace: a copy of one may not lead to, or delete, what the original holds."""
    return task | {name: str(workspace.joinpath(*Path(task[name]).parts[-4:])) for name in ("output", "logs")}


def own_name(workspace: Path, run: str) -> str:
    """The run's own name, where `latest` was given."""
    link = workspace / "logs" / run
    return link.resolve().name if link.is_symlink() else run


def no_such_run(workspace: Path, run: str) -> PipelineError:
    """The error for a name that no run of the workspace has, or for a workspace without runs."""
    if names := run_names(workspace):
        return PipelineError(
            f"no such run{nearest(run, names)}", where=workspace / "logs" / run, expected=", ".join(names),
            fix="list the runs: prefmill runs",
        )  # fmt: skip
    return PipelineError(
        "no run yet in this workspace", where=workspace,
        fix="start one: prefmill run configs/pipelines/demo.yaml, or name another workspace: --workspace DIR",
    )  # fmt: skip


def select_tasks(tasks: list[dict[str, Any]], selector: str) -> list[dict[str, Any]]:
    """The tasks named by `STAGE` or `STAGE:TASK`; raises PipelineError naming the nearest where there are none."""
    known = {task["key"]: task for task in tasks}
    return [known[key] for key in select(selector, known, "in this run (--run names another)")]
