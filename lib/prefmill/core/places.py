"""Where stages and outputs are (in a checkout, in the copy a submission keeps, or with an installed package), and the
names of the files that a task leaves.

Imports nothing heavy: shell completion and `prefmill status` ask here.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

# Named by its place: a wheel may claim no such top-level name as `stages`, and a folder of that name may be anybody's.
STAGES = "prefmill.stages" if (Path(__file__).resolve().parents[1] / "stages").is_dir() else "stages"

# Beside the folders of runs.
CACHE = "cache"
LATEST = "latest"
COMPARISONS = "compare"
NO_RUNS = (CACHE, LATEST, COMPARISONS)
# In a task's output.
MANIFEST = "manifest.json"
RUN_RECORD = "run.json"
WORK = "work"  # the task's own scratch: partial output to resume from, never published
STARTED = "started.json"  # in the scratch
CHECKPOINT_PREFIX = "checkpoint-"  # the trainer's own, for resuming
# In its logs.
SHARED_FROM = "shared_from.txt"  # names the run that made its output, where this one took it
PROGRESS = "progress.json"
STATUS = "status.json"
WANTED_AGAIN = "wanted_again"  # there while finished output is to be made again, as somebody asked


def stages_folder() -> Path:
    """The folder of the package `stages`, in the checkout or where prefmill is installed."""
    return Path(importlib.import_module(STAGES).__path__[0])


def expand_home(path: str | Path) -> Path:
    """`path` with the home that `~` at its start names, or as it is where there is none: a file may be called `~a`."""
    return Path(os.path.expanduser(path))  # Path's own raises RuntimeError


def looks_local(name: str) -> bool:
    """Whether the name of a model can be a path alone: one on the hub has one slash at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def default_workspace() -> Path:
    """The current folder where it has pipelines, as `prefmill init` lays them down; else the checkout of `stages`.

    Installed as a package there is no checkout: then it is the current folder too.
    """
    repository = stages_folder().resolve().parent
    in_checkout = (repository / "pyproject.toml").is_file() and not Path("configs", "pipelines").is_dir()
    return repository if in_checkout else Path.cwd()
