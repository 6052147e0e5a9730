"""What is checked before a commit is what `make lint` checks, with the environment's own tools, and finds faults."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

HOOKS = {
    hook["id"]: hook
    for repository in yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]
}
FAULTY = {
    "ruff": ("faulty.py", "import os\n"),
    "format": ("faulty.py", "x  =  1\n"),
    "shellcheck": ("faulty.sh", "#!/usr/bin/env bash\ncd $1\n"),
}


def check(name: str, *files: Path) -> subprocess.CompletedProcess[str]:
    program, *options = HOOKS[name]["entry"].split()
    command = [program, *options, *map(str, files)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_hooks_are_what_lint_runs() -> None:
    lint: Any = (REPOSITORY / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    tools = {line.split("/")[-1].split()[0] for line in lint.splitlines()[1:]}
    entries = {hook["entry"].split()[0].split("/")[-1] for hook in HOOKS.values()}
    assert entries == {name.replace("$(BIN)", "") for name in tools} | {"shellcheck"}
    assert all(hook["language"] == "system" for hook in HOOKS.values())  # no second version of a tool
    assert HOOKS["mypy"]["pass_filenames"] is False  # it checks the whole, as configured


@pytest.mark.parametrize("name", FAULTY)
def test_a_hook_passes_what_is_committed_and_stops_what_is_faulty(name: str, tmp_path: Path) -> None:
    good = REPOSITORY / ("sbatch/dpo.sbatch" if name == "shellcheck" else "stages/dpo.py")
    assert check(name, good).returncode == 0
    file, text = FAULTY[name]
    (tmp_path / file).write_text(text)
    found = check(name, tmp_path / file)
    if name == "format":  # it fixes; pre-commit stops where a file was changed
        assert (tmp_path / file).read_text() != text
    else:
        assert found.returncode != 0
