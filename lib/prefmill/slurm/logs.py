"""`prefmill logs`: the end of the logs of one task or of all tasks of a stage, followed where that is asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prefmill.core.places import SHARED_FROM
from prefmill.core.terminal import Say
from prefmill.pipeline.run_record import run_tasks, select_tasks
from prefmill.slurm.elements import newest
from prefmill.slurm.submission import submissions

_POLL_SECONDS = 0.5
_BYTES = 1 << 20  # of a log's end are read for its last lines


def show_logs(workspace: Path, run: str, selector: str, lines: int, follow: bool, say: Say = print) -> None:
    """Print the last `lines` of each selected task's log, then what is added until interrupted.

    Every line is preceded by the task's name where there are several. A task that has no log yet, because its job
    broke off before, shows its Slurm log. Raises PipelineError where nothing is selected.
    """
    logs = select_logs(workspace, run, selector)
    width = max(map(len, logs)) if len(logs) > 1 else 0
    places: dict[str, int] = {}
    for task, path in logs.items():
        text, places[task] = read_end(path, lines)
        _say(text, task if width else "", width, say)
        if note := _note(path):
            say(f"{task}: {note}")
    while follow:
        time.sleep(_POLL_SECONDS)
        for task, path in logs.items():
            text, places[task] = read_on(path, places[task])
            _say(text, task if width else "", width, say)


def _note(path: Path) -> str:
    """Where to look instead: a task whose output was taken has no log, or that of an earlier attempt."""
    taken = path.with_suffix("") / SHARED_FROM
    if taken.is_file():
        run = taken.read_text().strip()
        return f"made by run {run}: see {path.parents[2] / run / path.parent.name / path.name}"
    return "" if path.is_file() else f"no log yet ({path})"


def select_logs(workspace: Path, run: str, selector: str) -> dict[str, Path]:
    """The log of every selected task, by `stage:task`."""
    # From the plan's record: configurations may have changed since, and take seconds to read.
    found = select_tasks(run_tasks(workspace, run), selector)
    tried = newest(submissions(workspace, run))
    logs = {task["key"]: Path(f"{task['logs']}.log") for task in found}
    return {
        key: tried[key].slurm_log if not path.is_file() and key in tried and tried[key].slurm_log.is_file() else path
        for key, path in logs.items()
    }


def read_end(path: Path, lines: int) -> tuple[Sequence[str], int]:
    """The last whole lines of a file, and where the next one begins; nothing of a file that is not there."""
    found, place = _read(path, lambda size: max(0, size - _BYTES))
    return found[-lines:] if lines else [], place


def read_on(path: Path, place: int) -> tuple[Sequence[str], int]:
    """The whole lines added since `place`, and where the next one begins; a file begun anew is read from its start."""
    return _read(path, lambda size: place if place <= size else 0)


def _read(path: Path, start_of: Callable[[int], int]) -> tuple[list[str], int]:
    """The whole lines from where `start_of` says for the file's size, and where the next one begins."""
    try:
        with path.open("rb") as stream:
            place = stream.seek(start_of(stream.seek(0, os.SEEK_END)))
            data = stream.read()
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    # A line that is not whole yet is left for the next look, or it would be printed in two.
    return _split(whole), place + len(whole)


def _split(data: bytes) -> list[str]:
    """Lines as a terminal would leave them: of a progress bar only its last state."""
    lines = data.decode(errors="replace").split("\n")[:-1]
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines]


def _say(lines: Sequence[str], task: str, width: int, say: Say) -> None:
    for line in lines:
        say(f"{task:<{width}} | {line}" if task else line)
