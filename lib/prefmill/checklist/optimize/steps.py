"""Steps inside one task: each in a folder of its own, with a record of what it was made from, reused while it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmill.core.files import digest_json, digest_path, read_record, write_atomic

RECORD = "step.json"
_VERSION = 2  # raise it when the same settings would give other content


@dataclass(frozen=True)
class Step:
    """One step: its settings decide its content; `run` writes files into the empty folder it is given."""

    name: str
    settings: Mapping[str, Any]
    run: Callable[[Path], None]


def run_steps(steps: Sequence[Step], output: Path, earlier: Path, redo: str | None) -> list[str]:
    """Bring every step below `output` to completion, in order; returns the names of those that were run.

    A finished step is taken from `output` (an interrupted attempt), or from `earlier`, the finished output this one
    replaces, where its settings, those of the steps before it and the content of these are the same. Where all is
    the same, someone wants the work done again: the step `redo` and what follows from it, or with None everything.
    """
    keys = _keys(steps)
    whole = redo is None and read_record(earlier / steps[-1].name / RECORD).get("key") == keys[-1]
    done: dict[str, str] = {}
    ran = []
    for step, key in zip(steps, keys, strict=True):
        # A copy, as `done` grows with every step.
        wanted = {"key": key, "reads": dict(done)}
        folder = output / step.name
        if not _is_made_from(folder, wanted):
            shutil.rmtree(folder, ignore_errors=True)
            source = earlier / step.name
            if not whole and step.name != redo and _is_made_from(source, wanted):
                # Without the record, which is written last: a copy that is cut short is no finished step.
                shutil.copytree(source, folder, ignore=shutil.ignore_patterns(RECORD))
            else:
                folder.mkdir(parents=True)
                step.run(folder)
                ran.append(step.name)
            record = {"step": step.name, **wanted, "digest": _digest(folder)}
            write_atomic(folder / RECORD, json.dumps(record, indent=1) + "\n")
        done[step.name] = read_record(folder / RECORD)["digest"]
    return ran


def _keys(steps: Sequence[Step]) -> list[str]:
    """What decides each step: its own settings and those of all steps before it."""
    keys: list[str] = []
    for step in steps:
        keys.append(digest_json([_VERSION, step.name, dict(step.settings), keys[-1:]]))
    return keys


def _is_made_from(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the finished, undamaged step."""
    record = read_record(folder / RECORD)
    same = all(record.get(name) == value for name, value in wanted.items())
    return bool(record) and same and record["digest"] == _digest(folder)


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.name != RECORD)
    return digest_json([[path.name, digest_path(path)] for path in files])
