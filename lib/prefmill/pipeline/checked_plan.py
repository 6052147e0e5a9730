"""The plan of a run that is to start: what a task would refuse hours later is refused before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefmill.core.config import StrictConfig, identity
from prefmill.core.errors import PipelineError
from prefmill.core.places import MANIFEST, expand_home, looks_local
from prefmill.core.stage import Reads, Stage
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask, make_plan


def plan_to_run(pipeline: PipelineFile, source: Path) -> Plan:
    """As `make_plan`; raises PipelineError too where an input and a key that it stands for are given, or neither."""
    plan = make_plan(pipeline, source)
    for task in plan.tasks:
        for name, reads in task.stage.reads.items():
            if reads.instead_of:
                _require_one_source(task, name, reads, source)
        require_asked(task.stage, task.config, task.inputs, task.key)
    return plan


def require_asked(
    stage: Stage[Any], config: StrictConfig, inputs: Mapping[str, Sequence[object]], where: object
) -> None:
    """Raise PipelineError for an input that no key asks for, one that is asked for and not given, and keys of none."""
    for name, reads in stage.reads.items():
        given, path = bool(inputs.get(name)), f"inputs.{name}=FOLDER of a {reads.kind}"
        key, _, value = (reads.asked_by or "").partition("=")
        if key and given != (getattr(config, key) == value):
            raise PipelineError(
                f"an input '{name}' that nothing asks for" if given else f"no input '{name}'", where=where,
                got=f"{key}={getattr(config, key)}",
                fix=f"set {reads.asked_by}, or leave inputs.{name} out" if given else f"give {path}, or another {key}",
            )  # fmt: skip
        if not given and (unread := [key for key in config.changed(*reads.keys) if getattr(config, key)]):
            raise PipelineError(
                f"keys of the input '{name}', which is not given", where=where, got=", ".join(unread),
                fix=f"give {path}, or leave them out",
            )  # fmt: skip


def not_here(plan: Plan, tasks: Sequence[PlannedTask]) -> Iterator[tuple[str, Path]]:
    """What unfinished tasks are to read that no task makes and this machine lacks, each with the task's key."""
    made = {task.output.resolve() for task in plan.tasks}
    for task in (task for task in tasks if not (task.output / MANIFEST).is_file()):
        paths: list[Path] = []
        identity(task.config, paths.append)
        paths += [path for given in task.inputs.values() for path in given]
        # Not of an engine inside it: a server's name for a model may be a path of its own machine.
        if looks_local(model := str(getattr(task.config, "model_name_or_path", ""))):
            paths.append(expand_home(model).absolute())
        # os.path: a folder that may not be looked into is no reason to stop here.
        for path in (path for path in paths if not os.path.exists(path)):
            resolved = path.resolve()
            if made.isdisjoint([resolved, *resolved.parents]):
                yield task.key, path


def closed(path: Path) -> str:
    """That a folder on the way to `path` may not be looked into, where that is why it is not seen."""
    try:
        os.stat(path)
    except PermissionError as error:
        return f" (no access: {error.strerror})"
    except OSError:
        pass
    return ""


def require_here(plan: Plan, tasks: Sequence[PlannedTask]) -> None:
    """Raise PipelineError for what `not_here` finds: the task would fail hours later."""
    if found := list(not_here(plan, tasks)):
        raise PipelineError(
            "what tasks of this run are to read is not there, or not to be seen",
            got="\n" + "\n".join(f"    {key}: {path}{closed(path)}" for key, path in found),
            fix="correct the path (or have a closed folder opened), or limit the run to other stages with --only",
        )  # fmt: skip


def require_made(plan: Plan, task: PlannedTask) -> None:
    """Raise PipelineError where tasks of the plan that `task` reads are not finished, as --only left them out."""

    def unfinished(of: PlannedTask) -> set[str]:
        found = [other for other in plan.upstream(of) if not (other.output / MANIFEST).is_file()]
        return {other.key for other in found}.union(*map(unfinished, found))

    if unfinished(task):
        missing = [other.key for other in plan.tasks if other.key in unfinished(task)]  # the first needs none of them
        raise PipelineError(
            "what it reads is not there yet", where=f"run {plan.run}", got=f"not finished: {', '.join(missing)}",
            fix=f"leave --only out, which runs these first, or begin with --only {missing[0].partition(':')[0]}",
        )  # fmt: skip


def _require_one_source(task: PlannedTask, name: str, reads: Reads, source: Path) -> None:
    found = {f"inputs.{name}": path for path in task.inputs[name]}
    found |= {key: value for key in reads.instead_of if (value := getattr(task.config, key))}
    if len(found) == 1:
        return
    stage, ways = task.stage.name, [f"inputs.{name}=FOLDER", *(f"{key}=..." for key in reads.instead_of)]
    left_out = " or ".join(f"{stage}.{key}=null" for key in reads.instead_of if key in found)
    raise PipelineError(
        f"{'two sources' if found else 'no source'} of '{name}' ({reads.kind}) for {task.key}", where=source,
        got=" and ".join(f"{key}={value}" for key, value in found.items()) or None,
        expected=f"{f'stage {reads.stage} in the pipeline, ' if reads.stage else ''}{' or '.join(ways)}",
        fix=left_out or f"write {' or '.join(f'{stage}.{way}' for way in ways)} on the command line",
    )  # fmt: skip
