"""The scale benchmark runs, at a small size, and ends with the line it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_data_scale_prints_its_last_line_and_cleans_up(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.data_scale", "--reviews", "2000", "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [
        "ingest_reviews",
        "score_reviews",
        "build_datasets",
        "validate_datasets",
    ]
    assert re.fullmatch(r"peak_gb: \d+\.\d+ seconds: \d+\.\d+", lines[-1])
    assert not (tmp_path / "work").exists()
