"""The demo as the README has it, in a clean copy of the repository: run once for all tests that start from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

COMMAND = "prefmill run configs/pipelines/demo.yaml"
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class DocumentedDemo:
    """Its folder, to be copied and not touched, and how the command ended."""

    checkout: Path
    returncode: int
    printed: str


@pytest.fixture(scope="session")
def documented_demo(tmp_path_factory: pytest.TempPathFactory) -> DocumentedDemo:
    """The one run, whichever of pytest's processes asks first: it takes minutes, and the others wait."""
    base = tmp_path_factory.getbasetemp()
    checkout = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "documented_demo"
    told = checkout.with_suffix(".json")
    with FileLock(checkout.with_suffix(".lock")):
        if not told.exists():
            clean_copy(checkout)
            done = shell(checkout, COMMAND)
            told.write_text(json.dumps([done.returncode, done.stdout + done.stderr]))
    return DocumentedDemo(checkout, *json.loads(told.read_text()))


def clean_copy(folder: Path) -> None:
    """Write there what git holds."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPOSITORY / name).read_bytes())


def shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user in the checkout would, the environment active."""
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{folder}/lib:{folder}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
