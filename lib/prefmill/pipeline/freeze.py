"""What a submission keeps so that queued jobs run what was submitted: the pipeline written out, and the code."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefmill.core.config import validate
from prefmill.core.errors import PipelineError
from prefmill.core.files import write_atomic
from prefmill.core.places import expand_home, stages_folder
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.pipeline.stage_entry import with_settings
from prefmill.pipeline.state import CODE_VERSION, code_version

_UNSAFE = (":", "\\")  # in PYTHONPATH and in #SBATCH lines they mean something else


def freeze(pipeline: PipelineFile, plan: Plan, source: Path) -> dict[str, Any]:
    """`pipeline` with all that it refers to written out, so that later edits of files change nothing."""
    values = pipeline.model_dump(mode="json") | {"run": plan.run, "workspace": str(plan.workspace)}
    for name, entry in values["stages"].items():
        tasks = [task for task in plan.tasks if task.stage.name == name]
        settings = with_settings(entry["array"])
        for value, element in entry["array"][settings].items() if settings else ():
            mine = next(task for task in tasks if (settings, value) in task.values.items())
            element.update(config=None, set=_written_out(mine, entry["array"], source))
        frozen = {} if settings else _written_out(tasks[0], entry["array"], source)
        inputs = {
            # A relative path or `~` means something else in another folder or to another user.
            key: str(expand_home(given).absolute())
            if isinstance(given, str)
            else [str(expand_home(path).absolute()) for path in given]
            for key, given in entry["inputs"].items()
        }
        entry.update(config=None, set=frozen, inputs=inputs)
    return values


def _written_out(task: PlannedTask, array: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The keys given to a task, without those that its array gives."""
    keys = task.config.model_dump(mode="json", exclude_unset=True)
    frozen = {key: value for key, value in keys.items() if key not in array}
    given = {key: value for key, value in task.values.items() if key in type(task.config).model_fields}
    again = validate(task.stage.config, frozen | given, where=source)
    # A job that would run with other keys than were planned is found now and not after its time in the queue.
    assert again == task.config, f"the configuration of {task.key} does not survive being written out"
    return frozen


def snapshot(target: Path) -> None:
    """Copy the code this process runs to `target`: library, stages, configs and scripts, with its version."""
    import prefmill

    stages = stages_folder()
    repository = stages.resolve().parent
    sources = {
        "lib/prefmill": Path(prefmill.__path__[0]), "stages": stages,
        "configs": repository / "configs", "sbatch": repository / "sbatch",
    }  # fmt: skip
    for name, folder in sources.items():
        if folder.is_dir():
            shutil.copytree(folder, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    # The copy is no checkout: git could not tell its version later.
    write_atomic(target / CODE_VERSION, code_version() + "\n")


def check_path(path: Path) -> None:
    """Raise PipelineError for a path that cannot be given to Slurm safely."""
    # A newline in a path would begin a line of its own in the batch script.
    wrong = [mark for mark in _UNSAFE if mark in str(path)] + [mark for mark in str(path) if not mark.isprintable()]
    if wrong:
        raise PipelineError(
            "Slurm and Python cannot be given this path", where=repr(str(path)), got=repr(wrong[0]),
            fix="use a folder whose path has no colon, backslash, newline or other control character",
        )  # fmt: skip
