"""`prefmill verify`: every finished artifact of a run, hashed again file by file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prefmill.core.errors import ArtifactError
from prefmill.core.places import MANIFEST
from prefmill.pipeline.run_record import run_tasks
from prefmill.store.artifacts import read
from prefmill.store.stamps import stamp, verify


def verify_run(workspace: Path, run: str, say: Callable[[str], None] = print) -> int:
    """Print a line for each task; returns 0 where all that is finished has the content it was made with, else 1."""
    damaged = 0
    for task in run_tasks(workspace, run):
        output = Path(task["output"])
        if not (output / MANIFEST).is_file():
            say(f"-        {task['key']}: not finished")
            continue
        try:
            artifact = read(output)
            verify(artifact)
            # What was hashed just now need not be hashed again before it is used.
            stamp(output, artifact.manifest.files)
        except ArtifactError as error:
            damaged += 1
            say(f"DAMAGED  {task['key']}: {error}")
            continue
        size = sum(entry.bytes for entry in artifact.manifest.files)
        say(f"ok       {task['key']}: {len(artifact.manifest.files)} files, {size / 1e6:.1f} MB")
    return int(damaged > 0)
