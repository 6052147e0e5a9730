"""Pipelines as the documentation has them, in clean copies of the repository, run once for all tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

DEMO = "prefmill run configs/pipelines/demo.yaml"
MDLM = "prefmill run configs/pipelines/mdlm.yaml"
IMAGES = "make all"
REPOSITORY = Path(__file__).resolve().parents[1]
_OUTPUTS = ("data", "checkpoints", "logs")
_MADE = re.compile(r"\.venv|\..*_cache|\.hypothesis|__pycache__|build|site|.*\.egg-info")


@dataclass(frozen=True)
class DocumentedRun:
    """Its folder, to be copied and not touched, and how the command ended."""

    checkout: Path
    returncode: int
    printed: str


@pytest.fixture(scope="session")
def documented_demo(tmp_path_factory: pytest.TempPathFactory) -> DocumentedRun:
    """The README's demo."""
    return _run_once(tmp_path_factory, DEMO)


@pytest.fixture(scope="session")
def documented_mdlm(tmp_path_factory: pytest.TempPathFactory) -> DocumentedRun:
    """The pipeline of masked diffusion."""
    return _run_once(tmp_path_factory, MDLM)


@pytest.fixture(scope="session")
def documented_images(tmp_path_factory: pytest.TempPathFactory) -> DocumentedRun:
    """The README's image pipeline."""
    return _run_once(tmp_path_factory, IMAGES)


def _run_once(tmp_path_factory: pytest.TempPathFactory, command: str) -> DocumentedRun:
    """The one run, by whichever of pytest's processes asks first: it takes minutes, and the others wait."""
    base = tmp_path_factory.getbasetemp()
    checkout = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"documented_{Path(command).stem}"
    told = checkout.with_suffix(".json")
    with FileLock(checkout.with_suffix(".lock")):
        if not told.exists():
            clean_copy(checkout)
            _lend_environment(checkout)
            done = shell(checkout, command)
            told.write_text(json.dumps([done.returncode, done.stdout + done.stderr]))
    return DocumentedRun(checkout, *json.loads(told.read_text()))


def repository_files() -> Iterator[str]:
    """The names of the files that git holds; of a copy without git those that running it did not make."""
    # Anybody's checkout: in a container it often belongs to another user.
    listed = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    done = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        yield from (name for name in done.stdout.split("\0") if name and (REPOSITORY / name).is_file())
        return
    for folder, inside, files in os.walk(REPOSITORY):
        place = Path(folder).relative_to(REPOSITORY)
        # Pruned here, as an environment has a hundred thousand files.
        inside[:] = [] if str(place) in _OUTPUTS else [name for name in inside if not _MADE.fullmatch(name)]
        yield from (str(place / name) for name in files)


def clean_copy(folder: Path) -> None:
    """Write there what `repository_files` names."""
    for name in repository_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())


def _lend_environment(checkout: Path) -> None:
    """Let `make` find this process's environment there: its own would be 3 GB in every copy of the folder."""
    environment = checkout / ".venv"
    environment.mkdir()
    (environment / "bin").symlink_to(Path(sys.executable).parent)
    (environment / ".installed").touch()


def shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user in the checkout would, the environment active."""
    # A training in this process has pointed trackers at its own logs.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("TRACKIO_", "WANDB_"))}
    environment = {
        **own, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{folder}/lib:{folder}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
