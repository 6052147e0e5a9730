"""prefmill doctor: every shortcoming is found where it really is, and named with its fix."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefmill.cli import doctor
from prefmill.cli.doctor import Diagnosis


def only(findings: list[Diagnosis]) -> Diagnosis:
    (found,) = findings
    return found


def test_this_machine_passes_and_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        f"import sys; from prefmill.cli.main import main; code = main(['doctor', '--workspace', {str(tmp_path)!r}])\n"
    )
    code += "assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {importlib.metadata.version('torch')}" in done.stdout
    assert f"{tmp_path}/data: writable" in done.stdout


def test_a_folder_that_cannot_be_written_stops_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.examine(Path("/proc/prefmill")) == 2
    printed = capsys.readouterr().out
    assert "fail  cannot write under /proc/prefmill/data" in printed
    assert "fix: set `workspace` to a folder of yours" in printed


def test_a_wrong_version_is_named_with_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["pytest>=1000", "no-such-package>=1", "torch"])
    failed = [item for item in doctor.check_packages() if item.verdict == "fail"]
    assert [item.what for item in failed] == [
        f"pytest {pytest.__version__}, needs >=1000",
        "no-such-package is missing, needs >=1",
    ]
    # Not `make install`, which holds an environment that it made for up to date.
    assert [item.fix for item in failed] == ["pip install 'pytest>=1000'", "pip install 'no-such-package>=1'"]


@pytest.mark.slow
def test_starts_that_compile_everything_are_told(tmp_path: Path) -> None:
    """Many containers say that bytecode is not to be kept, and uv installs none."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = "from prefmill.cli.doctor import check_python; print([item.what for item in check_python()])"
    compiles = "import py_compile, importlib.util as found; py_compile.compile(found.find_spec('torch').origin)"
    told = []
    for program in (code, compiles, code):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        told.append("every start compiles torch" in done.stdout)
    assert told == [True, False, False]


def test_without_slurm_it_says_what_still_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only([*doctor.check_slurm()]).what == "no Slurm here: only `prefmill run` works"


def test_a_silent_controller_is_told_from_a_live_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (("sbatch", ""), ("sinfo", "echo slurm 22.05"), ("scontrol", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    finding = only([*doctor.check_slurm()])
    assert (finding.verdict, finding.what) == ("note", "slurm 22.05: controller not reached")


def test_a_model_folder_needs_its_configuration(tmp_path: Path) -> None:
    assert only([*doctor.check_model(str(tmp_path))]).verdict == "fail"
    (tmp_path / "config.json").write_text("{}")
    assert only([*doctor.check_model(str(tmp_path))]).verdict == "ok"


def test_no_tokens_value_is_ever_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    print(*doctor.check_hub())
    printed = capsys.readouterr().out
    assert "token set" in printed
    assert "hf_secret" not in printed
