"""Pictures in trackio: a training's samples are in its database, read back by trackio itself.

Each in a process of its own: trackio reads TRACKIO_DIR when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_pair_artifacts import make_pairs, make_sdxl
from PIL import Image

from tests.conftest import REPOSITORY

KEYS = (
    "objective=dpo", "resolution=32", "precision=fp32", "lora.r=4", "max_steps=2", "logging_steps=1", "sample_steps=1",
    "num_samples=2", "sample_inference_steps=1", "report_to=[trackio]",
)  # fmt: skip
READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
(project,) = SQLiteStorage.get_projects()
(run,) = SQLiteStorage.get_runs(project)
print("FOUND" + json.dumps([project, SQLiteStorage.get_logs(project, run)], default=str))
"""


def python(*words: str, **variables: str) -> str:
    """What a fresh Python printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO")}
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env={**kept, **variables}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_samples_are_in_trackio(tmp_path: Path) -> None:
    pairs, model = make_pairs(tmp_path / "pairs", train=2, val=1), make_sdxl(tmp_path / "model")
    (tmp_path / "empty.yaml").write_text("{}\n")
    python(
        "-m", "stages.sdxl_dpo", str(tmp_path / "empty.yaml"), "run=r", f"workspace={tmp_path}",
        f"inputs.pairs={pairs.path}", f"inputs.model={model.path}", "effective_batch_size=1", *KEYS,
    )  # fmt: skip
    logs = tmp_path / "logs" / "r" / "sdxl_dpo" / "all"
    found = python("-c", READ, TRACKIO_DIR=str(logs / "trackio")).partition("FOUND")[2]
    project, rows = json.loads(found)
    assert project == "prefmill"
    pictures = [row["samples"] for row in rows if "samples" in row]
    files = [logs / "trackio" / "media" / picture["file_path"] for picture in pictures]
    grids = sorted((logs / "samples").iterdir())
    assert len(files) == len(grids) == 2
    shown, drawn = ([Image.open(file).convert("RGB").tobytes() for file in part] for part in (files, grids))
    assert shown == drawn
    assert [row["train/global_step"] for row in rows if "samples" in row] == [1, 2]
    assert any("train/loss" in row for row in rows)
