"""Trainings that ran out of GPU memory run again in smaller microbatches; the optimizer's steps stay the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefmill.core.files import read_record, write_atomic, write_record
from prefmill.core.places import CHECKPOINT_PREFIX
from prefmill.core.stage import Task

SMALLER = "smaller.json"


def read_smaller(logs: Path, submission: int) -> dict[str, Any]:
    """The keys that a submission's task was given since its GPU's memory ran out; empty where it did not."""
    record = read_record(logs / SMALLER)
    keys: dict[str, Any] = record["keys"] if record.get("submission") == submission else {}
    return keys


def write_smaller(logs: Path, submission: int, keys: Mapping[str, Any]) -> None:
    """Note them; to be called before the job that reads them is submitted."""
    write_record(logs / SMALLER, {"submission": submission, "keys": dict(keys)})


def start_over_when_smaller(context: Task, keys: Mapping[str, Any]) -> None:
    """Delete the checkpoints of attempts with other microbatches: their random states are of those."""
    marker, wanted = context.work / SMALLER, json.dumps(dict(keys), sort_keys=True)
    if (marker.read_text() if marker.is_file() else "{}") == wanted:
        return
    print(f"prefmill: from the beginning, with {wanted}: GPU memory ran out", flush=True)
    for checkpoint in context.output.glob(f"{CHECKPOINT_PREFIX}*"):
        shutil.rmtree(checkpoint)
    # Last: killed before this line, the next attempt deletes what is left of them.
    write_atomic(marker, wanted)
