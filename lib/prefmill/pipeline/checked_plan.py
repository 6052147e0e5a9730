"""The plan of a run that is to start: what a task would refuse hours later is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

from prefmill.core.errors import PipelineError
from prefmill.core.stage import Reads
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask, make_plan


def plan_to_run(pipeline: PipelineFile, source: Path) -> Plan:
    """As `make_plan`; raises PipelineError too where an input and a key that it stands for are given, or neither."""
    plan = make_plan(pipeline, source)
    for task in plan.tasks:
        for name, reads in task.stage.reads.items():
            if reads.instead_of:
                _require_one_source(task, name, reads, source)
    return plan


def _require_one_source(task: PlannedTask, name: str, reads: Reads, source: Path) -> None:
    found = {f"inputs.{name}": path for path in task.inputs[name]}
    found |= {key: value for key in reads.instead_of if (value := getattr(task.config, key))}
    if len(found) == 1:
        return
    stage, ways = task.stage.name, ", ".join(f"{key}=..." for key in reads.instead_of)
    left_out = " or ".join(f"{stage}.{key}=null" for key in reads.instead_of if key in found)
    raise PipelineError(
        f"{'two sources' if found else 'no source'} of '{name}' ({reads.kind}) for {task.key}", where=source,
        got=" and ".join(f"{key}={value}" for key, value in found.items()) or None,
        expected=f"inputs.{name}=FOLDER, {f'stage {reads.stage}, ' if reads.stage else ''}or {ways}",
        fix=left_out or "give one of these",
    )  # fmt: skip
